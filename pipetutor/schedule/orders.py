"""Pipeline schedules as pure data: which instruction a rank runs after which.

A schedule is one stream of instructions for each rank, made by a generator. The checker, the pictures, the
simulator and the tests read the same streams, and what DeepSpeed and torch run is held to them by tests.
Standard library alone: it loads in milliseconds.

A compute stream (``SCHEDULES``) names only the work; transfers happen in the background. A full
stream (``deepspeed_1f1b``) names them too, and a send ends only together with its receive, as with gloo.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = [
    "LOOPED",
    "PARTNERS",
    "SCHEDULES",
    "Instruction",
    "build",
    "deepspeed_1f1b",
    "gpipe",
    "placement_of",
    "stages_a_rank",
]

STEP = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")
PASSES = ("ForwardPass", "BackwardPass", "BackwardInput", "BackwardWeight")
PASS_OF = dict(zip("FBIW", PASSES, strict=True))  # by the letter that stands for it in texts
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
        stage: of the model; the rank that runs a stage holds it. Of what concerns the whole step, the rank's number.
        micro_batch: counted from 0 in each step; None for what concerns the whole step.
    """

    name: str
    stage: int
    micro_batch: int | None = None

    def __str__(self) -> str:
        number = "" if self.micro_batch is None else f" {self.micro_batch}"
        return f"{self.name}{number} of stage {self.stage}"


def require(ranks: int, micro_batches: int, rank: int) -> None:
    """Raise ValueError unless there are such ranks and micro-batches."""
    if ranks < 1 or micro_batches < 1:
        raise ValueError(f"{ranks} ranks and {micro_batches} micro-batches: use at least 1 of each")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks} ranks: use 0 to {ranks - 1}")


def _require_chunks(chunks: int, otherwise: str) -> None:
    if chunks < 2:
        raise ValueError(
            f"chunks is {chunks}, but interleaving needs at least 2 a rank: chunks=2 (--chunks 2), or {otherwise} "
            "for one"
        )


def _require_multiple(ranks: int, micro_batches: int) -> None:
    if micro_batches % ranks:
        raise ValueError(
            f"{micro_batches} micro-batch{'es are' if micro_batches > 1 else ' is'} not a multiple of {ranks} ranks, "
            f"which interleaving needs: use {(micro_batches // ranks + 1) * ranks} micro-batches"
        )


def _require_as_many_as_stages(ranks: int, micro_batches: int) -> None:
    if micro_batches < 2 * ranks:
        raise ValueError(
            f"dualpipev needs as many micro-batches as stages, two for each rank: use {2 * ranks} or more, not "
            f"{micro_batches}, or zbv, which takes any number"
        )


def step_end(rank: int) -> Iterator[Instruction]:
    """Yield what ends a rank's step: gradients are averaged, then the weights change."""
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
    require(ranks, micro_batches, rank)
    for micro_batch in range(micro_batches):
        yield Instruction("ForwardPass", rank, micro_batch)
        yield Instruction("BackwardPass", rank, micro_batch)
    yield from step_end(rank)


def gpipe(ranks: int, micro_batches: int, rank: int) -> Iterator[Instruction]:
    """All forward passes, then all backward passes (Huang et al., arXiv:1811.06965); as ``naive`` otherwise.

    A rank keeps the activations of all M micro-batches.

        F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
        .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
        .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .
    """
    require(ranks, micro_batches, rank)
    for name in ("ForwardPass", "BackwardPass"):
        for micro_batch in range(micro_batches):
            yield Instruction(name, rank, micro_batch)
    yield from step_end(rank)


def _alternate(count: int, warm_up: int) -> Iterator[tuple[bool, int]]:
    """Yield (forward?, number): ``warm_up`` forwards, then forward and backward in turn, then the backwards."""
    for number in range(count + warm_up):
        if number < count:
            yield True, number
        if number >= warm_up:
            yield False, number - warm_up


def one_f_one_b(ranks: int, micro_batches: int, rank: int) -> Iterator[Instruction]:
    """One forward, one backward (Narayanan et al., arXiv:2006.09503, 2104.04473); as ``naive`` otherwise.

    Rank r sends P - r micro-batches ahead, then waits for the first gradient. It could send more, but that would not
    shorten the step, only fill memory.

        F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
        .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
        .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .
    """
    require(ranks, micro_batches, rank)
    for forward, number in _alternate(micro_batches, min(ranks - 1 - rank, micro_batches)):
        yield Instruction("ForwardPass" if forward else "BackwardPass", rank, number)
    yield from step_end(rank)


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
    require(ranks, micro_batches, rank)
    _require_chunks(chunks, "1f1b")
    _require_multiple(ranks, micro_batches)
    count = chunks * micro_batches
    for forward, number in _alternate(count, min((chunks - 1) * ranks + 2 * (ranks - 1 - rank), count)):
        chunk = number // ranks % chunks
        micro_batch = number // (ranks * chunks) * ranks + number % ranks
        if forward:
            yield Instruction("ForwardPass", chunk * ranks + rank, micro_batch)
        else:
            yield Instruction("BackwardPass", (chunks - 1 - chunk) * ranks + rank, micro_batch)
    yield from step_end(rank)


def zero_bubble(ranks: int, micro_batches: int, rank: int) -> Iterator[Instruction]:
    """ZB-H1 (Qi et al., arXiv:2401.10241, section 2.1); as ``naive`` otherwise.

    1F1B, but only the input half of a backward pass, B, is urgent: the rank before waits for it. Rank r keeps
    r weight halves, W, back and fills the end with them. So every rank keeps at most P micro-batches, as many
    as rank 0 of 1F1B.

        F0 F1 F2 .  .  B0 W0 F3 B1 W1 F4 B2 W2 B3 W3 B4 W4
        .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 F4 B3 W2 B4 W3 W4
        .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 F4 B4 W2 W3 W4
    """
    require(ranks, micro_batches, rank)
    for forward, number in _alternate(micro_batches, min(ranks - 1 - rank, micro_batches)):
        yield Instruction("ForwardPass" if forward else "BackwardInput", rank, number)
        if not forward and number >= rank:
            yield Instruction("BackwardWeight", rank, number - rank)
    for number in range(max(micro_batches - rank, 0), micro_batches):
        yield Instruction("BackwardWeight", rank, number)
    yield from step_end(rank)


def looped_bfs(ranks: int, micro_batches: int, rank: int, chunks: int = 2) -> Iterator[Instruction]:
    """Breadth-first (Lamy-Poirier, arXiv:2211.05953): GPipe with several chunks; as ``interleaved_1f1b`` otherwise.

    All micro-batches pass through a rank's first chunk before one goes through its second, and all the way back in
    the opposite order. Where weights or gradients of a stage are spread over replicas, they are put together
    once for all micro-batches and not once for each. A rank keeps all v chunks of all M micro-batches.

        0F0 0F1 0F2 2F0 2F1 2F2 .   .   2B2 2B1 2B0 0B2 0B1 0B0
        .   1F0 1F1 1F2 3F0 3F1 3F2 3B2 3B1 3B0 1B2 1B1 1B0 .

    Raises:
        ValueError: as ``naive``; or fewer than 2 chunks.
    """
    require(ranks, micro_batches, rank)
    _require_chunks(chunks, "gpipe")
    stages = range(rank, ranks * chunks, ranks)
    for stage in stages:
        for micro_batch in range(micro_batches):
            yield Instruction("ForwardPass", stage, micro_batch)
    for stage in reversed(stages):
        for micro_batch in reversed(range(micro_batches)):
            yield Instruction("BackwardPass", stage, micro_batch)
    yield from step_end(rank)


def _in_turn(words: str, stages: tuple[int, int], micro_batches: int) -> Iterator[Instruction]:
    """Yield the passes of a rank with two stages: F1 is the next forward pass of the second of them.

    B is a backward pass, I its input half, W the weight half. Each kind takes micro-batches one after the
    other, and leaves out those that there are not.
    """
    done: Counter[str] = Counter()
    for word in words.split():
        letter, held = word[0], word[1]
        kinds = "IW" if letter == "B" else letter
        number = done[kinds[0] + held]
        if number < micro_batches:
            yield Instruction(PASS_OF[letter], stages[int(held)], number)
        done.update(kind + held for kind in kinds)


def zbv(ranks: int, micro_batches: int, rank: int) -> Iterator[Instruction]:
    """ZB-V (Qi et al., arXiv:2401.10241, section 6, and arXiv:2405.15362); as ``naive`` otherwise.

    Of 2P stages, rank r holds r and 2P - 1 - r: the model goes down the ranks and comes up again. So the first
    gradient is made on rank 0, just where the last forward pass was, and every rank keeps 2P micro-batches of
    stages half as large, which is what rank 0 of 1F1B keeps. Where F, B and W take the same time, no rank waits
    between its first pass and its last.

        0F0 0F1 0F2 3F0 3B0 3W0 3F1 3B1 3W1 0F3 0B0 0W0 3F2 3B2 3W2 0B1 0W1 3F3 3B3 3W3 0B2 0W2 0B3 0W3 .
        .   1F0 2F0 1F1 2F1 2B0 2W0 1F2 1B0 1W0 2F2 2B1 2W1 1F3 1B1 1W1 2F3 2B2 2W2 1B2 2B3 1B3 1W2 2W3 1W3

    With fewer than 2P - 1 micro-batches it is the same order, without those that there are not.
    """
    require(ranks, micro_batches, rank)
    count, below = max(micro_batches, 2 * ranks - 1), ranks - 1 - rank
    words = (
        "F0 " * (2 * below + 1)
        + "F1 F0 " * rank
        + "F1 I1 W1 " * (below + 1)
        + "F0 I0 W0 F1 I1 W1 " * (count - 2 * ranks + 1 + rank)
        + "I0 W0 F1 I1 W1 " * below
        + "I0 I1 " * rank
        + "I0 W0 " * (below + 1)
        + "W1 " * rank
        + "W0 " * rank
    )
    yield from _in_turn(words, (rank, 2 * ranks - 1 - rank), micro_batches)
    yield from step_end(rank)


def dualpipev(ranks: int, micro_batches: int, rank: int) -> Iterator[Instruction]:
    """DualPipeV (DeepSeek's DualPipe, arXiv:2412.19437, cut in half; github.com/deepseek-ai/DualPipe).

    Stages as with ``zbv``, but only the first and the last backward passes are split. In between, a forward pass of
    one stage and a backward pass of the other stand side by side: on a GPU both run at once, and the messages
    that a mixture of experts exchanges within the one hide behind the work of the other. Here they run one
    after the other. Every rank keeps 2P + 1 micro-batches.

        0F0 0F1 0F2 3F0 3B0 3W0 3F1 0F3 3B1 3F2 0B0 0F4 3B2 3F3 0B1 3B3 3F4 0B2 3B4 0B3 0W3 0B4 0W4
        .   1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 1F4 2B2 2F4 1B2 2B3 1B3 2B4 1B4 2W4 1W4

    Args:
        ranks: the number of ranks P.
        micro_batches: M, at least 2P: as many as there are stages.
        rank: whose instructions.

    Raises:
        ValueError: as ``naive``; or fewer than 2P micro-batches.
    """
    require(ranks, micro_batches, rank)
    _require_as_many_as_stages(ranks, micro_batches)
    below = ranks - 1 - rank
    back = ["1", "0"] * (rank + 1)  # the second half of these backward passes is split
    late = back[rank + 1 :] + ["0"] * below  # the weight halves that wait, oldest first
    words = (
        "F0 " * (2 * below)
        + "F0 F1 " * (rank + 1)
        + "I1 W1 F1 " * below
        + "F0 B1 F1 B0 " * (micro_batches - 2 * ranks + rank + 1)
        + "B1 F1 B0 " * below
        + "".join(f"B{held} " for held in back[: rank + 1])
        + "".join(f"I{held} " for held in back[rank + 1 :])
        + "".join(f"W{held} I0 " for held in late[:below])
        + "".join(f"W{held} " for held in late[below:])
    )
    yield from _in_turn(words, (rank, 2 * ranks - 1 - rank), micro_batches)
    yield from step_end(rank)


SCHEDULES: dict[str, Callable[..., Iterator[Instruction]]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "zero_bubble": zero_bubble,
    "looped_bfs": looped_bfs,
    "zbv": zbv,
    "dualpipev": dualpipev,
}
LOOPED = ("interleaved_1f1b", "looped_bfs")  # rank r holds the stages r, r + P, r + 2P, ...
V_SHAPED = ("zbv", "dualpipev")  # rank r holds the stages r and 2P - 1 - r


def stages_a_rank(schedule: str, chunks: int = 1) -> int:
    """Return how many stages of the model each rank holds: two in V shapes, else as many as there are chunks.

    >>> stages_a_rank("zbv"), stages_a_rank("looped_bfs", 3)
    (2, 3)
    """
    return 2 if schedule in V_SHAPED else chunks


def placement_of(schedule: str, ranks: int, chunks: int = 1) -> tuple[int, ...]:
    """Return the rank that holds each stage of the model, whatever the number of micro-batches.

    >>> placement_of("looped_bfs", 2, 2), placement_of("zbv", 2)
    ((0, 1, 0, 1), (0, 1, 1, 0))
    """
    down = tuple(range(ranks))
    return down + down[::-1] if schedule in V_SHAPED else down * chunks


def require_schedule(schedule: str, ranks: int, micro_batches: int, chunks: int) -> None:
    """Raise ValueError unless there is such a schedule for as many ranks, micro-batches and chunks."""
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: use {', '.join(SCHEDULES)}")
    require(ranks, micro_batches, 0)
    if schedule in LOOPED:
        _require_chunks(chunks, "1f1b" if schedule == "interleaved_1f1b" else "gpipe")
    elif schedule in V_SHAPED and chunks not in (1, 2):
        raise ValueError(f"{chunks} chunks, but {schedule} has always 2 on each rank: leave chunks out")
    elif schedule not in V_SHAPED and chunks != 1:
        raise ValueError(f"{chunks} chunks, but {schedule} has 1 on each rank: use {' or '.join(LOOPED)}")
    if schedule == "interleaved_1f1b":
        _require_multiple(ranks, micro_batches)
    if schedule == "dualpipev":
        _require_as_many_as_stages(ranks, micro_batches)


def build(schedule: str, ranks: int, micro_batches: int, chunks: int = 1) -> list[list[Instruction]]:
    """Return the streams of all ranks.

    Args:
        schedule: a key of ``SCHEDULES``.
        ranks: the number of ranks P.
        micro_batches: the number of micro-batches M.
        chunks: stages on each rank; more than 1 for ``LOOPED`` alone. ``V_SHAPED`` have 2, which need not be said.

    Returns:
        One list of instructions for each rank.

    Raises:
        ValueError: no such schedule, or numbers that it does not take.

    >>> len(build("1f1b", 4, 8))
    4
    """
    require_schedule(schedule, ranks, micro_batches, chunks)
    about = (chunks,) if schedule in LOOPED else ()
    return [list(SCHEDULES[schedule](ranks, micro_batches, rank, *about)) for rank in range(ranks)]


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
    yield from step_end(stage)
