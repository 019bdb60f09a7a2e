"""Schedules for tests: those of the package with numbers that they take, and others at random, right and wrong."""

import random
from collections.abc import Callable

from pipetutor.schedule.orders import LOOPED, Instruction, deepspeed_1f1b

Streams = list[list[Instruction]]
HALVES = ("BackwardInput", "BackwardWeight")

# No library has it: rank 1 holds the first and the last of three stages, and of some backward passes the halves.
NOVEL = """
    1F0 1F1 1B0 1F2 1I1 1W1 1F3 1B2 1B3
    0F0 0F1 2F0 2B0 0F2 2F1 2I1 0B0 2W1 0F3 2F2 2B2 0I1 2F3 2B3 0W1 0B2 0B3
"""  # for pipetutor.schedule.text.parse


def full(stages, micro_batches):
    return [list(deepspeed_1f1b(stages, micro_batches, stage)) for stage in range(stages)]


def accepted(name, ranks, micro_batches, chunks):
    """The nearest numbers, of micro-batches and of chunks, that a schedule takes."""
    if name == "interleaved_1f1b":
        micro_batches = ranks * (1 + micro_batches % 2)
    if name == "dualpipev":
        micro_batches += 2 * ranks
    return micro_batches, chunks if name in LOOPED else 1


def ended(streams: Streams) -> Streams:
    """The streams with the end of a step."""
    names = ("ReduceGrads", "OptimizerStep")
    return [[*stream, *(Instruction(name, rank) for name in names)] for rank, stream in enumerate(streams)]


def needs(one: Instruction, other: Instruction) -> bool:
    """Whether a pass needs another one's result, by what a forward and a backward pass are and not by ``rules``."""
    if one.micro_batch != other.micro_batch:
        return False
    forward, gradient = "ForwardPass", other.name in ("BackwardPass", "BackwardInput")
    if one.name == forward:
        return other.name == forward and other.stage == one.stage - 1
    if one.name == "BackwardWeight":
        return other.name == "BackwardInput" and other.stage == one.stage
    return (other.name == forward and other.stage == one.stage) or (gradient and other.stage == one.stage + 1)


def sorted_at_random(draw: random.Random, passes: list[Instruction]) -> list[Instruction]:
    """The passes in an order in which each comes after what it needs, of them all alike likely."""
    waits = {one: sum(needs(one, other) for other in passes) for one in passes}
    ready = [one for one in passes if not waits[one]]
    found = []
    while ready:
        found.append(ready.pop(draw.randrange(len(ready))))
        for one in passes:
            if needs(one, found[-1]):
                waits[one] -= 1
                if not waits[one]:
                    ready.append(one)
    return found


def drawn(draw: random.Random, least: int = 1) -> Streams:
    """A valid schedule without its end: up to 4 ranks, 9 stages on any of them, 5 micro-batches, halves and wholes.

    What is put into an order in which each pass comes after what it needs, and is then cut into ranks, can be played.
    """
    ranks, micro_batches = draw.randint(least, 4), draw.randint(least, 5)
    holders = [*range(ranks), *(draw.randrange(ranks) for _ in range(draw.randint(0, 9 - ranks)))]
    draw.shuffle(holders)
    split = draw.choice((0.0, 0.5, 1.0))
    passes = []
    for stage in range(len(holders)):
        for micro_batch in range(micro_batches):
            backward = HALVES if draw.random() < split else ("BackwardPass",)
            passes += [Instruction(name, stage, micro_batch) for name in ("ForwardPass", *backward)]
    order = sorted_at_random(draw, passes)
    return [[one for one in order if holders[one.stage] == rank] for rank in range(ranks)]


def random_schedule(seed: int) -> Streams:
    """A valid schedule; the same one for the same seed."""
    return ended(drawn(random.Random(seed)))


def some(draw: random.Random, streams: Streams, wanted: Callable[[Instruction], bool] = lambda _: True):
    """The rank and the place of a pass."""
    return draw.choice([(r, n) for r, stream in enumerate(streams) for n, one in enumerate(stream) if wanted(one)])


def dropped(draw, streams):
    rank, number = some(draw, streams)
    del streams[rank][number]


def twice(draw, streams):
    rank, number = some(draw, streams)
    streams[rank].insert(draw.randint(number + 1, len(streams[rank])), streams[rank][number])


def before_what_it_needs(draw, streams):
    rank, number = some(draw, streams, lambda one: one.name != "ForwardPass")
    stream = streams[rank]
    needed = draw.choice([other for other, one in enumerate(stream) if needs(stream[number], one)])
    stream[number], stream[needed] = stream[needed], stream[number]


def on_two_ranks(draw, streams):
    rank, number = some(draw, streams)
    other = draw.choice([other for other in range(len(streams)) if other != rank])
    streams[other].insert(draw.randint(0, len(streams[other])), streams[rank].pop(number))


def wrong_micro_batch(draw, streams):
    rank, number = some(draw, streams)
    numbers = {one.micro_batch for one in streams[rank]}
    others = sorted((numbers | {len(numbers)}) - {streams[rank][number].micro_batch})
    streams[rank][number] = streams[rank][number]._replace(micro_batch=draw.choice(others))


def half_a_pass(draw, streams):
    rank, number = some(draw, streams, lambda one: one.name in (*HALVES, "BackwardPass"))
    one = streams[rank].pop(number)
    if one.name == "BackwardPass":
        streams[rank].insert(number, one._replace(name=draw.choice(HALVES)))


def whole_and_halves(draw, streams):
    rank, number = some(draw, streams, lambda one: one.name in ("BackwardPass", "BackwardWeight"))
    one = streams[rank][number]
    more = HALVES if one.name == "BackwardPass" else ("BackwardPass",)
    streams[rank][number + 1 : number + 1] = [one._replace(name=name) for name in more]


def no_such_stage(draw, streams):
    last = max(one.stage for stream in streams for one in stream)
    for stream in streams:
        stream[:] = [one._replace(stage=last + 1) if one.stage == last else one for one in stream]


def circle(draw, streams):
    """Each rank keeps its own passes in order, as far as they need each other, and yet all cannot go on."""
    valid = [list(stream) for stream in streams]
    while plays(streams):
        streams[:] = [sorted_at_random(draw, stream) for stream in valid]


def plays(streams: Streams) -> bool:
    """Whether ranks that do one pass after another come to their ends."""
    left, every = [list(stream) for stream in streams], [one for stream in streams for one in stream]
    done: set[Instruction] = set()
    wanted = {one: {other for other in every if needs(one, other)} for one in every}
    while any(left):
        moved = [stream.pop(0) for stream in left if stream and wanted[stream[0]] <= done]
        if not moved:
            return False
        done.update(moved)
    return True


FAULTS = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        *(dropped, twice, before_what_it_needs, on_two_ranks, wrong_micro_batch),
        *(half_a_pass, whole_and_halves, no_such_stage, circle),
    )
}


def broken_schedule(seed: int) -> tuple[str, Streams]:
    """A schedule with one fault, of ``FAULTS`` in turn, and the fault's name; the same one for the same seed."""
    draw, name = random.Random(seed), list(FAULTS)[seed % len(FAULTS)]
    streams = drawn(draw, least=2 if name in ("circle", "on two ranks") else 1)
    FAULTS[name](draw, streams)
    return name, ended(streams)
