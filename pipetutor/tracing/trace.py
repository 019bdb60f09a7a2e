"""A run's trace, read back: what all ranks recorded, put together as timelines.

How much of a Send or a Recv is waiting is known once all ranks are read. A Send waits until the other end has come
to its Recv; a blocking one that was over before was taken in by a buffer, and has not waited. A Recv waits until its
message can leave: until the other end has come to the Send (DeepSpeed's calls block), or has computed it (torch's
pipelines send in the background). What comes after is called transfer. It is as good as that: it holds the copies at
both ends, and what the operating system does in between.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipetutor.core.records import Run, read_lines
from pipetutor.schedule.orders import PARTNERS
from pipetutor.schedule.timeline import CODE, KINDS, SPAN, Timeline

__all__ = ["Step", "Trace", "load"]


class Step(NamedTuple):
    """One step of all ranks.

    Attributes:
        number: counted from 1.
        timeline: what every rank did.
        memory: the bytes that each rank had in memory when it began.
        peaks: the most that each had since.
    """

    number: int
    timeline: Timeline
    memory: list[int]
    peaks: list[int]


@dataclass(frozen=True)
class Trace:
    """What a run's ranks did, step by step.

    Attributes:
        heads: what each rank says of itself: its number, replica, device and ``clock_offset`` in seconds, and the
            bytes of its tensors ``without_model`` and ``with_model``, before the first step. On a CPU the memory of
            its steps is what is in use only where glibc ``returns_blocks`` that are freed; see ``costs.memory``.
        steps: every step that all ranks have completed.
    """

    heads: list[dict[str, Any]]
    steps: list[Step]

    @property
    def typical(self) -> Step:
        """The step of median length; not the first, in which memory is allocated and shapes are agreed on."""
        later = sorted(self.steps[1:] or self.steps, key=lambda step: step.timeline.seconds)
        return later[(len(later) - 1) // 2]


def load(run: Run | str | Path) -> Trace:
    """Read the trace of a run, or what there is of it so far.

    Args:
        run: a run, or its directory.

    Returns:
        The timelines of its steps, waiting told apart from transfer.

    Raises:
        ValueError: the run was not traced, or no step was completed.

    >>> load(run).typical.timeline.accounting()  # doctest: +SKIP
    """
    directory = run.directory if isinstance(run, Run) else Path(run)
    paths = sorted(directory.glob("trace_rank*.jsonl"), key=lambda path: int(path.stem[10:]))
    files = [list(read_lines(path)) for path in paths]
    if not files or not all(len(lines) > 1 for lines in files):
        raise ValueError(f"{directory} holds no traced step: launch the run with trace=True (--trace)")
    heads = [lines[0] for lines in files]
    steps = []
    for of_ranks in zip(*(lines[1:] for lines in files), strict=False):
        spans = np.array(list(_rows(heads, of_ranks)), dtype=SPAN)
        groups = {
            (head["rank"], CODE[name]): tuple(members)
            for head, step in zip(heads, of_ranks, strict=True)
            for name, members in step.get("groups", {}).items()
        }
        spans["waiting"] = _waiting(spans, heads[0]["blocking"], _joined(groups))
        begin, end = min(step["begin"] for step in of_ranks), max(step["end"] for step in of_ranks)
        timeline = Timeline(spans, begin, end)
        memory, peaks = ([step[which] for step in of_ranks] for which in ("memory", "peak"))
        steps.append(Step(of_ranks[0]["step"], timeline, memory, peaks))
    return Trace(heads, steps)


def _rows(heads: Sequence[Any], steps: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    for head, step in zip(heads, steps, strict=True):
        for name, stage, micro_batch, begin, end, memory in step["spans"]:
            yield head["rank"], stage, head["replica"], CODE[name], micro_batch, begin, end, 0.0, memory


def by_place(spans: np.ndarray) -> dict[tuple[str, int, int, int], np.ndarray]:
    """Return each span under its name, stage, replica and micro-batch."""
    return {(KINDS[s["kind"]], s["stage"], s["replica"], s["micro_batch"]): s for s in spans}


def waits_for(span: np.ndarray, place: dict[Any, np.ndarray], blocking: bool) -> tuple[np.ndarray, float] | None:
    """Return what a Send or Recv waits for, and until when: its other end, or the pass that computes the message."""
    name, direction = PARTNERS[KINDS[span["kind"]]]
    where = span["stage"] + direction, span["replica"], span["micro_batch"]
    if blocking or name.startswith("Recv"):
        other = place.get((name, *where))
        return None if other is None else (other, float(other["begin"]))
    passes = ("ForwardPass",) if name == "SendActivation" else ("BackwardInput", "BackwardPass")
    made = next((place[found, *where] for found in passes if (found, *where) in place), None)
    return None if made is None else (made, float(made["end"]))


def _waiting(spans: np.ndarray, blocking: bool, groups: Mapping[tuple[int, int], tuple[int, ...]]) -> np.ndarray:
    """Return the seconds that each span spent waiting for another rank.

    Args:
        spans: of a step.
        blocking: whether sends and receives are calls that return once the message is there.
        groups: the ranks that (rank, kind) takes part with, where they follow from neither stage nor replica.

    stage 0:  SendActivation |--- waiting ---|-- transfer --|
    stage 1:    ForwardPass ...............| RecvActivation |
    """
    place = by_place(spans)
    together: dict[tuple[Any, ...], float] = {}  # when the last rank came to a collective
    for span in spans:
        if key := _group(span, groups):
            together[key] = max(together.get(key, span["begin"]), span["begin"])
    waiting = np.zeros(len(spans))
    for index, span in enumerate(spans):
        name, ready = KINDS[span["kind"]], span["begin"]
        if name in PARTNERS:
            awaited = waits_for(span, place, blocking)
            buffered = blocking and awaited is not None and awaited[1] > span["end"]
            if awaited is not None and not buffered:
                ready = awaited[1]
        elif key := _group(span, groups):
            ready = together[key]
        waiting[index] = min(max(ready - span["begin"], 0.0), span["end"] - span["begin"])
    return waiting


def _joined(groups: Mapping[tuple[int, int], tuple[int, ...]]) -> dict[tuple[int, int], tuple[int, ...]]:
    """Join what overlaps: with ZeRO a rank asks its replicas and its stages, which ask theirs, so it waits for all.

    >>> _joined({(0, 9): (0, 1), (1, 9): (0, 1, 2), (2, 9): (1, 2), (3, 9): (3, 4), (4, 9): (3, 4)})[0, 9]
    (0, 1, 2)
    """
    found = {}
    for rank, kind in groups:
        members, size = {rank}, 0
        while size < len(members):
            size = len(members)
            members |= {other for one in members for other in groups.get((one, kind), ())}
        found[rank, kind] = tuple(sorted(members))
    return found


def _group(span: np.ndarray, groups: Mapping[tuple[int, int], tuple[int, ...]]) -> tuple[Any, ...]:
    """Return what the ranks of one collective have in common; nothing where a span is none.

    Replicas of a stage reduce gradients, stages share a loss; who has a copy of tied weights, or takes the norm of
    gradients with others, has been noted.
    """
    kind, rank = int(span["kind"]), int(span["rank"])
    if KINDS[kind] == "ReduceGrads":
        return kind, int(span["stage"])
    if KINDS[kind] == "AggregateLoss":
        return (kind,)
    return (kind, *groups[rank, kind]) if (rank, kind) in groups else ()
