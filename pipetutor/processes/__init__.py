"""Starting ranks, watching them, and leaving none behind."""
