"""A trace as Chrome trace events: ``trace.json``, for https://ui.perfetto.dev or chrome://tracing."""

from pathlib import Path
from typing import Any

import numpy as np

from pipetutor.core.records import to_json
from pipetutor.schedule.orders import PARTNERS
from pipetutor.schedule.timeline import CATEGORIES, KINDS
from pipetutor.tracing.trace import by_place, load, waits_for

__all__: list[str] = []

# Microseconds. Perfetto lets an arrow go from the slice that begins first to the other, whatever its ends are called,
# and binds an end to the slice that began last. So a receiver's transfer begins a hair after its sender's.
HAIR = 0.01

# What "waiting" means in a trace, by whether its engine sends and receives with blocking calls.
WAITING = {
    True: "until the other end has come to the message; the rest of a Send or Recv is transfer, copies included",
    False: "of a Send until the other end has come to its Recv, of a Recv until the message has been computed; "
    "the rest is transfer, as far as a rank stood still for it",
}


def write_chrome(directory: Path) -> Path:
    """Write a run's trace as Chrome trace events to ``trace.json``, and return that file."""
    path = directory / "trace.json"
    path.write_text(chrome_trace(directory))
    return path


def chrome_trace(directory: Path) -> str:
    """Return a run's trace as Chrome trace events, for Perfetto and chrome://tracing.

    A replica is a process there and a rank a thread. Waiting is a slice within its instruction, and so is the
    transfer after it; a message is an arrow from Send to Recv, or from the pass that made it, and memory a counter.

    Args:
        directory: of the run.

    Returns:
        JSON of Chrome's "Trace Event Format", object form; times in microseconds.

    Raises:
        ValueError: see ``load``.
    """
    events: list[dict[str, Any]] = []
    known = set()
    trace = load(directory)
    origin = trace.steps[0].timeline.begin
    blocking = trace.heads[0]["blocking"]
    for step in trace.steps:
        place = by_place(step.timeline.spans)
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
            receives = name.startswith("Recv")
            if name in PARTNERS and (receives or span["waiting"] > 0):
                waits = min(1e6 * span["waiting"] + HAIR * receives, lasts)
                events.append(slices | {"name": "transfer", "ts": begin + waits, "dur": lasts - waits})
            sender = waits_for(span, place, blocking) if receives else None
            if sender is not None:
                leaves, arrives = _ends(sender[0], span, blocking)
                arrow = {"name": name[4:], "cat": "message", "id": len(events), "pid": replica}
                events.append(arrow | {"ph": "s", "ts": 1e6 * (leaves - origin), "tid": int(sender[0]["rank"])})
                events.append(arrow | {"ph": "f", "bp": "e", "ts": 1e6 * (arrives - origin), "tid": rank})
            counter = {"ph": "C", "name": f"memory of rank {rank}", "ts": begin + lasts, "pid": replica}
            events.append(counter | {"args": {"MB": float(span["memory"]) / 1e6}})
    about = {"waiting": WAITING[blocking], "devices": [head["device"] for head in trace.heads]}
    return to_json({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


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
