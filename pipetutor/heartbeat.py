"""What each rank is doing, written ahead of every instruction, so that a run that hangs can be explained.

    runs/20261124-101502-p2r1/
        heartbeat_rank0.json   step, instruction, micro-batch, the ranks it waits for, and since when
        stack_rank0.txt        the rank's Python stack, once somebody has asked for it

A heartbeat is one line of fixed width, overwritten in place: some microseconds, against the tenths of a
second that an instruction takes. On a GPU it says what the rank has begun to submit, which runs ahead of what
the device computes. Standard library only.
"""

import faulthandler
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

STACK_SIGNAL = signal.SIGUSR1
COLLECTIVES = ("ReduceGrads", "AggregateLoss", "Barrier")
_WIDTH = 512


@dataclass(frozen=True)
class Beat:
    """What one rank is doing.

    Attributes:
        rank: which rank.
        phase: ``starting``, ``training``, ``evaluating``, ``saving`` or ``finished``.
        step: the step it is in, or after which it evaluates or saves; 0 before the first.
        instruction: the engine's instruction, such as ``RecvGrad``; empty between instructions.
        micro_batch: counted from 0 in each step; None for what concerns the whole step.
        peers: the ranks that the instruction cannot end without.
        progress: grows with every step that this rank completes, and with what else takes it onward.
        since: when it began, in seconds of the system's clock.
    """

    rank: int
    phase: str = "starting"
    step: int = 0
    instruction: str = ""
    micro_batch: int | None = None
    peers: Sequence[int] = field(default_factory=list)
    progress: int = 0
    since: float = 0.0

    def __str__(self) -> str:
        where = f"in step {self.step}" if self.phase == "training" else f"{self.phase} after step {self.step}"
        if not self.instruction:
            return where if self.step else self.phase
        whole = "" if self.micro_batch is None else f" of micro-batch {self.micro_batch}"
        wait = f", which needs rank {' and '.join(map(str, self.peers))}" if self.peers else ""
        return f"{self.instruction}{whole} {where}{wait}"


class Heartbeat:
    """Writes what this rank is doing; without a run directory it keeps silent."""

    def __init__(self, directory: Path | None, rank: int):
        self.beat = Beat(rank)
        self._file = -1
        if directory:
            self._file = os.open(
                directory / f"heartbeat_rank{rank}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
            )
            self._stack = open(directory / f"stack_rank{rank}.txt", "w")  # noqa: SIM115 (the handler needs it open)
            # Written by a signal handler in C: it works while the interpreter waits inside gloo or NCCL.
            faulthandler.register(STACK_SIGNAL, self._stack, all_threads=False)
        self._write()

    def enter(self, phase: str, step: int) -> None:
        """Say that the rank has got as far as this phase of this step."""
        self.beat = Beat(self.beat.rank, phase, step, progress=self.beat.progress + 1)
        self._write()

    def before(self, instruction: str, micro_batch: int | None = None, peers: Sequence[int] = ()) -> None:
        """Say what the rank is about to execute; an evaluation moves onward with each of its instructions."""
        was = self.beat
        moved = was.progress + (was.phase == "evaluating")
        self.beat = Beat(was.rank, was.phase, was.step, instruction, micro_batch, list(peers), moved)
        self._write()

    def _write(self) -> None:
        if self._file >= 0:
            line = json.dumps(asdict(self.beat) | {"since": time.time()})
            os.pwrite(self._file, line.ljust(_WIDTH).encode(), 0)


def read(directory: Path) -> list[Beat]:
    """Return the last heartbeat of every rank that has one, in the order of ranks."""
    beats = []
    for path in directory.glob("heartbeat_rank*.json"):
        try:
            beats.append(Beat(**json.loads(path.read_text())))
        except ValueError:
            continue  # empty, or caught half-way through a write: the next look sees it whole
    return sorted(beats, key=lambda beat: beat.rank)


def culprits(beats: Sequence[Beat]) -> list[Beat]:
    """Find whom a stalled run waits for.

    A rank that sends or receives waits for its peer. A rank in a collective waits for those peers that are not
    in it with it. Who waits for nobody holds the others up. Where everybody waits, they wait in a circle, and
    all of them are returned.

        rank 0: RecvGrad  --needs-->  rank 1: ForwardPass        culprit: rank 1

    >>> [beat.rank for beat in culprits([Beat(0, "training", 3, "RecvGrad", 0, [1]), Beat(1, "training", 3)])]
    [1]
    """
    by_rank = {beat.rank: beat for beat in beats}

    def waits(beat: Beat) -> bool:
        place = (beat.phase, beat.step, beat.instruction)
        peers = [by_rank[rank] for rank in beat.peers if rank in by_rank]
        met = [peer for peer in peers if (peer.phase, peer.step, peer.instruction) == place]
        return len(peers) > (len(met) if beat.instruction in COLLECTIVES else 0)

    return [beat for beat in beats if not waits(beat)] or list(beats)


def ask_for_stacks(directory: Path, pids: Mapping[int, int], seconds: float = 2.0) -> None:
    """Have ranks of this host write their Python stacks, and wait until they have.

    Args:
        directory: the run directory.
        pids: rank -> process id.
        seconds: how long to wait; a stopped process writes nothing.
    """
    files = []
    for rank, pid in pids.items():
        try:
            os.kill(pid, STACK_SIGNAL)
            files.append(directory / f"stack_rank{rank}.txt")
        except ProcessLookupError:
            continue
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(path.exists() and path.stat().st_size for path in files):
        time.sleep(0.02)
