"""The process that stands between a notebook and a run, so that no rank outlives what started it.

    kernel --pipe--> supervisor --> rank 0, rank 1, ...

It starts the ranks as DeepSpeed's launcher does, one process each, and need not load DeepSpeed for that. The kernel
may be interrupted, restarted or killed with SIGKILL, and ranks may ignore signals or leave the process group. The
supervisor sees to the end of all of them:

- It holds the read end of a pipe from the kernel, and knows its parent. Something to read, the end of the file or
  another parent means that the run is given up, or that the kernel is gone.
- It is a child subreaper (prctl(2)): a descendant that loses its parent becomes its child, and none can slip out of
  the tree that it kills.
- What it starts is killed by the system when the supervisor itself is killed (PR_SET_PDEATHSIG).
- It is told when one of its processes ends, so it knows which ended first, and with what.
- It reads the ranks' heartbeats, and ends a run that no longer gets on.

One JSON object on standard output is its report. Standard library and psutil only.
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from pipetutor.core import records
from pipetutor.processes import heartbeat
from pipetutor.system import cgroups

__all__ = ["Process", "adopt_orphans", "descendants", "end_when_asked", "end_with", "kill_descendants", "reap"]

PATIENCE_SECONDS = 180.0  # to load torch and join, to save, and to end, however short the deadline is
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_SECONDS = 4.0  # for the other ranks to end of themselves, and say why, after one has died
INPUT = 0  # the pipe from who wants the run
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Process:
    """What is to be started.

    Attributes:
        command: its words.
        environment: the whole of it.
        log: the file in the run's ``logs`` that gets what it prints.
    """

    command: list[str]
    environment: dict[str, str]
    log: str


def descendants() -> list[psutil.Process]:
    """Return every process that this one is responsible for."""
    return psutil.Process().children(recursive=True)


def kill_descendants() -> None:
    """Kill until none is left; a process may start another while it is being killed."""
    while alive := descendants():
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        reap()
        select.select([], [], [], 0.01)


def reap() -> None:
    """Collect ended children, adopted ones too, so that they do not stay as zombies."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def adopt_orphans() -> None:
    """Become the parent of every process below this one that loses its own."""
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with(parent: int) -> None:
    """Have the system kill this process when its parent, of this id, is gone."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone already
        os._exit(1)


def end_when_asked(record: Path | None) -> None:
    """Have Ctrl-C and SIGTERM end this process, a rank, at once, in silence, also while it waits for another one.

    Python's own handlers wait until a call into C returns; a byte in a pipe does not.

    Args:
        record: the run directory, whose record is closed then; None where another rank does that.
    """
    asked, told = os.pipe()
    os.set_blocking(told, False)
    ends = (signal.SIGINT, signal.SIGTERM)
    for number in ends:
        if signal.getsignal(number) != signal.SIG_IGN:  # as for a job in the background
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(told)

    def end() -> None:
        while os.read(asked, 1)[0] not in ends:  # every signal that Python handles comes here, of a child's end, too
            pass
        if record:
            records.close(record, "failed" if records.read_failures(record) else "interrupted")
        os._exit(130)

    threading.Thread(target=end, daemon=True).start()


class Progress:
    """For how long no rank has completed anything, by the heartbeats; a run whose ranks all wait stands still.

    A machine or container that was suspended stands still as a whole, and nobody looks meanwhile: of the time between
    two looks, half a deadline counts at most.
    """

    def __init__(self, directory: Path, ranks: int, deadline: float):
        self._directory, self._ranks, self._deadline = directory, ranks, deadline
        self._seen, self._still, self._looked = -1, 0.0, time.monotonic()

    def stalled(self) -> list[heartbeat.Beat] | None:
        """Return the heartbeats of a run that made no progress within the deadline, None of any other."""
        now = time.monotonic()
        since = now - self._looked
        if since < min(0.5, self._deadline / 4):
            return None
        self._looked, self._still = now, self._still + min(since, self._deadline / 2)
        beats = heartbeat.read(self._directory)
        progress = sum(beat.progress for beat in beats)
        if progress != self._seen:
            self._seen, self._still = progress, 0.0
        steps = len(beats) == self._ranks and all(beat.phase in ("training", "evaluating") for beat in beats)
        deadline = self._deadline if steps else max(self._deadline, PATIENCE_SECONDS)
        return beats if self._still > deadline else None


def _start(process: Process, directory: Path) -> subprocess.Popen[bytes]:
    me = os.getpid()
    with open(directory / "logs" / process.log, "wb") as log:
        return subprocess.Popen(
            process.command,
            env=process.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: end_with(me),
        )


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def supervise(
    processes: Sequence[Process], directory: Path, deadline: float, given_up: Callable[[float], bool]
) -> dict[str, Any]:
    """Run processes until they have ended, stall or are given up; then leave nothing running.

    Args:
        processes: what to start: ranks, the first of them rank 0.
        directory: the run directory, whose status is closed here.
        deadline: seconds without progress after which the run is ended; infinite for what has no heartbeats.
        given_up: waits so many seconds for the end of a process, and says whether nobody wants the run any more.

    Returns:
        ``code``: 0 where every process was seen to end with it, else the code of the first that ended badly, None if
        none did; ``cancelled``; ``ended``: the ranks in the order in which they ended, with pid, time and exit code;
        ``deadline``; ``ranks``, the count; ``stopped``: the ranks that a signal had stopped when the run stalled;
        ``oom_kills``: how many processes the system has killed meanwhile for want of memory, None where it does not
        tell; and ``stalled``: every rank's last heartbeat, or None if it did not.

    Raises:
        OSError: one of them cannot be started.
    """
    progress, killed = Progress(directory, len(processes), deadline), cgroups.oom_kills()
    end, cancelled = float("inf"), False
    stalled: list[heartbeat.Beat] | None = None
    running = {rank: _start(process, directory) for rank, process in enumerate(processes)}
    ended: list[dict[str, Any]] = []
    while running and time.monotonic() < end and stalled is None and not cancelled:
        cancelled = given_up(0.1)
        for rank, child in list(running.items()):
            if (code := child.poll()) is not None:
                ended.append({"rank": rank, "pid": child.pid, "time": time.time(), "code": code})
                del running[rank]
        failed = any(end["code"] for end in ended) or any(directory.glob("failure_rank*.json"))
        if failed and end == float("inf"):
            end = time.monotonic() + GRACE_SECONDS
        stalled = None if failed else progress.stalled()
    stopped = []
    if stalled is not None:
        stopped = [rank for rank, child in running.items() if _is_stopped(child.pid)]
        beating = {beat.rank for beat in stalled}
        heartbeat.ask_for_stacks(directory, {rank: child.pid for rank, child in running.items() if rank in beating})
    kill_descendants()
    bad = next((end["code"] for end in ended if end["code"]), None)
    code = 0 if len(ended) == len(processes) and bad is None else bad
    if records.read(directory).get("status") != "finished" or code != 0:
        records.close(directory, "interrupted" if cancelled else "failed")
    more = cgroups.oom_kills()
    return {
        "code": code,
        "cancelled": cancelled,
        "ended": ended,
        "deadline": deadline,
        "ranks": len(processes),
        "stopped": stopped,
        "oom_kills": None if more is None or killed is None else more - killed,
        "stalled": None if stalled is None else [asdict(beat) for beat in stalled],
    }


class Attention:
    """What this process waits for: that a child ends, that its parent gives the run up, or a signal to end."""

    def __init__(self, parent: int):
        self._parent = parent
        self._signals, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # its number goes into the pipe
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def given_up(self, seconds: float) -> bool:
        """Wait so long at most, and say whether the run is given up."""
        readable, _, _ = select.select([INPUT, self._signals], [], [], seconds)
        numbers = os.read(self._signals, 4096) if self._signals in readable else b""
        asked = any(number != signal.SIGCHLD for number in numbers)
        return asked or INPUT in readable or os.getppid() != self._parent


def main() -> None:
    """Supervise what one line on standard input says, and report."""
    directory, parent = Path(sys.argv[1]), int(sys.argv[2])
    adopt_orphans()
    try:
        attention = Attention(parent)
        with open(INPUT, "rb", buffering=0, closefd=False) as told:  # what comes behind the line stays where it is
            asked = json.loads(told.readline())
        processes = [Process(**process) for process in asked["processes"]]
        deadline = float("inf") if asked["deadline"] is None else asked["deadline"]  # JSON has null for infinity
        report = supervise(processes, directory, deadline, attention.given_up)
    except BaseException as error:
        kill_descendants()  # whatever it was, no rank stays
        report = {"error": "".join(traceback.format_exception_only(error)).strip()}
    print(records.to_json(report), flush=True)
