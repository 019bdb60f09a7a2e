"""Faults to inject into a run, for lessons and tests, into a rank or a host.

    launch(fault="stall:rank=1,step=3")
    launch(hosts=2, fault="cut:host=1,step=3")

Each acts on one rank, or one host, from one step on, in its first ForwardPass (``ragged``: in its first
LoadMicroBatch). What concerns a host is done by its first rank, which may change the host's network where the host
was made for this run (``pipetutor.processes.network``), and is done nowhere else. Standard library and psutil only.
"""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil

from pipetutor.core.observer import Observer, Peers
from pipetutor.processes.host import is_mine, own_network
from pipetutor.schedule.orders import Instruction
from pipetutor.system.links import Link
from pipetutor.system.namespaces import limits, tool

__all__ = ["EXAMPLE", "KINDS", "OF_HOSTS", "Fault", "Injector"]

KINDS = {
    "stall": "the rank stops moving",
    "die": "the rank, or all that runs on the host, is killed with SIGKILL, as the system does when memory runs out",
    "slow": "every forward and backward pass of the rank takes `seconds` (1) longer",
    "ragged": "the rank gets a micro-batch that lacks an image",
    "cut": "the host's links go down: nothing comes or goes any more, and nobody is told",
    "slow-link": "what the host sends goes at `rate` (10mbit)",
}
OF_HOSTS = ("cut", "slow-link")
EXAMPLE = "stall:rank=1,step=3"
HOST_EXAMPLE = "cut:host=1,step=3"
TEN_MEGABITS = Link(1e7)
LONGEST = 86_400  # seconds that a pass can be made longer


@dataclass(frozen=True)
class Fault:
    """A fault to inject.

    Attributes:
        kind: one of ``KINDS``.
        rank: who has it; None where it is a host's.
        step: when, counted from 1.
        seconds: how much longer a pass takes, for ``slow``.
        host: which host has it; None where it is a rank's.
        rate: of ``slow-link``.
    """

    kind: str
    rank: int | None
    step: int
    seconds: float = 1.0
    host: int | None = None
    rate: Link = TEN_MEGABITS

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Read a fault such as ``slow:rank=1,step=3,seconds=0.5``.

        Raises:
            ValueError: the kind is unknown, or something is missing, unknown or not a number.
        """
        kind, _, rest = str(text).partition(":")
        if kind not in KINDS:
            raise ValueError(f"unknown fault {kind!r}: there is {', '.join(KINDS)}, for example {EXAMPLE}")
        example = HOST_EXAMPLE if kind in OF_HOSTS else EXAMPLE
        try:
            parts = [part.split("=") for part in rest.split(",")]
            given = dict(parts)
            who = "host" if kind in OF_HOSTS or (kind == "die" and "host" in given) else "rank"
            number, step = int(given.pop(who)), int(given.pop("step"))
            seconds = float(given.pop("seconds", "1")) if kind == "slow" else 1.0
            rate = given.pop("rate", str(TEN_MEGABITS)) if kind == "slow-link" else str(TEN_MEGABITS)
        except (ValueError, KeyError):
            words = {
                "slow": "a rank and a step (slow: seconds, too), in numbers",
                "die": "a rank or a host, and a step, in numbers",
                "cut": "a host and a step, in numbers",
                "slow-link": "a host and a step, in numbers, and a rate",
            }.get(kind, "a rank and a step, in numbers")
            raise ValueError(f"fault {text!r} needs {words}, for example {example}") from None
        if len({name for name, _ in parts}) < len(parts):
            raise ValueError(f"fault {text!r} says something twice; an example is {example}")
        if given:
            raise ValueError(f"fault {text!r}: {', '.join(given)} is not for {kind}; an example is {example}")
        if not 0 <= seconds <= LONGEST:
            raise ValueError(f"fault {text!r}: seconds is {seconds:g}, but must be at least 0 and at most {LONGEST}")
        rank, host = (None, number) if who == "host" else (number, None)
        return cls(kind, rank, step, seconds, host, Link.parse(rate))

    def check(self, ranks: int, stages: int, steps: int, done: int = 0, hosts: int = 0) -> None:
        """Raise ValueError unless the run has this rank or host and this step, and the rank loads data where it must.

        Args:
            ranks: of the run.
            stages: of the run; 0 for the baseline.
            steps: its last step.
            done: the step of the checkpoint from which it goes on, 0 without one.
            hosts: that were made for this run; 0 where it runs on this machine, or on a cluster.
        """
        if self.host is not None and not hosts:
            raise ValueError(
                f"fault {self.kind} of a host is for hosts that a launch makes, launch(hosts=2, ...): it is never "
                "done to a machine"
            )
        number, count, noun = (self.rank, ranks, "rank") if self.host is None else (self.host, hosts, "host")
        assert number is not None
        if not 0 <= number < count or not done < self.step <= steps:
            left = f"the steps {done + 1} to {steps}" if done < steps else "no step left to do"
            resumed = f", for it resumes after step {done}" if done else ""
            raise ValueError(
                f"fault at {noun} {number}, step {self.step}: this run has the {noun}s 0 to {count - 1} and "
                f"{left}{resumed}"
            )
        per_stage = ranks // stages if stages else ranks
        if self.kind == "ragged" and stages and number // per_stage not in (0, stages - 1):
            raise ValueError(
                f"fault ragged at rank {self.rank}: only the first and the last stage load micro-batches; "
                f"use rank 0 or {ranks - 1}"
            )


class Injector(Observer):
    """Lets a rank suffer a fault, where it is the one and the time has come."""

    def __init__(self, fault: Fault, rank: int):
        self._fault, self._is_mine = fault, fault.rank == rank or _is_first_of(fault.host)
        self._phase, self._step = "", 0
        self._last = Instruction("", 0)

    def enter(self, phase: str, step: int) -> None:
        """Note where the rank is."""
        self._phase, self._step = phase, step

    def before(self, instruction: Instruction, peers: Peers = ()) -> None:
        """Stall, die or slow down here, if this is the place."""
        self._last = instruction
        if not self._is_mine or self._phase != "training" or self._step < self._fault.step:
            return
        name, _, micro_batch = instruction
        if self._fault.kind == "slow" and name in ("ForwardPass", "BackwardPass"):
            time.sleep(self._fault.seconds)
        elif (self._step, name, micro_batch) == (self._fault.step, "ForwardPass", 0):
            _happen(self._fault)

    def loaded(self, micro_batch: list[Any]) -> list[Any]:
        """Take an image from the micro-batch that was loaded here, if this is the place."""
        here = self._is_mine and (self._step, self._last.micro_batch) == (self._fault.step, 0)
        if here and self._fault.kind == "ragged":
            return [part[:-1] for part in micro_batch]
        return micro_batch


def _is_first_of(host: int | None) -> bool:
    return host is not None and os.environ.get("LOCAL_RANK") == "0" and is_mine(host)


def _happen(fault: Fault) -> None:
    """Do to this rank, or to the host that was made for this run, what a fault does at once."""
    if fault.kind == "stall":
        threading.Event().wait()
    if fault.host is not None:
        interfaces = [name for _, name in socket.if_nameindex() if name != "lo"]
        for interface in interfaces:
            if fault.kind == "slow-link":
                for command in limits(fault.rate, interface, "replace"):
                    subprocess.run(command, check=True)
            else:  # a host that dies does not say so: no packet tells the others that its connections are closed
                subprocess.run([tool("ip"), "link", "set", interface, "down"], check=True)
    if fault.kind == "die":
        for process in own_network() if fault.host is not None else ():
            with contextlib.suppress(psutil.Error):
                process.kill()
        os.kill(os.getpid(), signal.SIGKILL)
