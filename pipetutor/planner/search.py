"""The search: closed forms put aside what cannot be best, and the simulator judges the rest.

    every layout --- memory, closed form ---> those that fit --- lower bound ---> played, the shortest bound first

Nothing is lost: a layout is left out only where it does not fit, where the same layout without recomputing fits and
so is faster, or where not even its lower bound comes below what was already played.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from pipetutor.planner.bound import lower_bound
from pipetutor.planner.cluster import Cluster
from pipetutor.planner.layout import PARTS, Choice, Layout
from pipetutor.schedule.formulas import idle_share
from pipetutor.schedule.orders import Instruction
from pipetutor.schedule.simulate import Costs, simulate

__all__ = ["Found", "Misfit", "Problem", "judge", "search"]


class Problem(Protocol):
    """A model on a cluster: which layouts there are, and what they take."""

    @property
    def cluster(self) -> Cluster:
        """What the model lies on."""

    @property
    def batch(self) -> int:
        """Examples of the global batch."""

    @property
    def name(self) -> str:
        """What the model is called."""

    @property
    def flops(self) -> float | None:
        """FLOPs of a step on each device, recomputing not counted; None where costs were measured."""

    def layouts(self) -> Iterator[Layout]:
        """Yield every layout, those that recompute behind those that do not."""

    def bounds(self, layout: Layout) -> tuple[int, ...]:
        """Return the bounds of the stages of the model."""

    def streams(self, layout: Layout) -> Iterator[list[Instruction]]:
        """Return what each rank does."""

    def memory(self, layout: Layout) -> float:
        """Return the bytes that the fullest rank needs."""

    def costs(self, layout: Layout) -> list[Costs]:
        """Return what each stage of the model costs, for each kind of replica."""

    def extra(self, layout: Layout) -> dict[str, float]:
        """Return the seconds of a step, for the mean of the ranks, of recomputing and of sums within layers."""

    def sent(self, layout: Layout) -> float:
        """Return the bytes that a device sends in a step, of the rank that sends the most."""


class Misfit(NamedTuple):
    """A layout that does not fit: of those alike, the one that needs the least bytes."""

    layout: Layout
    memory: float


class Found(NamedTuple):
    """What a search found: choices, the fastest first; misfits; how many layouts there were, and were played."""

    choices: list[Choice]
    misfits: list[Misfit]
    layouts: int
    played: int


def judge(problem: Problem, layout: Layout) -> Choice:
    """Play a layout, whether it fits or not.

    Replicas meet at the end of a step alone, so the slowest of them is the step.
    """
    timelines = (simulate(problem.streams(layout), costs) for costs in problem.costs(layout))
    timeline = max(timelines, key=lambda timeline: timeline.seconds)
    rows = timeline.accounting()
    mean = {column: sum(row[column] for row in rows) / len(rows) for column in rows[0]}
    extra, busy = problem.extra(layout), mean["compute"] + mean["load"] + mean["other"]
    idle, slots = idle_share(layout.schedule, layout.stages, layout.micro_batches, layout.chunks)
    bubble = min(mean["waiting"], busy * idle / (slots - idle))  # of equal stages; the rest is not the schedule's
    parts = {
        "compute": busy - sum(extra.values()),
        **extra,
        "bubble": bubble,
        "waiting": mean["waiting"] - bubble,
        "messages": mean["transfer"],
        "all-reduce": mean["reduce"],
        "optimizer": mean["optimizer"],
    }
    return Choice(
        layout,
        problem.bounds(layout),
        timeline.seconds,
        {part: parts[part] for part in PARTS},
        problem.sent(layout),
        problem.memory(layout),
        problem.flops / timeline.seconds if problem.flops else None,
        problem.name,
    )


def _bound(problem: Problem, layout: Layout) -> float:
    split = layout.schedule == "zero_bubble"
    return max(
        lower_bound(costs, layout.stages, layout.micro_batches, split=split) for costs in problem.costs(layout)
    )


def search(
    problem: Problem, top: int, each: Sequence[str], bound: Callable[[Problem, Layout], float] = _bound
) -> Found:
    """Find the fastest layouts that fit.

    Args:
        problem: what is planned.
        top: how many choices.
        each: fields of a layout by which choices are told apart: of those alike in them, the fastest alone counts.
        bound: seconds than which a layout takes no less.
    """

    def key(layout: Layout) -> tuple[object, ...]:
        return tuple(getattr(layout, name) for name in each)

    limit = problem.cluster.memory
    fitting: list[tuple[float, float, int, Layout]] = []
    least: dict[tuple[object, ...], Misfit] = {}
    without: set[Layout] = set()
    count = 0
    for count, layout in enumerate(problem.layouts(), start=1):
        if layout.recompute and "recompute" not in each and _eager(layout) in without:
            continue
        needed = problem.memory(layout)
        if needed <= limit:
            fitting.append((bound(problem, layout), needed, count, layout))
            without.add(layout)
        elif key(layout) not in least or needed < least[key(layout)].memory:
            least[key(layout)] = Misfit(layout, needed)
    best: dict[tuple[object, ...], Choice] = {}
    played, enough = 0, math.inf
    for seconds, _, _, layout in sorted(fitting):
        if seconds >= enough:
            break
        alike = best.get(key(layout))
        if alike and seconds >= alike.seconds:
            continue
        played += 1
        choice = judge(problem, layout)
        if not alike or _rank(choice) < _rank(alike):
            best[key(layout)] = choice
            ranked = sorted(one.seconds for one in best.values())
            enough = ranked[top - 1] if len(ranked) >= top else math.inf
    fit = {key(layout) for *_, layout in fitting}
    misfits = [misfit for alike, misfit in least.items() if alike not in fit]
    choices = sorted(best.values(), key=_rank)[:top]
    return Found(choices, sorted(misfits, key=lambda one: one.memory), count, played)


def _eager(layout: Layout) -> Layout:
    return replace(layout, recompute=False)


def _rank(choice: Choice) -> tuple[float, float]:
    """Of choices that take as long as each other, the one that needs less memory is better."""
    return choice.seconds, choice.memory
