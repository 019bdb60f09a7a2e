"""How large the bubble is when all stages cost the same: the closed forms of the papers. Standard library alone."""

from pipetutor.schedules import require_schedule

FORMULAS = {
    "naive": "(P-1)/P",
    "gpipe": "(P-1)/(M+P-1)",
    "1f1b": "(P-1)/(M+P-1)",
    "interleaved_1f1b": "(P-1)/(vM+P-1)",
    "zero_bubble": "(P-1)/(3M+P-1)",
}


def idle_share(schedule: str, ranks: int, micro_batches: int, chunks: int = 1) -> tuple[int, int]:
    """Return how many of how many slots of a step a rank idles, where all stages cost the same and transfers nothing.

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
        Numerator and denominator of the formula.

    Raises:
        ValueError: no such schedule, or numbers that it does not take; zero_bubble with M < P, where the weight
            passes cannot fill the end.

    >>> idle_share("gpipe", 4, 9)
    (3, 12)
    """
    require_schedule(schedule, ranks, micro_batches, chunks)
    if schedule == "naive":
        return ranks - 1, ranks
    if schedule != "zero_bubble":
        return ranks - 1, chunks * micro_batches + ranks - 1
    if micro_batches < ranks:
        raise ValueError(
            f"zero_bubble has no closed form for {micro_batches} micro-batches on {ranks} ranks: use {ranks} or more"
        )
    return ranks - 1, 3 * micro_batches + ranks - 1


def closed_form(schedule: str, ranks: int, micro_batches: int, chunks: int = 1) -> float:
    """Return ``idle_share`` as a number from 0 to 1.

    >>> closed_form("gpipe", 4, 9)
    0.25
    """
    idle, slots = idle_share(schedule, ranks, micro_batches, chunks)
    return idle / slots
