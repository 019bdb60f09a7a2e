"""The process that stands between a notebook and a run, so that no rank outlives what started it.

    kernel --pipe--> supervisor --> deepspeed --> launcher --> rank 0, rank 1, ...

The kernel may be interrupted, restarted or killed with SIGKILL, and ranks may ignore signals or leave the
process group. The supervisor sees to the end of all of them:

- It holds the read end of a pipe from the kernel. End of file means that the kernel closed it or is gone.
- It is a child subreaper (prctl(2)): a descendant that loses its parent becomes its child, and none can
  slip out of the tree that it kills.
- It watches each rank through a pidfd, so it knows which one ended first, and with what.
- It reads the ranks' heartbeats, and ends a run that no longer gets on.

One JSON object on standard output is its report. Standard library and psutil only.
"""

import ctypes
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from pipetutor import heartbeat, records

PATIENCE_SECONDS = 180.0  # to load torch and join, to save, and to end, however short the deadline is
PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 4.0  # for the other ranks to end of themselves, and say why, after one has died


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


def exit_code(pid: int) -> int | None:
    """Read the exit code of a zombie: negative for a signal, None once its parent has collected it."""
    try:
        status = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[-1])
    except OSError:
        return None
    return os.waitstatus_to_exitcode(status)


class Ranks:
    """The ranks of the run among the descendants, and how each of them ended."""

    def __init__(self, count: int):
        self._count = count
        self._pids: dict[int, tuple[int, int]] = {}  # pidfd -> (rank, pid)
        self.ended: list[dict[str, Any]] = []

    @property
    def pids(self) -> dict[int, int]:
        """Rank -> process id, of those that are alive."""
        return dict(self._pids.values())

    @property
    def pidfds(self) -> list[int]:
        """Readable when the rank behind it has ended."""
        return list(self._pids)

    @property
    def succeeded(self) -> bool:
        """Whether every rank was seen to end, and with exit code 0."""
        return self._count > 0 and [end["code"] for end in self.ended] == [0] * self._count

    def look(self) -> None:
        """Find ranks that have started since the last look, by the RANK in their environment."""
        if len(self._pids) + len(self.ended) >= self._count:
            return
        known = {rank for rank, _ in self._pids.values()} | {end["rank"] for end in self.ended}
        for process in descendants():
            try:
                rank = int(process.environ().get("RANK", "-1"))
                if rank >= 0 and rank not in known:
                    known.add(rank)
                    self._pids[os.pidfd_open(process.pid)] = (rank, process.pid)
            except (psutil.Error, OSError, ValueError):
                continue  # ended between listing and looking

    def collect(self, readable: list[int]) -> None:
        """Note the ranks behind these pidfds as ended."""
        for pidfd in readable:
            if pidfd in self._pids:
                rank, pid = self._pids.pop(pidfd)
                self.ended.append({"rank": rank, "pid": pid, "time": time.time(), "code": exit_code(pid)})
                os.close(pidfd)


class Progress:
    """How long ago a rank last completed something, by the heartbeats; a run whose ranks all wait stands still."""

    def __init__(self, directory: Path, ranks: int, deadline: float):
        self._directory, self._ranks, self._deadline = directory, ranks, deadline
        self._seen, self._moved, self._looked = -1, time.monotonic(), 0.0

    def stalled(self) -> list[heartbeat.Beat] | None:
        """Return the heartbeats of a run that made no progress within the deadline, None of any other."""
        now = time.monotonic()
        if now - self._looked < min(0.5, self._deadline / 4):
            return None
        self._looked = now
        beats = heartbeat.read(self._directory)
        progress = sum(beat.progress for beat in beats)
        if progress != self._seen:
            self._seen, self._moved = progress, now
        steps = len(beats) == self._ranks and all(beat.phase in ("training", "evaluating") for beat in beats)
        deadline = self._deadline if steps else max(self._deadline, PATIENCE_SECONDS)
        return beats if now - self._moved > deadline else None


def supervise(command: list[str], directory: Path, rank_count: int, deadline: float) -> dict[str, Any]:
    """Run ``command`` until its ranks end, it stalls or standard input closes; then leave nothing running.

    Once every rank has ended well, the command is not waited for: DeepSpeed's launcher looks at its ranks once a
    second, and takes three in all to notice, to say so and to end.

    Args:
        command: what to start; its output goes to ``directory/logs/launcher.log``.
        directory: the run directory, whose status is closed here.
        rank_count: ranks to expect.
        deadline: seconds without progress after which the run is ended.

    Returns:
        ``code`` of the command (0 where every rank ended with it, None if it was killed here), ``cancelled``,
        ``ended``: the ranks in the order in which they ended, with pid, time and exit code, ``deadline``, ``ranks``,
        the count, and ``stalled``: every rank's last heartbeat, or None if it did not.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ranks, progress = Ranks(rank_count), Progress(directory, rank_count, deadline)
    end, cancelled = float("inf"), False
    stalled: list[heartbeat.Beat] | None = None
    with open(directory / "logs" / "launcher.log", "wb") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    child_fd = os.pidfd_open(child.pid)
    while child.poll() is None and not ranks.succeeded and time.monotonic() < end and stalled is None:
        ranks.look()
        readable, _, _ = select.select([sys.stdin, child_fd, *ranks.pidfds], [], [], 0.1)
        ranks.collect([fd for fd in readable if isinstance(fd, int)])
        if sys.stdin in readable and not os.read(sys.stdin.fileno(), 1):
            cancelled = True
            break
        failed = any(end["code"] for end in ranks.ended) or any(directory.glob("failure_rank*.json"))
        if failed and end == float("inf"):
            end = time.monotonic() + GRACE_SECONDS
        stalled = None if failed else progress.stalled()
    code = 0 if ranks.succeeded else child.poll()
    ranks.collect(select.select(ranks.pidfds, [], [], 0)[0])
    if stalled is not None:
        beating = {beat.rank for beat in stalled}
        heartbeat.ask_for_stacks(directory, {rank: pid for rank, pid in ranks.pids.items() if rank in beating})
    kill_descendants()
    if records.read(directory).get("status") != "finished" or code != 0:
        records.update(directory, status="interrupted" if cancelled else "failed")
    report = {"code": code, "cancelled": cancelled, "ended": ranks.ended, "deadline": deadline, "ranks": rank_count}
    return report | {"stalled": None if stalled is None else [asdict(beat) for beat in stalled]}


if __name__ == "__main__":
    report = supervise(sys.argv[4:], Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    print(json.dumps(report), flush=True)
