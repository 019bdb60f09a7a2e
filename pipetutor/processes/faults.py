"""Faults to inject into a run, for lessons and tests: a rank that stalls, dies, slows down or loads too little.

    launch(fault="stall:rank=1,step=3")

Each acts on one rank from one step on, in its first ForwardPass (``ragged``: in its first LoadMicroBatch).
Standard library only.
"""

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

from pipetutor.core.observer import Observer, Peers
from pipetutor.schedule.orders import Instruction

__all__ = ["EXAMPLE", "KINDS", "Fault", "Injector"]

KINDS = {
    "stall": "the rank stops moving",
    "die": "the rank is killed with SIGKILL, as the system does when memory runs out",
    "slow": "every forward and backward pass of the rank takes `seconds` (1) longer",
    "ragged": "the rank gets a micro-batch that lacks an image",
}
EXAMPLE = "stall:rank=1,step=3"
LONGEST = 86_400  # seconds that a pass can be made longer


@dataclass(frozen=True)
class Fault:
    """A fault to inject.

    Attributes:
        kind: one of ``KINDS``.
        rank: who has it.
        step: when, counted from 1.
        seconds: how much longer a pass takes, for ``slow``.
    """

    kind: str
    rank: int
    step: int
    seconds: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Read a fault such as ``slow:rank=1,step=3,seconds=0.5``.

        Raises:
            ValueError: the kind is unknown, or something is missing, unknown or not a number.
        """
        kind, _, rest = str(text).partition(":")
        if kind not in KINDS:
            raise ValueError(f"unknown fault {kind!r}: there is {', '.join(KINDS)}, for example {EXAMPLE}")
        try:
            parts = [part.split("=") for part in rest.split(",")]
            given = dict(parts)
            rank, step = int(given.pop("rank")), int(given.pop("step"))
            seconds = float(given.pop("seconds", "1")) if kind == "slow" else 1.0
        except (ValueError, KeyError):
            words = (
                "a rank and a step (slow: seconds, too), in numbers"
                if kind == "slow"
                else "a rank and a step, in numbers"
            )
            raise ValueError(f"fault {text!r} needs {words}, for example {EXAMPLE}") from None
        if len({name for name, _ in parts}) < len(parts):
            raise ValueError(f"fault {text!r} says something twice; an example is {EXAMPLE}")
        if given:
            raise ValueError(f"fault {text!r}: {', '.join(given)} is not for {kind}; an example is {EXAMPLE}")
        if not 0 <= seconds <= LONGEST:
            raise ValueError(f"fault {text!r}: seconds is {seconds:g}, but must be at least 0 and at most {LONGEST}")
        return cls(kind, rank, step, seconds)

    def check(self, ranks: int, stages: int, steps: int, done: int = 0) -> None:
        """Raise ValueError unless the run has this rank and this step, and the rank loads data where it must.

        Args:
            ranks: of the run.
            stages: of the run; 0 for the baseline.
            steps: its last step.
            done: the step of the checkpoint from which it goes on, 0 without one.
        """
        if not 0 <= self.rank < ranks or not done < self.step <= steps:
            left = f"the steps {done + 1} to {steps}" if done < steps else "no step left to do"
            resumed = f", for it resumes after step {done}" if done else ""
            raise ValueError(
                f"fault at rank {self.rank}, step {self.step}: this run has the ranks 0 to {ranks - 1} and "
                f"{left}{resumed}"
            )
        per_stage = ranks // stages if stages else ranks
        if self.kind == "ragged" and stages and self.rank // per_stage not in (0, stages - 1):
            raise ValueError(
                f"fault ragged at rank {self.rank}: only the first and the last stage load micro-batches; "
                f"use rank 0 or {ranks - 1}"
            )


class Injector(Observer):
    """Lets a rank suffer a fault, where it is the one and the time has come."""

    def __init__(self, fault: Fault, rank: int):
        self._fault, self._is_mine = fault, fault.rank == rank
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
            if self._fault.kind == "stall":
                threading.Event().wait()
            if self._fault.kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)

    def loaded(self, micro_batch: list[Any]) -> list[Any]:
        """Take an image from the micro-batch that was loaded here, if this is the place."""
        here = self._is_mine and (self._step, self._last.micro_batch) == (self._fault.step, 0)
        if here and self._fault.kind == "ragged":
            return [part[:-1] for part in micro_batch]
        return micro_batch
