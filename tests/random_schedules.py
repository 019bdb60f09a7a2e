"""Schedules for tests: those of the package with numbers that they take, and others at random, right and wrong."""

from pipetutor.schedule.orders import LOOPED, deepspeed_1f1b


def full(stages, micro_batches):
    return [list(deepspeed_1f1b(stages, micro_batches, stage)) for stage in range(stages)]


def accepted(name, ranks, micro_batches, chunks):
    """The nearest numbers, of micro-batches and of chunks, that a schedule takes."""
    if name == "interleaved_1f1b":
        micro_batches = ranks * (1 + micro_batches % 2)
    if name == "dualpipev":
        micro_batches += 2 * ranks
    return micro_batches, chunks if name in LOOPED else 1
