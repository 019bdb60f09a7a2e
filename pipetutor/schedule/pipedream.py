"""1F1B without a flush, as PipeDream had it first: no bubble, but gradients of weights that are there no more.

For the simulator alone: ``rules.check`` refuses it, and says why. What would have to be kept for each backward pass
to find the weights of its forward pass is counted here. Standard library alone.
"""

from collections.abc import Iterable, Iterator

from pipetutor.schedule.orders import Instruction, one_f_one_b

__all__ = ["pipedream", "staleness", "versions"]


def pipedream(ranks: int, micro_batches: int, rank: int) -> Iterator[Instruction]:
    """Asynchronous 1F1B (Harlap, Narayanan et al., arXiv:1806.03377): the weights change after each backward pass.

    Nobody waits for the end of a step, for there is none: the bubble is that of one step of all micro-batches there
    will ever be, (P-1)/(M+P-1), and 1F1B's is that of the M micro-batches between two flushes. Below, rank 0 has
    seen B0 when it comes to B1, but F1 before: its gradient is of weights that have changed since.

        F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 .  B4 .  B5
        .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 .  B5 .
        .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 .  .

    Args:
        ranks: the number of ranks P.
        micro_batches: of the whole training.
        rank: whose instructions.

    Yields:
        The rank's compute, with an ``OptimizerStep`` behind each backward pass.

    Raises:
        ValueError: fewer than one rank or micro-batch, or no such rank.

    >>> [instruction.name for instruction in pipedream(1, 1, 0)]
    ['ForwardPass', 'BackwardPass', 'OptimizerStep']
    """
    for instruction in one_f_one_b(ranks, micro_batches, rank):
        if instruction.micro_batch is not None:
            yield instruction
        if instruction.name == "BackwardPass":
            yield Instruction("OptimizerStep", rank)


def _updates(stream: Iterable[Instruction]) -> Iterator[tuple[int, dict[tuple[int, int], int]]]:
    """Yield ahead of each pass how often the rank's weights have changed, and had for each micro-batch in flight."""
    changed = 0
    forward: dict[tuple[int, int], int] = {}
    for name, stage, micro_batch in stream:
        if micro_batch is None:
            changed += name == "OptimizerStep"
            continue
        if name == "ForwardPass":
            forward[stage, micro_batch] = changed
        yield changed, forward
        if name in ("BackwardPass", "BackwardWeight"):
            del forward[stage, micro_batch]


def staleness(streams: Iterable[Iterable[Instruction]]) -> list[int]:
    """Return how often, at most, each rank's weights change between a forward pass and its backward pass.

    0 for whatever ends a step with a flush. In PipeDream P - 1 - r on rank r, and so many updates late is its
    gradient: w(t+1) = w(t) - lr * gradient(w of rank 0 at t - P + 1, ..., w of rank P - 1 at t).

    >>> staleness([list(pipedream(4, 9, rank)) for rank in range(4)])
    [3, 2, 1, 0]
    """
    return [max(now - min(then.values()) for now, then in _updates(stream)) for stream in streams]


def versions(streams: Iterable[Iterable[Instruction]]) -> list[int]:
    """Return how many versions of its weights each rank has to keep ("weight stashing"), the newest among them.

    So each backward pass finds the weights of its forward pass. In PipeDream that is one for each micro-batch in
    flight, P - r on rank r; with a flush it is one.

    >>> versions([list(pipedream(4, 9, rank)) for rank in range(4)])
    [4, 3, 2, 1]
    """
    return [max(len({now, *then.values()}) for now, then in _updates(stream)) for stream in streams]
