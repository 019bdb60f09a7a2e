"""The engine's own instructions, timed on every rank, and put together as timelines.

    runs/20261124-101502-p2r1/
        trace_rank0.jsonl    who the rank is, then a line a step: every instruction, when it began and ended
        trace.json           the same of all ranks, for https://ui.perfetto.dev or chrome://tracing

A rank notes two times and its memory for each instruction, and writes them once the step is over. Whose times
and memory these are is in ``pipetutor.tracing.clock``.

How much of a Send or a Recv is waiting is known once all ranks are read. A Send waits until the other end has come
to its Recv; a blocking one that was over before was taken in by a buffer, and has not waited. A Recv waits until its
message can leave: until the other end has come to the Send (DeepSpeed's calls block), or has computed it (torch's
pipelines send in the background). What comes after is called transfer. It is as good as that: it holds the copies at
both ends, and what the operating system does in between.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipetutor.core.observer import Observer
from pipetutor.core.records import Run, append, read_lines, to_json
from pipetutor.schedule.orders import PARTNERS, Instruction
from pipetutor.schedule.timeline import CATEGORIES, CODE, KINDS, SPAN, Timeline
from pipetutor.tracing.clock import CudaClock, HostClock, clock_offset

__all__ = ["Recorder", "Step", "Trace", "load", "write_chrome"]

# What "waiting" means in a trace, by whether its engine sends and receives with blocking calls.
WAITING = {
    True: "until the other end has come to the message; the rest of a Send or Recv is transfer, copies included",
    False: "of a Send until the other end has come to its Recv, of a Recv until the message has been computed; "
    "the rest is transfer, as far as a rank stood still for it",
}


class Recorder(Observer):
    """Times what one rank does in each step of training.

    A new instruction ends the one before it, so spans never overlap, where an engine calls one thing from within
    another, too.
    """

    starts_together = True  # no rank is still busy with the step before

    def __init__(self, directory: Path, rank: int, device: Any):
        self._directory = directory
        self._path = directory / f"trace_rank{rank}.jsonl"
        self._clock: Any = CudaClock() if device.type == "cuda" else HostClock()
        self._head = {"rank": rank, "device": str(device), "without_model": self._clock.tensors()}
        self._head["returns_blocks"] = device.type == "cuda" or "MALLOC_MMAP_THRESHOLD_" in os.environ
        self._offset = clock_offset(device)
        self._spans: list[tuple[Any, ...]] | None = None
        self._open: tuple[str, int, int, Any] | None = None

    def built(self, engine: Any) -> None:
        """Begin the file."""
        head = self._head | {"replica": engine.replica, "blocking": engine.blocking, "clock_offset": self._offset}
        self._path.write_text(to_json(head | {"with_model": self._clock.tensors()}) + "\n")

    def begin(self, step: int) -> None:
        """Start recording a step."""
        self._clock.start()
        self._memory = self._clock.memory()
        self._spans, self._begin = [], self._clock.now()

    def before(self, instruction: Instruction) -> None:
        """Note that an instruction begins; outside of a step nothing is noted."""
        if self._spans is None:
            return
        name, stage, micro_batch, _ = instruction
        now = self._clock.now()
        if self._open:
            self._close(now)
        self._open = name, stage, -1 if micro_batch is None else micro_batch, now

    def after(self) -> None:
        """Note that it has ended."""
        if self._open:
            self._close(self._clock.now())

    def _close(self, now: Any) -> None:
        assert self._open and self._spans is not None
        self._spans.append((*self._open, now, self._clock.memory()))
        self._open = None

    def end(self, step: int) -> None:
        """Write the step that was recorded."""
        self.after()
        assert self._spans is not None
        spans, self._spans = self._spans, None
        begin, end = self._seconds(self._begin), self._seconds(self._clock.now())
        times = [(*span[:3], self._seconds(span[3]), self._seconds(span[4]), span[5]) for span in spans]
        memory = {"memory": self._memory, "peak": self._clock.peak()}
        line = {"step": step, "begin": begin, "end": end, **memory, "spans": times}
        append(self._path, line)

    def trained(self) -> None:
        """Write all ranks' steps for Perfetto, on the first of them."""
        import torch.distributed as dist

        dist.barrier()  # the other ranks have written their last step
        if self._head["rank"] == 0:
            print(f"trace: {write_chrome(self._directory)}, for https://ui.perfetto.dev", flush=True)

    def _seconds(self, mark: Any) -> float:
        return round(self._clock.seconds(mark) + self._offset, 7)


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
        spans["waiting"] = _waiting(spans, heads[0]["blocking"])
        begin, end = min(step["begin"] for step in of_ranks), max(step["end"] for step in of_ranks)
        timeline = Timeline(spans, begin, end)
        memory, peaks = ([step[which] for step in of_ranks] for which in ("memory", "peak"))
        steps.append(Step(of_ranks[0]["step"], timeline, memory, peaks))
    return Trace(heads, steps)


def _rows(heads: Sequence[Any], steps: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    for head, step in zip(heads, steps, strict=True):
        for name, stage, micro_batch, begin, end, memory in step["spans"]:
            yield head["rank"], stage, head["replica"], CODE[name], micro_batch, begin, end, 0.0, memory


def _by_place(spans: np.ndarray) -> dict[tuple[str, int, int, int], np.ndarray]:
    return {(KINDS[s["kind"]], s["stage"], s["replica"], s["micro_batch"]): s for s in spans}


def _awaited(span: np.ndarray, place: dict[Any, np.ndarray], blocking: bool) -> tuple[np.ndarray, float] | None:
    """Return what a Send or Recv waits for, and until when: its other end, or the pass that computes the message."""
    name, direction = PARTNERS[KINDS[span["kind"]]]
    where = span["stage"] + direction, span["replica"], span["micro_batch"]
    if blocking or name.startswith("Recv"):
        other = place.get((name, *where))
        return None if other is None else (other, float(other["begin"]))
    passes = ("ForwardPass",) if name == "SendActivation" else ("BackwardInput", "BackwardPass")
    made = next((place[found, *where] for found in passes if (found, *where) in place), None)
    return None if made is None else (made, float(made["end"]))


def _waiting(spans: np.ndarray, blocking: bool) -> np.ndarray:
    """Return the seconds that each span spent waiting for another rank.

    stage 0:  SendActivation |--- waiting ---|-- transfer --|
    stage 1:    ForwardPass ...............| RecvActivation |
    """
    place = _by_place(spans)
    together: dict[tuple[int, int], float] = {}  # when the last rank came to a collective
    for span in spans:
        if KINDS[span["kind"]] in ("ReduceGrads", "AggregateLoss"):
            key = _group(span)
            together[key] = max(together.get(key, span["begin"]), span["begin"])
    waiting = np.zeros(len(spans))
    for index, span in enumerate(spans):
        name, ready = KINDS[span["kind"]], span["begin"]
        if name in PARTNERS:
            awaited = _awaited(span, place, blocking)
            buffered = blocking and awaited is not None and awaited[1] > span["end"]
            if awaited is not None and not buffered:
                ready = awaited[1]
        elif _group(span) in together:
            ready = together[_group(span)]
        waiting[index] = min(max(ready - span["begin"], 0.0), span["end"] - span["begin"])
    return waiting


def _group(span: np.ndarray) -> tuple[int, int]:
    """Return what the ranks of one collective have in common: replicas of a stage reduce, stages share a loss."""
    reduces = KINDS[span["kind"]] == "ReduceGrads"
    return int(span["kind"]), int(span["stage"]) if reduces else -1


def write_chrome(directory: Path) -> Path:
    """Write a run's trace as Chrome trace events, for Perfetto and chrome://tracing.

    A replica is a process there and a rank a thread. Waiting is a slice within its instruction, a message an
    arrow from Send to Recv, and memory a counter.

    Args:
        directory: of the run.

    Returns:
        The file, ``trace.json``. Its format: Chrome's "Trace Event Format", JSON object form; times in microseconds.

    Raises:
        ValueError: see ``load``.
    """
    events: list[dict[str, Any]] = []
    known = set()
    trace = load(directory)
    origin = trace.steps[0].timeline.begin
    blocking = trace.heads[0]["blocking"]
    for step in trace.steps:
        place = _by_place(step.timeline.spans)
        for span in step.timeline.spans:
            name = KINDS[span["kind"]]
            rank, replica, stage, micro_batch = (int(span[c]) for c in ("rank", "replica", "stage", "micro_batch"))
            where = {"pid": replica, "tid": rank}
            if rank not in known:
                known.add(rank)
                events.append(_named("process_name", f"replica {replica}", where))
                events.append(_named("thread_name", f"rank {rank}", where))
            begin, lasts = 1e6 * (span["begin"] - origin), 1e6 * (span["end"] - span["begin"])
            args = {"step": step.number, "stage": stage, "micro_batch": None if micro_batch < 0 else micro_batch}
            slices = {"ph": "X", "cat": CATEGORIES[name], "ts": begin, **where, "args": args}
            title = name if micro_batch < 0 else f"{name} {micro_batch}"
            events.append(slices | {"name": title, "dur": lasts})
            if span["waiting"] > 0:
                events.append(slices | {"name": "waiting", "cat": "waiting", "dur": 1e6 * span["waiting"]})
            sender = _awaited(span, place, blocking) if name.startswith("Recv") else None
            if sender is not None:
                leaves, arrives = _ends(sender[0], span, blocking)
                arrow = {"name": name[4:], "cat": "message", "id": len(events), "pid": replica}
                events.append(arrow | {"ph": "s", "ts": 1e6 * (leaves - origin), "tid": int(sender[0]["rank"])})
                events.append(arrow | {"ph": "f", "bp": "e", "ts": 1e6 * (arrives - origin), "tid": rank})
            counter = {"ph": "C", "name": f"memory of rank {rank}", "ts": begin + lasts, "pid": replica}
            events.append(counter | {"args": {"MB": float(span["memory"]) / 1e6}})
    path = directory / "trace.json"
    about = {"waiting": WAITING[blocking], "devices": [head["device"] for head in trace.heads]}
    path.write_text(to_json({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}))
    return path


def _ends(sender: np.ndarray, receiver: np.ndarray, blocking: bool) -> tuple[float, float]:
    """Return when to draw that a message leaves and arrives: well within its slices, to which viewers bind an arrow.

    Send |-- waiting --|  o   transfer       |        or, in the background,  ForwardPass           o |
    Recv               |       transfer   o  |                                    Recv |-- waiting ----|  o  |
    """
    ready = [float(end["begin"] + end["waiting"]) for end in (sender, receiver)]
    margin = min(float(sender["end"]) - ready[0], float(receiver["end"]) - ready[1]) / 4
    return (ready[0] + margin if blocking else float(sender["end"]) - margin), float(receiver["end"]) - margin


def _named(what: str, name: str, where: dict[str, int]) -> dict[str, Any]:
    return {"ph": "M", "name": what, "args": {"name": name}, **where}
