"""The rules that every schedule keeps: what an instruction waits for, and what is wrong where a stream breaks them.

The checker plays streams in unit time, and says who waits for whom where they get stuck; the simulator plays them
by the same rules with costs. Standard library alone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pipetutor.schedule.orders import PARTNERS, PASSES, STEP, Instruction

__all__ = ["LETTERS", "PASSES", "ScheduleError", "check", "form_of", "picture", "placement"]

LETTERS = {
    "ForwardPass": "F",
    "BackwardPass": "B",
    "BackwardInput": "B",
    "BackwardWeight": "W",
    "LoadMicroBatch": "L",
    "SendActivation": "SA",
    "RecvActivation": "RA",
    "SendGrad": "SG",
    "RecvGrad": "RG",
}

GRADIENT = ("BackwardPass", "BackwardInput")  # either makes the gradient that the stage before waits for
TRANSFERS = ("LoadMicroBatch", *PARTNERS)


class ScheduleError(ValueError):
    """A schedule that cannot run, or would not train what it says."""


class Form(NamedTuple):
    """What a schedule is made of, and so what each of its instructions has to wait for.

    Attributes:
        holders: the rank of each stage of the model; as many ranks as are in it.
        micro_batches: number of micro-batches M.
        full: loads, sends and receives are instructions.
    """

    holders: tuple[int, ...]
    micro_batches: int
    full: bool

    @property
    def ranks(self) -> int:
        """Number of ranks P."""
        return max(self.holders) + 1

    @property
    def stages(self) -> int:
        """Number of stages of the model."""
        return len(self.holders)

    def around(self, stage: int) -> list[str]:
        """Return the names of what the stage does for each micro-batch beside its passes."""
        if not self.full:
            return []
        first, last = stage == 0, stage == self.stages - 1
        names = ["LoadMicroBatch"] if first or last else []
        if not first:
            names += ["RecvActivation", "SendGrad"]
        if not last:
            names += ["SendActivation", "RecvGrad"]
        return names

    def needs(self, name: str, stage: int) -> list[tuple[tuple[str, ...], int]]:
        """Return what must have ended before: names, of which one will do, and their stage; the neighbour's last."""
        if name == "ForwardPass" and self.full:
            wanted = self.around(stage)
            return [((other,), stage) for other in ("LoadMicroBatch", "RecvActivation") if other in wanted]
        if name == "ForwardPass":
            return [((name,), stage - 1)] if stage else []
        if name in GRADIENT and stage < self.stages - 1:
            return [(("ForwardPass",), stage), (("RecvGrad",), stage) if self.full else (GRADIENT, stage + 1)]
        if name in (*GRADIENT, "SendActivation"):
            return [(("ForwardPass",), stage)]
        return [(GRADIENT, stage)] if name in ("BackwardWeight", "SendGrad") else []


def _names(form: Form, stage: int, micro_batch: int, place: Mapping[Instruction, int]) -> list[str]:
    """Return what the stage does for a micro-batch, with its backward pass whole or in halves as it stands there."""
    halves = ("BackwardInput", "BackwardWeight")
    split = any(Instruction(name, stage, micro_batch) in place for name in halves)
    return ["ForwardPass", *(halves if split else ("BackwardPass",)), *form.around(stage)]


def _check_weights(rank: int, stream: Sequence[Instruction]) -> None:
    """Raise where weights change between a forward pass and a backward pass of the same micro-batch."""
    begun: dict[tuple[int, int | None], int] = {}
    changed = -1
    for number, (name, stage, micro_batch) in enumerate(stream):
        if name == "OptimizerStep":
            changed = number
        elif name == "ForwardPass":
            begun[stage, micro_batch] = number
        elif name in PASSES and begun.get((stage, micro_batch), number) < changed:
            forward = Instruction("ForwardPass", stage, micro_batch)
            raise ScheduleError(
                f"rank {rank}: the weights change (instruction {changed}) between {forward} and its {name} "
                f"(instruction {number}), so a gradient would be taken of weights that are there no more: flush, "
                "for OptimizerStep must be last"
            )


def _check_rank(form: Form, rank: int, stream: Sequence[Instruction]) -> None:
    _check_weights(rank, stream)
    place: dict[Instruction, int] = {}
    for number, instruction in enumerate(stream):
        name, stage, micro_batch = instruction
        where = f"rank {rank}, instruction {number}: "
        if name not in LETTERS and name not in STEP:
            raise ScheduleError(f"{where}unknown instruction {name!r}: use {', '.join([*LETTERS, *STEP])}")
        if micro_batch is None:
            known = name in STEP and stage == rank
        else:
            known = (
                name not in STEP and (name in PASSES or name in form.around(stage)) and min(stage, micro_batch) >= 0
            )
        if not known:
            does = ", ".join([*PASSES, *form.around(stage)])
            raise ScheduleError(
                f"{where}{instruction} does not belong here: a stage does {does} for micro-batches 0, 1, ..., and "
                f"rank {rank} does {', '.join(STEP)}, of stage {rank} and micro-batch None, for the whole step"
            )
        if micro_batch is not None and form.holders[stage] != rank:
            raise ScheduleError(
                f"{where}{instruction}, but rank {form.holders[stage]} holds stage {stage}: a stage and its "
                "weights are on one rank, so let one of them run all its passes"
            )
        if instruction in place:
            raise ScheduleError(
                f"rank {rank} runs {instruction} twice, as instructions {place[instruction]} and {number}: "
                "it would count twice; remove one"
            )
        place[instruction] = number
    mine = [stage for stage, holder in enumerate(form.holders) if holder == rank]
    if not mine:
        raise ScheduleError(f"rank {rank} runs no pass of any stage: give it one of the stages, or leave it out")
    for stage in mine:
        for micro_batch in range(form.micro_batches):
            _check_micro_batch(form, rank, stage, micro_batch, place)
    begun = [instruction.name for instruction in stream if instruction.micro_batch is None]
    ends = all(instruction.micro_batch is None for instruction in stream[-len(begun) :])
    if begun[-1:] != ["OptimizerStep"] or begun != sorted(begun, key=STEP.index) or not ends:
        raise ScheduleError(
            f"rank {rank}: {', '.join(STEP)} end a step, in this order, and OptimizerStep must be last: a "
            f"gradient that comes later would be lost; the stream ends with {', '.join(map(str, stream[-3:]))}"
        )


def _check_micro_batch(form: Form, rank: int, stage: int, micro_batch: int, place: Mapping[Instruction, int]) -> None:
    """Raise unless the stage does all that it has to do for a micro-batch, after what it needs of its own rank."""
    names = _names(form, stage, micro_batch, place)
    whole = Instruction("BackwardPass", stage, micro_batch)
    if "BackwardInput" in names and whole in place:
        raise ScheduleError(
            f"rank {rank} runs {whole} and a half of the same pass: its gradients would count twice; keep the whole "
            "or both halves"
        )
    for name in names:
        this = Instruction(name, stage, micro_batch)
        if this not in place:
            raise ScheduleError(
                f"rank {rank} never runs {this}: add it, for all {form.micro_batches} micro-batches count"
            )
        for others, at in form.needs(name, stage):
            for needed in (Instruction(other, at, micro_batch) for other in others):
                if place.get(needed, -1) > place[this]:
                    raise ScheduleError(
                        f"rank {rank} runs {this} (instruction {place[this]}) before {needed} (instruction "
                        f"{place[needed]}), but needs its result: swap them"
                    )


def _slots(form: Form, streams: Sequence[Sequence[Instruction]]) -> Iterator[list[Instruction | None]]:
    """Play the streams in unit time: one row for each slot, with what each rank does in it (None: it waits)."""
    place = [0] * len(streams)
    done: set[Instruction] = set()

    def waits_for(instruction: Instruction) -> list[Instruction]:
        name, stage, micro_batch = instruction
        if micro_batch is None:
            return []
        wanted = [[Instruction(o, at, micro_batch) for o in others] for others, at in form.needs(name, stage)]
        missing = [next(filter(known, each), each[0]) for each in wanted if done.isdisjoint(each)]
        if name in PARTNERS:
            partner, step = PARTNERS[name]
            peer = Instruction(partner, stage + step, micro_batch)
            if heads[form.holders[peer.stage]] != peer:
                missing.append(peer)
        return missing

    known = {instruction for stream in streams for instruction in stream}.__contains__
    while True:
        heads = [stream[at] if at < len(stream) else None for stream, at in zip(streams, place, strict=True)]
        if not any(heads):
            return
        row = [head if head and not waits_for(head) else None for head in heads]
        if not any(row):
            stuck = [
                f"rank {rank} stands at {head} and waits for {waits_for(head)[0]} "
                f"on rank {form.holders[waits_for(head)[0].stage]}"
                for rank, head in enumerate(heads)
                if head
            ]
            raise ScheduleError(
                f"deadlock: {'; '.join(stuck)}. Follow the waits until they close a circle, and there let one rank "
                "do first what the other waits for"
            )
        for rank, head in enumerate(row):
            if head:
                place[rank] += 1
                done.add(head)
        yield row


def form_of(streams: Sequence[Sequence[Instruction]]) -> Form:
    """Tell from the streams which rank holds which stage: the one that runs most of its passes."""
    ranks: dict[int, Counter[int]] = {}
    for rank, stream in enumerate(streams):
        for instruction in stream:
            if instruction.micro_batch is not None:
                ranks.setdefault(instruction.stage, Counter())[rank] += 1
    every = {instruction for stream in streams for instruction in stream}
    stages = max(ranks, default=-1) + 1
    for stage in range(stages):
        if stage not in ranks:
            raise ScheduleError(f"no rank runs stage {stage}, and one runs stage {stages - 1}: each stage has a rank")
    micro_batches = max((i.micro_batch for i in every if i.micro_batch is not None), default=-1) + 1
    full = any(instruction.name in TRANSFERS for instruction in every)
    return Form(tuple(ranks[stage].most_common(1)[0][0] for stage in range(stages)), micro_batches, full)


def placement(streams: Sequence[Sequence[Instruction]]) -> tuple[int, ...]:
    """Return the rank that holds each stage of the model.

    >>> from pipetutor.schedule.orders import build
    >>> placement(build("interleaved_1f1b", 2, 2, chunks=2))
    (0, 1, 0, 1)
    """
    return form_of(streams).holders


def check(streams: Sequence[Sequence[Instruction]]) -> None:
    """Raise unless the schedule trains on every micro-batch once and every rank comes to its end.

    Args:
        streams: one for each rank; compute streams or full streams.

    Raises:
        ScheduleError: an instruction is missing, unknown or there twice, comes before one of its own rank that it
            needs, or after ``OptimizerStep``; a stage is on two ranks or on none; or ranks wait for each other for
            ever.

    >>> from pipetutor.schedule.orders import build
    >>> check(build("1f1b", 4, 8))
    """
    form = form_of(streams)
    if not form.micro_batches:
        raise ScheduleError(
            f"no pass is placed yet, in none of {len(streams)} streams: begin with ForwardPass 0 of stage 0, F0"
        )
    for rank, stream in enumerate(streams):
        _check_rank(form, rank, stream)
    for _ in _slots(form, streams):
        pass


def picture(streams: Sequence[Sequence[Instruction]], placement: Sequence[int] | None = None) -> str:
    """Draw the schedule: a row for each rank, a column for each slot, were every instruction one slot long.

    Args:
        streams: one for each rank.
        placement: the rank of each stage, where the streams are only a beginning and do not say all of it.

    Returns:
        Text such as F3 (forward, micro-batch 3) or, where rank r does not hold stage r alone, 5F3 (on stage 5). B is
        a backward pass or its input half, W its weight half, "." a slot of waiting.

    Raises:
        ScheduleError: the ranks wait for each other for ever.

    >>> from pipetutor.schedule.orders import build
    >>> print(picture(build("gpipe", 2, 2)))
    F0 F1 .  .  B0 B1
    .  F0 F1 B0 B1 .
    """
    form = Form(tuple(placement), 0, full=False) if placement else form_of(streams)
    passes = [[i for i in stream if i.micro_batch is not None] for stream in streams]
    numbered = form.holders != tuple(range(len(streams)))
    rows = []
    for row in _slots(form, passes):
        chunk = [str(i.stage) if i and numbered else "" for i in row]
        cells = [f"{c}{LETTERS[i.name]}{i.micro_batch}" if i else "." for c, i in zip(chunk, row, strict=True)]
        rows.append(cells)
    width = max(len(cell) for cells in rows for cell in cells)
    return "\n".join(" ".join(cell.ljust(width) for cell in rank).rstrip() for rank in zip(*rows, strict=True))
