"""What a rank trains with: layers, their cut, batches, the engines, the loop, evaluation, checkpoints, records."""
