"""A host of a run, on this machine: a process with a network and a host name of its own, in which a command runs.

    supervisor --pipe--> host0: deepspeed ... --node_rank 0 --> launcher --> rank 0
               --pipe--> host1: deepspeed ... --node_rank 1 --> launcher --> rank 1
                           '------------ a link ------------'

``pipetutor.processes.network`` starts it and lays the links. It says that it is there, waits for the command, and
ends with the command's status. When the pipe closes, since the run is given up or the supervisor is gone, it ends
with all that it has started: a rank is three processes below the supervisor here, and the system kills one generation
alone. Standard library and psutil only.
"""

import contextlib
import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import psutil

from pipetutor.processes.children import INPUT, Attention, Process, adopt_orphans, kill_descendants, start

__all__ = ["hosts_made", "is_mine", "main", "own_network"]

VARIABLE = "PIPETUTOR_HOST"  # its number, how many there are, and the network namespace that was made for it


def _network(process: int | str = "self") -> int:
    return os.stat(f"/proc/{process}/ns/net").st_ino


def _here() -> tuple[int, int]:
    """Return the number of the host that was made for this run, and how many there are; -1 and 0 on any other."""
    number, count, network = (int(word) for word in os.environ.get(VARIABLE, "-1:0:0").split(":"))
    return (number, count) if network == _network() else (-1, 0)


def is_mine(host: int) -> bool:
    """Say whether this process is on the host of this number, and that was made for this run."""
    return _here()[0] == host


def hosts_made() -> int:
    """Return how many hosts were made for this run, 0 for none."""
    return _here()[1]


def own_network() -> list[psutil.Process]:
    """Return the other processes on this host, which was made for this run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if process.pid != os.getpid() and hosts_made() and _network(process.pid) == _network():
                found.append(process)
    return found


def main() -> None:
    """Be the host that the command line names and numbers, and run what one line on standard input says."""
    socket.sethostname(sys.argv[1])
    adopt_orphans()
    attention = Attention(os.getppid())
    print("ready", flush=True)
    with open(INPUT, "rb", buffering=0, closefd=False) as told:
        line = told.readline()
    if not line:
        return
    asked = Process(**json.loads(line))
    about = {VARIABLE: f"{sys.argv[2]}:{sys.argv[3]}:{_network()}"}
    child = start(replace(asked, environment=asked.environment | about), Path(asked.log))
    while (code := child.poll()) is None and not attention.given_up(1.0):
        pass
    kill_descendants()
    sys.exit((code or 0) % 256)  # a signal's number below 0 as DeepSpeed's launcher hands it on
