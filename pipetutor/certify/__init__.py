"""The proof that a pipeline computes what one process computes."""
