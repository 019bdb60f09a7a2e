"""Which layout a model wants on a cluster: stages, replicas, micro-batches, bounds, schedule, recomputing, ZeRO."""
