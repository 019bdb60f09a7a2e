"""How large the bubble is when all stages cost the same: the closed forms that the simulator is held to by tests.

Standard library alone.
"""

from pipetutor.schedule.orders import require_schedule, stages_a_rank

__all__ = ["FORMULAS", "closed_form", "idle_share"]

FORMULAS = {
    "naive": "(P-1)/P",
    "gpipe": "(P-1)/(M+P-1)",
    "1f1b": "(P-1)/(M+P-1)",
    "interleaved_1f1b": "(P-1)/(vM+P-1)",
    "zero_bubble": "(P-1)/(3M+P-1)",
    "looped_bfs": "(P-1)/(vM+P-1)",
    "zbv": "(P-1)/(6M+P-1)",
    "dualpipev": "(P-1)/(6M+P-1)",
}


def _require_enough(schedule: str, ranks: int, micro_batches: int, enough: int) -> None:
    if micro_batches < enough:
        raise ValueError(
            f"{schedule} has no closed form for {micro_batches} micro-batch{'es' if micro_batches > 1 else ''} on "
            f"{ranks} ranks: use {enough} or more"
        )


def idle_share(schedule: str, ranks: int, micro_batches: int, chunks: int = 1) -> tuple[int, int]:
    """Return how many of how many slots of a step a rank idles, where all stages cost the same and transfers nothing.

    With P ranks, M micro-batches and v chunks, for any ratio of forward to backward: naive (P-1)/P; gpipe, 1f1b,
    interleaved_1f1b and looped_bfs (P-1)/(vM+P-1) (Narayanan et al., arXiv:2104.04473, section 2.2, and
    Lamy-Poirier, arXiv:2211.05953, which divide by the work, not by the step).

    For T_F = T_B = T_W, which those who split backward passes assume: zero_bubble (P-1)/(3M+P-1), from the bubble
    (P-1)(T_F+T_B-T_W) of Qi et al., arXiv:2401.10241, which ZB-H1 has when T_W is at most T_F and T_B; zbv and
    dualpipev (P-1)/(6M+P-1), in slots half as long, for a stage is half as large. DeepSeek's figure for dualpipev,
    (P-1)(F&B+B-3W) with B for both halves, is that of a rank that runs a forward and a backward pass at once, and
    has neither result before both have ended.

    Args:
        schedule: a key of ``SCHEDULES``.
        ranks: P.
        micro_batches: M.
        chunks: v, stages on each rank; see ``build``.

    Returns:
        Numerator and denominator of the formula.

    Raises:
        ValueError: no such schedule, or numbers that it does not take; or too few micro-batches to fill what is to be
            filled: zero_bubble and looped_bfs with M < P, zbv with M < 2P - 1.

    >>> idle_share("gpipe", 4, 9)
    (3, 12)
    """
    require_schedule(schedule, ranks, micro_batches, chunks)
    if schedule == "naive":
        return ranks - 1, ranks
    if schedule in ("zero_bubble", "looped_bfs", "zbv"):
        _require_enough(schedule, ranks, micro_batches, 2 * ranks - 1 if schedule == "zbv" else ranks)
    passes = 3 if schedule in ("zero_bubble", "zbv", "dualpipev") else 1  # of a micro-batch on a stage, in slots
    return ranks - 1, passes * stages_a_rank(schedule, chunks) * micro_batches + ranks - 1


def closed_form(schedule: str, ranks: int, micro_batches: int, chunks: int = 1) -> float:
    """Return ``idle_share`` as a number from 0 to 1.

    >>> closed_form("gpipe", 4, 9)
    0.25
    """
    idle, slots = idle_share(schedule, ranks, micro_batches, chunks)
    return idle / slots
