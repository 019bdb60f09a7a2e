"""The rules that every schedule keeps: what an instruction waits for, and what is wrong where a stream breaks them.

The checker plays streams in unit time, and says who waits for whom where they get stuck; the simulator plays them
by the same rules with costs. Standard library alone.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from pipetutor.schedule.orders import PARTNERS, STEP, Instruction

__all__ = ["LETTERS", "ScheduleError", "check", "picture"]

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


class ScheduleError(ValueError):
    """A schedule that cannot run, or would not train what it says."""


class Form(NamedTuple):
    """What a schedule is made of, and so what each of its instructions has to wait for.

    Attributes:
        ranks: number of streams P.
        stages: number of stages of the model.
        micro_batches: number of micro-batches M.
        full: loads, sends and receives are instructions.
        split: every backward pass is split in two.
    """

    ranks: int
    stages: int
    micro_batches: int
    full: bool
    split: bool

    @classmethod
    def of(cls, names: Collection[str], ranks: int, stages: int, micro_batches: int) -> "Form":
        """Tell from the instructions' names whether the streams are full, and whether backward passes are split."""
        full = any(name in names for name in ("LoadMicroBatch", *PARTNERS))
        return cls(ranks, stages, micro_batches, full, "BackwardInput" in names or "BackwardWeight" in names)

    def work(self, stage: int) -> list[str]:
        """Return the names of what the stage does for each micro-batch."""
        first, last = stage == 0, stage == self.stages - 1
        names = ["ForwardPass", *(("BackwardInput", "BackwardWeight") if self.split else ("BackwardPass",))]
        if self.full and (first or last):
            names.append("LoadMicroBatch")
        if self.full and not first:
            names += ["RecvActivation", "SendGrad"]
        if self.full and not last:
            names += ["SendActivation", "RecvGrad"]
        return names

    def needs(self, name: str, stage: int) -> list[tuple[str, int]]:
        """Return which names of which stages must have ended before; the neighbour's, if any, comes last."""
        backward = "BackwardInput" if self.split else "BackwardPass"
        if name == "ForwardPass" and self.full:
            return [(other, stage) for other in ("LoadMicroBatch", "RecvActivation") if other in self.work(stage)]
        if name == "ForwardPass":
            return [(name, stage - 1)] if stage else []
        if name == backward and stage < self.stages - 1:
            return [("ForwardPass", stage), ("RecvGrad", stage) if self.full else (backward, stage + 1)]
        if name in (backward, "SendActivation"):
            return [("ForwardPass", stage)]
        return [(backward, stage)] if name in ("BackwardWeight", "SendGrad") else []


def _check_rank(form: Form, rank: int, stream: Sequence[Instruction]) -> None:
    place: dict[Instruction, int] = {}
    for number, instruction in enumerate(stream):
        name, stage, micro_batch = instruction
        if name not in LETTERS and name not in STEP:
            names = ", ".join([*LETTERS, *STEP])
            raise ScheduleError(f"rank {rank}, instruction {number}: unknown instruction {name!r}: use {names}")
        if stage % form.ranks != rank:
            raise ScheduleError(
                f"rank {rank}, instruction {number}: {instruction}, but of {form.ranks} ranks, "
                f"rank {stage % form.ranks} holds stage {stage}"
            )
        if micro_batch is None:
            known = name in STEP and stage == rank
        else:
            known = name in form.work(stage) and stage >= 0 and micro_batch >= 0
        if not known:
            raise ScheduleError(
                f"rank {rank}, instruction {number}: {instruction} does not belong here: a stage does "
                f"{', '.join(form.work(stage))} for micro-batches 0, 1, ..., and rank {rank} does {', '.join(STEP)}, "
                f"of stage {rank} and micro-batch None, for the whole step"
            )
        if instruction in place:
            raise ScheduleError(
                f"rank {rank} runs {instruction} twice, as instructions {place[instruction]} and {number}: "
                "it would count twice; remove one"
            )
        place[instruction] = number
    for stage in range(rank, form.stages, form.ranks):
        for micro_batch in range(form.micro_batches):
            for name in form.work(stage):
                this = Instruction(name, stage, micro_batch)
                if this not in place:
                    raise ScheduleError(
                        f"rank {rank} never runs {this}: add it, for all {form.micro_batches} micro-batches count"
                    )
                for other in form.needs(name, stage):
                    needed = Instruction(*other, micro_batch)
                    if place.get(needed, -1) > place[this]:
                        raise ScheduleError(
                            f"rank {rank} runs {this} (instruction {place[this]}) before {needed} (instruction "
                            f"{place[needed]}), but needs its result: swap them"
                        )
    begun = [instruction.name for instruction in stream if instruction.micro_batch is None]
    ends = all(instruction.micro_batch is None for instruction in stream[-len(begun) :])
    if begun[-1:] != ["OptimizerStep"] or begun != sorted(begun, key=STEP.index) or not ends:
        raise ScheduleError(
            f"rank {rank}: {', '.join(STEP)} end a step, in this order, and OptimizerStep must be last: a "
            f"gradient that comes later would be lost; the stream ends with {', '.join(map(str, stream[-3:]))}"
        )


def _slots(form: Form, streams: Sequence[Sequence[Instruction]]) -> Iterator[list[Instruction | None]]:
    """Play the streams in unit time: one row for each slot, with what each rank does in it (None: it waits)."""
    place = [0] * len(streams)
    done: set[Instruction] = set()
    needs = {(name, stage): form.needs(name, stage) for stage in range(form.stages) for name in form.work(stage)}

    def waits_for(instruction: Instruction) -> list[Instruction]:
        name, stage, micro_batch = instruction
        missing = [Instruction(*other, micro_batch) for other in needs.get((name, stage), ())]
        missing = [other for other in missing if other not in done]
        if name in PARTNERS:
            partner, step = PARTNERS[name]
            peer = Instruction(partner, stage + step, micro_batch)
            if heads[peer.stage % form.ranks] != peer:
                missing.append(peer)
        return missing

    while True:
        heads = [stream[at] if at < len(stream) else None for stream, at in zip(streams, place, strict=True)]
        if not any(heads):
            return
        row = [head if head and not waits_for(head) else None for head in heads]
        if not any(row):
            stuck = [
                f"rank {rank} stands at {head} and waits for {waits_for(head)[0]} "
                f"on rank {waits_for(head)[0].stage % form.ranks}"
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


def _form(streams: Sequence[Sequence[Instruction]]) -> Form:
    every = [instruction for stream in streams for instruction in stream]
    stages = max((instruction.stage for instruction in every), default=-1) + 1
    micro_batches = max((i.micro_batch for i in every if i.micro_batch is not None), default=-1) + 1
    return Form.of({instruction.name for instruction in every}, len(streams), stages, micro_batches)


def check(streams: Sequence[Sequence[Instruction]]) -> None:
    """Raise unless the schedule trains on every micro-batch once and every rank comes to its end.

    Args:
        streams: one for each rank; compute streams or full streams.

    Raises:
        ScheduleError: an instruction is missing, unknown, on the wrong rank or there twice, comes before one
            of its own rank that it needs, or after ``OptimizerStep``; or ranks wait for each other for ever.

    >>> from pipetutor.schedule.orders import build
    >>> check(build("1f1b", 4, 8))
    """
    form = _form(streams)
    if not form.micro_batches:
        raise ScheduleError(f"{len(streams)} streams without a pass of any micro-batch: add ForwardPass 0")
    for rank, stream in enumerate(streams):
        _check_rank(form, rank, stream)
    for _ in _slots(form, streams):
        pass


def picture(streams: Sequence[Sequence[Instruction]]) -> str:
    """Draw the schedule: a row for each rank, a column for each slot, were every instruction one slot long.

    Args:
        streams: one for each rank.

    Returns:
        Text such as F3 (forward, micro-batch 3) or, where ranks hold several stages, 5F3 (on stage 5). B is
        a backward pass or its input half, W its weight half, "." a slot of waiting.

    Raises:
        ScheduleError: the ranks wait for each other for ever.

    >>> from pipetutor.schedule.orders import build
    >>> print(picture(build("gpipe", 2, 2)))
    F0 F1 .  .  B0 B1
    .  F0 F1 B0 B1 .
    """
    form = _form(streams)
    passes = [[i for i in stream if i.micro_batch is not None] for stream in streams]
    rows = []
    for row in _slots(form, passes):
        chunk = [str(i.stage) if i and form.stages > form.ranks else "" for i in row]
        cells = [f"{c}{LETTERS[i.name]}{i.micro_batch}" if i else "." for c, i in zip(chunk, row, strict=True)]
        rows.append(cells)
    width = max(len(cell) for cells in rows for cell in cells)
    return "\n".join(" ".join(cell.ljust(width) for cell in rank).rstrip() for rank in zip(*rows, strict=True))
