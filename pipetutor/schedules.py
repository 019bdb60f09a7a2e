"""Pipeline schedules as pure data: which instruction a rank runs after which.

A schedule is one stream of instructions for each rank, made by a generator. The checker, the pictures, the
simulator and the tests read the same streams, and what DeepSpeed and torch run is held to them by tests.
Standard library alone: it loads in milliseconds.

A compute stream (``SCHEDULES``) names only the work; loads and transfers happen in the background. A full
stream (``deepspeed_1f1b``) names them too, and a send ends only together with its receive, as with gloo.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

STEP = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")
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
PARTNERS = {
    "SendActivation": ("RecvActivation", 1),
    "RecvActivation": ("SendActivation", -1),
    "SendGrad": ("RecvGrad", -1),
    "RecvGrad": ("SendGrad", 1),
}


class Instruction(NamedTuple):
    """One thing that a rank does.

    Attributes:
        name: DeepSpeed's name; ``BackwardInput`` and ``BackwardWeight`` are the halves of a ``BackwardPass``.
        stage: of the model; with several chunks, rank r of P holds the stages r, r + P, r + 2P, ...
        micro_batch: None for what concerns the whole step.
    """

    name: str
    stage: int
    micro_batch: int | None

    def __str__(self) -> str:
        number = "" if self.micro_batch is None else f" {self.micro_batch}"
        return f"{self.name}{number} of stage {self.stage}"


class ScheduleError(ValueError):
    """A schedule that cannot run, or would not train what it says."""


def _require(ranks: int, micro_batches: int, rank: int) -> None:
    if ranks < 1 or micro_batches < 1:
        raise ValueError(f"{ranks} ranks and {micro_batches} micro-batches: use at least 1 of each")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks} ranks: use 0 to {ranks - 1}")


def _end(rank: int) -> Iterator[Instruction]:
    yield Instruction("ReduceGrads", rank, None)
    yield Instruction("OptimizerStep", rank, None)


def naive(ranks: int, micro_batches: int, rank: int) -> Iterator[Instruction]:
    """One micro-batch at a time goes all the way forward and back: one rank works, the others wait.

        F0 .  .  .  .  B0 F1 .  .  .  .  B1 F2 .  .  .  .  B2
        .  F0 .  .  B0 .  .  F1 .  .  B1 .  .  F2 .  .  B2 .
        .  .  F0 B0 .  .  .  .  F1 B1 .  .  .  .  F2 B2 .  .

    Args:
        ranks: the number of ranks P.
        micro_batches: the number of micro-batches M.
        rank: whose instructions.

    Yields:
        The rank's compute, then ``ReduceGrads`` and ``OptimizerStep``.

    Raises:
        ValueError: fewer than one rank or micro-batch, or no such rank.

    >>> [instruction.name for instruction in naive(2, 1, 0)]
    ['ForwardPass', 'BackwardPass', 'ReduceGrads', 'OptimizerStep']
    """
    _require(ranks, micro_batches, rank)
    for micro_batch in range(micro_batches):
        yield Instruction("ForwardPass", rank, micro_batch)
        yield Instruction("BackwardPass", rank, micro_batch)
    yield from _end(rank)


def gpipe(ranks: int, micro_batches: int, rank: int) -> Iterator[Instruction]:
    """All forward passes, then all backward passes (Huang et al., arXiv:1811.06965); as ``naive`` otherwise.

    A rank keeps the activations of all M micro-batches.

        F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
        .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
        .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .
    """
    _require(ranks, micro_batches, rank)
    for name in ("ForwardPass", "BackwardPass"):
        for micro_batch in range(micro_batches):
            yield Instruction(name, rank, micro_batch)
    yield from _end(rank)


def _alternate(count: int, warm_up: int) -> Iterator[tuple[bool, int]]:
    """Yield (forward?, number): ``warm_up`` forwards, then forward and backward in turn, then the backwards."""
    for number in range(count + warm_up):
        if number < count:
            yield True, number
        if number >= warm_up:
            yield False, number - warm_up


def one_f_one_b(ranks: int, micro_batches: int, rank: int) -> Iterator[Instruction]:
    """One forward, one backward (Narayanan et al., arXiv:2006.09503, 2104.04473); as ``naive`` otherwise.

    A backward pass runs as soon as its gradient can be there, so rank r keeps at most P - r micro-batches.

        F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
        .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
        .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .
    """
    _require(ranks, micro_batches, rank)
    for forward, number in _alternate(micro_batches, min(ranks - 1 - rank, micro_batches)):
        yield Instruction("ForwardPass" if forward else "BackwardPass", rank, number)
    yield from _end(rank)


def interleaved_1f1b(ranks: int, micro_batches: int, rank: int, chunks: int = 2) -> Iterator[Instruction]:
    """1F1B with several chunks of the model on each rank (Narayanan et al., arXiv:2104.04473, Megatron-LM).

    P micro-batches pass through a rank's first chunk, then through its second, and so on. Below, 2F0 is the
    forward pass of stage 2, micro-batch 0; stages 0 and 2 are on rank 0.

        0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 .   2B2 .   2B3 0B2 0B3
        .   1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3 .

    Args:
        ranks: the number of ranks P.
        micro_batches: M, a multiple of P as in Megatron (torch allows a few more).
        rank: whose instructions.
        chunks: stages on each rank, v; at least 2.

    Yields:
        The rank's compute, then ``ReduceGrads`` and ``OptimizerStep``.

    Raises:
        ValueError: as ``naive``; or M is no multiple of P; or fewer than 2 chunks.

    >>> [instruction.stage for instruction in interleaved_1f1b(2, 2, 1)][:4]
    [1, 1, 3, 3]
    """
    _require(ranks, micro_batches, rank)
    if chunks < 2:
        raise ValueError(f"{chunks} chunks on each rank: interleaving needs at least 2; use 1f1b for 1")
    if micro_batches % ranks:
        raise ValueError(
            f"{micro_batches} micro-batches are not a multiple of {ranks} ranks, which interleaving needs: "
            f"use {(micro_batches // ranks + 1) * ranks} micro-batches"
        )
    count = chunks * micro_batches
    for forward, number in _alternate(count, min((chunks - 1) * ranks + 2 * (ranks - 1 - rank), count)):
        chunk = number // ranks % chunks
        micro_batch = number // (ranks * chunks) * ranks + number % ranks
        if forward:
            yield Instruction("ForwardPass", chunk * ranks + rank, micro_batch)
        else:
            yield Instruction("BackwardPass", (chunks - 1 - chunk) * ranks + rank, micro_batch)
    yield from _end(rank)


def zero_bubble(ranks: int, micro_batches: int, rank: int) -> Iterator[Instruction]:
    """ZB-H1 (Qi et al., arXiv:2401.10241, section 2.1); as ``naive`` otherwise.

    1F1B, but only the input half of a backward pass, B, is urgent: the rank before waits for it. Rank r keeps
    r weight halves, W, back and fills the end with them. So every rank keeps at most P micro-batches, as many
    as rank 0 of 1F1B.

        F0 F1 F2 .  .  B0 W0 F3 B1 W1 F4 B2 W2 B3 W3 B4 W4
        .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 F4 B3 W2 B4 W3 W4
        .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 F4 B4 W2 W3 W4
    """
    _require(ranks, micro_batches, rank)
    for forward, number in _alternate(micro_batches, min(ranks - 1 - rank, micro_batches)):
        yield Instruction("ForwardPass" if forward else "BackwardInput", rank, number)
        if not forward and number >= rank:
            yield Instruction("BackwardWeight", rank, number - rank)
    for number in range(max(micro_batches - rank, 0), micro_batches):
        yield Instruction("BackwardWeight", rank, number)
    yield from _end(rank)


SCHEDULES: dict[str, Callable[..., Iterator[Instruction]]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "zero_bubble": zero_bubble,
}


def _require_schedule(schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: use {', '.join(SCHEDULES)}")


def build(schedule: str, ranks: int, micro_batches: int, chunks: int = 1) -> list[list[Instruction]]:
    """Return the streams of all ranks.

    Args:
        schedule: a key of ``SCHEDULES``.
        ranks: the number of ranks P.
        micro_batches: the number of micro-batches M.
        chunks: stages on each rank; more than 1 for ``interleaved_1f1b`` alone.

    Returns:
        One list of instructions for each rank.

    Raises:
        ValueError: no such schedule, or numbers that it does not take.

    >>> len(build("1f1b", 4, 8))
    4
    """
    _require_schedule(schedule)
    _require(ranks, micro_batches, 0)
    if schedule == "interleaved_1f1b":
        return [list(interleaved_1f1b(ranks, micro_batches, rank, chunks)) for rank in range(ranks)]
    if chunks != 1:
        raise ValueError(f"{chunks} chunks, but {schedule} has 1 on each rank: use interleaved_1f1b")
    return [list(SCHEDULES[schedule](ranks, micro_batches, rank)) for rank in range(ranks)]


def closed_form(schedule: str, ranks: int, micro_batches: int, chunks: int = 1) -> float:
    """Return the idle share of a step, where all stages cost the same and transfers nothing.

    With P ranks, M micro-batches and v chunks, for any ratio of forward to backward: naive (P-1)/P; gpipe, 1f1b
    and interleaved_1f1b (P-1)/(vM+P-1) (Narayanan et al., arXiv:2104.04473, section 2.2, which divides by the
    work, not by the step). zero_bubble, for T_F = T_B = T_W: (P-1)/(3M+P-1), from the bubble
    (P-1)(T_F+T_B-T_W) of Qi et al., arXiv:2401.10241, which ZB-H1 has when T_W is at most T_F and T_B.

    Args:
        schedule: a key of ``SCHEDULES``.
        ranks: P.
        micro_batches: M.
        chunks: v, stages on each rank; 1 except for interleaved_1f1b.

    Returns:
        (step - work) / step, from 0 to 1.

    Raises:
        ValueError: no such schedule, or zero_bubble with M < P, where the weight passes cannot fill the end.

    >>> closed_form("gpipe", 4, 9)
    0.25
    """
    _require_schedule(schedule)
    _require(ranks, micro_batches, 0)
    if schedule == "naive":
        return (ranks - 1) / ranks
    if schedule != "zero_bubble":
        return (ranks - 1) / (chunks * micro_batches + ranks - 1)
    if micro_batches < ranks:
        raise ValueError(
            f"zero_bubble has no closed form for {micro_batches} micro-batches on {ranks} ranks: use {ranks} or more"
        )
    return (ranks - 1) / (3 * micro_batches + ranks - 1)


def deepspeed_1f1b(stages: int, micro_batches: int, stage: int) -> Iterator[Instruction]:
    """1F1B with every load, send and receive, as DeepSpeed's ``TrainSchedule`` orders them.

    A stage sends a result just before its next pass, and receives that pass's input: first out, then in. The
    exception: where a gradient and an activation cross between two stages, both must let the same one go
    first, or each would wait for the other. The gradient does:

        stage s      F(f)  RecvGrad(b)  SendActivation(f)  B(b)
        stage s + 1  B(b)  SendGrad(b)  RecvActivation(f)  F(f)

    They cross when the stage holds as many micro-batches as 1F1B lets it: f - b = P - 1 - s.

    Args:
        stages: the number of stages P, one on each rank.
        micro_batches: the number of micro-batches M.
        stage: whose instructions.

    Yields:
        The stage's full stream; the first and the last stage load, for the last needs the labels.

    Raises:
        ValueError: fewer than one stage or micro-batch, or no such stage.

    >>> [instruction.name for instruction in deepspeed_1f1b(2, 1, 1)][:3]
    ['RecvActivation', 'LoadMicroBatch', 'ForwardPass']
    """
    first, last = stage == 0, stage == stages - 1
    unsent: list[Instruction] = []
    for work in one_f_one_b(stages, micro_batches, stage):
        number = work.micro_batch
        if number is None:
            break
        if work.name == "ForwardPass":
            yield from unsent
            if not first:
                yield Instruction("RecvActivation", stage, number)
            if first or last:
                yield Instruction("LoadMicroBatch", stage, number)
            yield work
            unsent = [] if last else [Instruction("SendActivation", stage, number)]
        else:
            received = [] if last else [Instruction("RecvGrad", stage, number)]
            cross = unsent == [Instruction("SendActivation", stage, number + stages - 1 - stage)]
            yield from received + unsent if cross else unsent + received
            yield work
            unsent = [] if first else [Instruction("SendGrad", stage, number)]
    yield from unsent
    yield Instruction("ReduceTiedGrads", stage, None)
    yield from _end(stage)


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
