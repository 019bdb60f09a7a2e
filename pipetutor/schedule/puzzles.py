"""Puzzles: finish so many micro-batches on so many ranks in so many slots; a schedule is the answer.

A schedule is graded by the checker and by the simulator, never by a clock: what it comes to is the same on every
machine. Each par is reached by a schedule of ``tests/schedule/test_puzzles.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipetutor.schedule.rules import ScheduleError, check, form_of
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.text import streams_of
from pipetutor.schedule.timeline import peak_live

__all__ = ["PUZZLES", "Puzzle", "Score", "grade"]


@dataclass(frozen=True)
class Puzzle:
    """A task for a schedule.

    Attributes:
        name: a key of ``PUZZLES``.
        task: what is to be done, in a sentence or two.
        micro_batches: M.
        placement: the rank of each stage of the model.
        costs: in slots, for each stage.
        par: slots in which it can be done.
        cap: micro-batches that a rank may have in flight, over all of its stages; None for any number.
        split: whether a backward pass may be split in two.
    """

    name: str
    task: str
    micro_batches: int
    placement: tuple[int, ...]
    costs: Costs
    par: float
    cap: int | None = None
    split: bool = False

    @property
    def ranks(self) -> int:
        """Number of ranks P."""
        return max(self.placement) + 1


@dataclass(frozen=True)
class Score:
    """What a schedule comes to.

    Attributes:
        slots: length of the step; None where the schedule does not run.
        bubble: share of the step that a rank waits, on average; None as before.
        peak: the most micro-batches that a rank has in flight; None as before.
        solved: within par and cap.
        reason: what is missing; empty where it is solved.
    """

    slots: float | None
    bubble: float | None
    peak: int | None
    solved: bool
    reason: str

    def __str__(self) -> str:
        if self.slots is None:
            return self.reason
        found = f"{self.slots:g} slots, of which a rank waits {self.bubble:.0%}, with at most {self.peak} in flight"
        return f"{found}: {self.reason or 'solved'}"


def _slots(forward: Sequence[float], link: Sequence[float] = (), split: bool = False) -> Costs:
    """Return costs in slots: a backward pass is as long as a forward pass, or each half of it is."""
    half = [seconds if split else seconds / 2 for seconds in forward]
    ones = [1.0] * len(forward)
    return Costs(forward, half, half, activation_bytes=ones, message_bytes=link, bandwidth=1.0)


PUZZLES = {
    puzzle.name: puzzle
    for puzzle in (
        Puzzle(
            "twelve slots",
            "Take four micro-batches forward and back through three ranks in 12 slots.",
            micro_batches=4,
            placement=(0, 1, 2),
            costs=_slots([1.0] * 3),
            par=12,
        ),
        Puzzle(
            "three in flight",
            "The same in 12 slots, but no rank has memory for more than three micro-batches in flight.",
            micro_batches=4,
            placement=(0, 1, 2),
            costs=_slots([1.0] * 3),
            par=12,
            cap=3,
        ),
        Puzzle(
            "two chunks",
            "Two ranks hold two chunks of the model each: stages 0 and 2, stages 1 and 3. A pass over a chunk takes "
            "one slot. Finish four micro-batches in 18.",
            micro_batches=4,
            placement=(0, 1, 0, 1),
            costs=_slots([1.0] * 4),
            par=18,
        ),
        Puzzle(
            "a V",
            "The model goes down the ranks and comes up again: rank 0 holds stages 0 and 3, rank 1 holds 1 and 2. "
            "Each pass takes one slot. Finish four micro-batches in 18, with at most four in flight on a rank.",
            micro_batches=4,
            placement=(0, 1, 1, 0),
            costs=_slots([1.0] * 4),
            par=18,
            cap=4,
        ),
        Puzzle(
            "beat 1F1B",
            "A backward pass may be split: I makes the gradient of the stage's input, W that of its weights, one "
            "slot each. 1F1B takes 21 slots for five micro-batches on three ranks. Take 17, with no more than its "
            "three in flight.",
            micro_batches=5,
            placement=(0, 1, 2),
            costs=_slots([1.0] * 3, split=True),
            par=17,
            cap=3,
            split=True,
        ),
        Puzzle(
            "a slow stage",
            "The stage in the middle takes two slots for each pass. 1F1B needs 18 slots for four micro-batches, and "
            "has three in flight. Do it in 18 with two.",
            micro_batches=4,
            placement=(0, 1, 2),
            costs=_slots([1.0, 2.0, 1.0]),
            par=18,
            cap=2,
        ),
        Puzzle(
            "a slow link",
            "The link between ranks 1 and 2 takes two slots for a message, in each direction. 1F1B needs 20 slots "
            "for four micro-batches, and GPipe 22. Do it in 16.",
            micro_batches=4,
            placement=(0, 1, 2),
            costs=_slots([1.0] * 3, link=[0.0, 2.0]),
            par=16,
        ),
    )
}


def grade(puzzle: Puzzle, schedule: Any) -> Score:
    """Say what a schedule comes to, and what it lacks.

    Args:
        puzzle: one of ``PUZZLES``.
        schedule: see ``pipetutor.schedule.text.streams_of``.

    Returns:
        The score; that of a schedule that does not run has the reason alone.

    Raises:
        ValueError: that is no puzzle.

    >>> print(grade(PUZZLES["twelve slots"], 3 * ["F0 B0 F1 B1 F2 B2 F3 B3"]))
    24 slots, of which a rank waits 67%, with at most 1 in flight: 12 are possible
    """
    if not isinstance(puzzle, Puzzle):
        raise ValueError(f"grade({puzzle!r:.40}, ...): give a puzzle, such as PUZZLES['twelve slots']")
    if isinstance(schedule, str) and not schedule.strip(" .\n"):
        return Score(None, None, None, False, "nothing is placed yet")
    try:
        streams = streams_of(schedule, puzzle.ranks, puzzle.micro_batches)
        check(streams)
    except ScheduleError as error:
        return Score(None, None, None, False, str(error))
    form, wanted = form_of(streams), puzzle.placement
    found, reason = form.holders, ""
    if form.micro_batches != puzzle.micro_batches:
        reason = f"micro-batches: it has {form.micro_batches}, and {puzzle.micro_batches} are wanted"
    elif form.stages > len(wanted):
        reason = f"stages: it has {form.stages}, and {len(wanted)} are wanted"
    elif found != wanted:
        stage = next(s for s in range(len(wanted)) if found[s : s + 1] != wanted[s : s + 1])
        reason = (
            f"the ranks of its stages are {found}, and should be {wanted}: {stage}F0, say, is on stage {stage} "
            f"and belongs to the row of rank {wanted[stage]}"
        )
    elif not puzzle.split and any(one.name == "BackwardInput" for stream in streams for one in stream):
        reason = "it splits backward passes, and here they are whole: B, not I and W"
    if reason:
        return Score(None, None, None, False, reason)
    played = simulate(streams, puzzle.costs)
    peak = max(each.micro_batches for each in peak_live(played))
    if puzzle.cap is not None and peak > puzzle.cap:
        reason = f"{puzzle.cap} are allowed"
    elif played.seconds > puzzle.par:
        reason = f"{puzzle.par:g} are possible"
    return Score(played.seconds, played.bubble, peak, not reason, reason)
