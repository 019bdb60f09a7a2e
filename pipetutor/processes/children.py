"""Processes that this one starts, and is responsible for: none of them outlives what it is for.

A descendant that loses its parent becomes a child of whoever is a child subreaper (prctl(2)), so none can slip out of
the tree that is killed; what ``start`` starts, the system kills with its parent (PR_SET_PDEATHSIG). Standard library
and psutil only.
"""

import ctypes
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = [
    "INPUT",
    "Attention",
    "Process",
    "adopt_orphans",
    "descendants",
    "end_with",
    "kill_descendants",
    "reap",
    "start",
]

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
INPUT = 0  # the pipe from who wants the work
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Process:
    """What is to be started.

    Attributes:
        command: its words.
        environment: the whole of it.
        log: the file in the run's ``logs`` that gets what it prints.
        ranks: those that it is, or that it starts as a launcher; by default the one of its place among all.
        host: the number of the host that it runs on, where the run has hosts of its own.
    """

    command: list[str]
    environment: dict[str, str]
    log: str
    ranks: Sequence[int] = ()
    host: int | None = None

    @property
    def elsewhere(self) -> bool:
        """Say whether its ranks are on other machines, where nobody can kill them from here."""
        return bool(self.ranks) and self.host is None


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


def start(process: Process, log: Path) -> subprocess.Popen[bytes]:
    """Start a process that ends with this one, and prints to a file."""
    me = os.getpid()
    with open(log, "wb") as file:
        return subprocess.Popen(
            process.command,
            env=process.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: end_with(me),
        )


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
