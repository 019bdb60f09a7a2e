"""How fast is it? The bench and its rivals; nothing of ``pipetutor`` imports them."""
