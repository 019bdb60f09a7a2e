"""What a notebook draws."""
