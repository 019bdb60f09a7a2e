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

On several hosts DeepSpeed's launchers stand between. Hosts that were made for the run are processes below the
supervisor (``host``, ``network``), so it sees the ranks on them as well; those of a cluster it asks to end, by a file
that all of them see.

One JSON object on standard output is its report. Standard library and psutil only.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from pipetutor.core import records
from pipetutor.processes import heartbeat
from pipetutor.processes.children import INPUT, Attention, Process, adopt_orphans, kill_descendants, start
from pipetutor.processes.network import Network
from pipetutor.system import cgroups
from pipetutor.system.links import Link

__all__ = ["end_when_asked", "supervise"]

PATIENCE_SECONDS = 180.0  # to load torch and join, to save, and to end, however short the deadline is
END_SECONDS = 7.0  # for ranks on other machines to see that they are asked to end; less than watch.SUPERVISOR_SECONDS
LAUNCHER_SECONDS = 10.0  # and for their launchers, who look once a second and are asked in turn
GRACE_SECONDS = 4.0  # for the other ranks to end of themselves, and say why, after one has died


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
        self._directory, self.ranks, self._deadline = directory, ranks, deadline
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
        steps = len(beats) == self.ranks and all(beat.phase in ("training", "evaluating") for beat in beats)
        deadline = self._deadline if steps else max(self._deadline, PATIENCE_SECONDS)
        return beats if self._still > deadline else None


def _status(pid: int) -> str | None:
    """Return the status of a process, such as ``psutil.STATUS_STOPPED``; None where it is gone."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None
    return None if status == psutil.STATUS_ZOMBIE else status


class _Started:
    """A process that was started, and the ranks that it is or has started in turn."""

    def __init__(self, process: Process, ranks: Sequence[int], child: subprocess.Popen[bytes]):
        self.process, self.child, self.ranks = process, child, ranks
        self._launches, self._gone = bool(process.ranks), dict[int, float]()

    def pids(self, beats: Sequence[heartbeat.Beat]) -> dict[int, int]:
        """Return the processes of those of its ranks that are on this machine."""
        if not self._launches:
            return {self.ranks[0]: self.child.pid}
        return {beat.rank: beat.pid for beat in beats if beat.rank in self.ranks and not self.process.elsewhere}

    def look(self, beats: Sequence[heartbeat.Beat]) -> None:
        """Note which of the ranks that it launches are gone, before it has noticed and ends the others."""
        training = [beat for beat in beats if beat.phase != "finished"]
        for rank, pid in self.pids(training).items() if self._launches else ():
            if _status(pid) is None:
                self._gone.setdefault(rank, time.time())

    def ended(self) -> list[dict[str, Any]]:
        """Return how its ranks have ended, if it has: a launcher ends with the code of the first that ended badly."""
        if (code := self.child.poll()) is None:
            return []
        codes = dict.fromkeys(self.ranks, code)
        if self._launches and code:
            codes = dict.fromkeys(self.ranks, code - 256 if code > 255 - signal.NSIG else code)
            first = min(self._gone, key=self._gone.__getitem__, default=None)
            codes |= {rank: -signal.SIGTERM for rank in codes if first not in (None, rank)}
        killed = self.process.host is not None and code == -signal.SIGKILL  # the host itself, not what runs on it
        about = {"pid": self.child.pid, "log": self.process.log, "host": self.process.host, "killed": killed}
        now = time.time()
        return [{"rank": rank, "time": self._gone.get(rank, now), "code": codes[rank]} | about for rank in codes]


def _all_end(children: Sequence[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Wait so long at most until all of them have ended, and say whether they have."""
    end = time.monotonic() + seconds
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))
    return all(child.poll() is not None for child in children)


def supervise(
    processes: Sequence[Process],
    directory: Path,
    deadline: float,
    given_up: Callable[[float], bool],
    links: Mapping[tuple[int, int], Link],
) -> dict[str, Any]:
    """Run processes until they have ended, stall or are given up; then leave nothing running.

    Args:
        processes: what to start: ranks, the first of them rank 0, or their launchers.
        directory: the run directory, whose status is closed here.
        deadline: seconds without progress after which the run is ended; infinite for what has no heartbeats.
        given_up: waits so many seconds for the end of a process, and says whether nobody wants the run any more.
        links: between the hosts that the processes run on, none where that is this machine; where there are some,
            this process is alone in a network (``pipetutor.system.namespaces``).

    Returns:
        ``code``: 0 where every process was seen to end with it, else the code of the first that ended badly, None if
        none did; ``cancelled``; ``ended``: the ranks in the order in which they ended, with time, exit code, pid, log
        and host of what was started for them, and whether that host was ``killed``; ``deadline``; ``ranks``, the
        count; ``stopped``: the ranks that a signal had stopped when the run stalled; ``cut``: the pairs of hosts of
        which then the first did not reach the second; ``oom_kills``: how many processes the system has killed
        meanwhile for want of memory, None where it does not tell; and ``stalled``: every rank's last heartbeat, or
        None if it did not.

    Raises:
        OSError: one of them cannot be started.
    """
    network = Network(links) if links else None
    started = []
    for place, process in enumerate(processes):
        log = directory / "logs" / process.log
        child = start(process, log) if process.host is None or not network else network.start(process, log)
        started.append(_Started(process, process.ranks or [place], child))
    ranks = sum(len(one.ranks) for one in started)
    progress, killed = Progress(directory, ranks, deadline), cgroups.oom_kills()
    end, cancelled = float("inf"), False
    stalled: list[heartbeat.Beat] | None = None
    running, ended, launched = list(started), list[dict[str, Any]](), any(process.ranks for process in processes)
    while running and time.monotonic() < end and stalled is None and not cancelled:
        cancelled = given_up(0.1)
        beats = heartbeat.read(directory) if launched else []  # of a rank of its own it is told that it has ended
        for one in list(running):
            one.look(beats)
            if how := one.ended():
                ended += how
                running.remove(one)
        failed = any(end["code"] for end in ended) or any(directory.glob("failure_rank*.json"))
        if failed and end == float("inf"):
            end = time.monotonic() + (LAUNCHER_SECONDS if launched else GRACE_SECONDS)
        stalled = None if failed else progress.stalled()
    stopped, cut = [], []
    if stalled is not None:
        pids = {rank: pid for one in running for rank, pid in one.pids(stalled).items()}
        stopped = sorted(rank for rank, pid in pids.items() if _status(pid) == psutil.STATUS_STOPPED)
        beating = {beat.rank for beat in stalled}
        heartbeat.ask_for_stacks(directory, {rank: pid for rank, pid in pids.items() if rank in beating})
        cut = network.cut() if network else []
    if elsewhere := [one.child for one in running if one.process.elsewhere]:
        heartbeat.ask_to_end(directory, lambda: _all_end(elsewhere, END_SECONDS))
    kill_descendants()
    bad = next((end["code"] for end in ended if end["code"]), None)
    code = 0 if not running and bad is None else bad
    if records.read(directory).get("status") != "finished" or code != 0:
        records.close(directory, "interrupted" if cancelled else "failed")
    more = cgroups.oom_kills()
    return {
        "code": code,
        "cancelled": cancelled,
        "ended": ended,
        "deadline": deadline,
        "ranks": ranks,
        "stopped": stopped,
        "cut": cut,
        "oom_kills": None if more is None or killed is None else more - killed,
        "stalled": None if stalled is None else [asdict(beat) for beat in stalled],
    }


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
        links = {(one, other): Link.parse(link) for one, other, link in asked["links"]}
        report = supervise(processes, directory, deadline, attention.given_up, links)
    except BaseException as error:
        kill_descendants()  # whatever it was, no rank stays
        report = {"error": "".join(traceback.format_exception_only(error)).strip()}
    print(records.to_json(report), flush=True)
