"""The recorder: what one rank does, instruction by instruction, timed and written a step at a time.

    runs/20261124-101502-p2r1/
        trace_rank0.jsonl    who the rank is, then a line a step: every instruction, when it began and ended

A rank notes two times and its memory for each instruction, and writes them once the step is over. Whose times
and memory these are is in ``pipetutor.tracing.clock``; ``pipetutor.tracing.trace`` puts the ranks together.
"""

import os
from pathlib import Path
from typing import Any

from pipetutor.core.observer import Observer, Peers
from pipetutor.core.records import append, to_json
from pipetutor.schedule.orders import Instruction
from pipetutor.tracing.chrome import write_chrome
from pipetutor.tracing.clock import CudaClock, HostClock, clock_offset

__all__ = ["Recorder"]


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
        self._rank = rank
        self._head = {"rank": rank, "device": str(device), "without_model": self._clock.tensors()}
        self._head["returns_blocks"] = device.type == "cuda" or "MALLOC_MMAP_THRESHOLD_" in os.environ
        self._offset = clock_offset(device)
        self._spans: list[tuple[Any, ...]] | None = None
        self._open: tuple[str, int, int, Any] | None = None
        self._groups: dict[str, list[int]] = {}

    def built(self, engine: Any) -> None:
        """Begin the file."""
        head = self._head | {"replica": engine.replica, "blocking": engine.blocking, "clock_offset": self._offset}
        self._path.write_text(to_json(head | {"with_model": self._clock.tensors()}) + "\n")

    def begin(self, step: int) -> None:
        """Start recording a step."""
        self._clock.start()
        self._memory = self._clock.memory()
        self._spans, self._begin = [], self._clock.now()

    def before(self, instruction: Instruction, peers: Peers = ()) -> None:
        """Note that an instruction begins; outside of a step nothing is noted."""
        if self._spans is None:
            return
        name, stage, micro_batch = instruction
        if name in ("ReduceTiedGrads", "OptimizerStep") and peers:
            self._groups[name] = sorted({self._rank, *peers})
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
        line = {"step": step, "begin": begin, "end": end, **memory, "groups": self._groups, "spans": times}
        append(self._path, line)

    def trained(self) -> None:
        """Write all ranks' steps for Perfetto, on the first of them."""
        import torch.distributed as dist

        dist.barrier()  # the other ranks have written their last step
        if self._head["rank"] == 0:
            print(f"trace: {write_chrome(self._directory)}, for https://ui.perfetto.dev", flush=True)

    def _seconds(self, mark: Any) -> float:
        return round(self._clock.seconds(mark) + self._offset, 7)
