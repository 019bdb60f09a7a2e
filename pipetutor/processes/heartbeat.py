"""What each rank is doing, written ahead of every instruction, so that a run that hangs can be explained.

    runs/20261124-101502-p2r1/
        heartbeat_rank0.json   step, instruction, micro-batch, the ranks it waits for, and since when
        stack_rank0.txt        the rank's Python stack, once somebody has asked for it
        end                    there once all ranks are asked to end, also those on other machines

A heartbeat is one line, overwritten in place: some microseconds, against the tenths of a second that an
instruction takes. By the checksum at its end a reader knows that it has all of it. On a GPU it says what the rank has
begun to submit, which runs ahead of what the device computes. Standard library only.
"""

import faulthandler
import json
import os
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipetutor.core.observer import Observer, Peers
from pipetutor.schedule.orders import Instruction

__all__ = ["Beat", "Heartbeat", "ask_to_end", "culprits", "end_with_run", "read"]

STACK_SIGNAL = signal.SIGUSR1
COLLECTIVES = ("ReduceGrads", "OptimizerStep", "AggregateLoss", "Barrier")
END, LOOK_SECONDS = "end", 1.0
_LOOKS = 3  # at a heartbeat that is being written


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
        host: the name of the host that the rank is on.
        pid: its process there.
    """

    rank: int
    phase: str = "starting"
    step: int = 0
    instruction: str = ""
    micro_batch: int | None = None
    peers: Sequence[int] = field(default_factory=list)
    progress: int = 0
    since: float = 0.0
    host: str = ""
    pid: int = 0

    def __str__(self) -> str:
        where = f"in step {self.step}" if self.phase == "training" else f"{self.phase} after step {self.step}"
        if not self.instruction:
            return where if self.step else self.phase
        whole = "" if self.micro_batch is None else f" of micro-batch {self.micro_batch}"
        wait = f", which needs rank {' and '.join(map(str, self.peers))}" if self.peers else ""
        return f"{self.instruction}{whole} {where}{wait}"


class Heartbeat(Observer):
    """Writes what this rank is doing; without a run directory it keeps silent."""

    def __init__(self, directory: Path | None, rank: int):
        self.beat, self._place = Beat(rank), {"host": socket.gethostname(), "pid": os.getpid()}
        self._file, self._width = -1, 0
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

    def before(self, instruction: Instruction, peers: Peers = ()) -> None:
        """Say what the rank is about to execute; an evaluation moves onward with each of its instructions."""
        was = self.beat
        moved = was.progress + (was.phase == "evaluating")
        self.beat = Beat(was.rank, was.phase, was.step, instruction.name, instruction.micro_batch, list(peers), moved)
        self._write()

    def _write(self) -> None:
        if self._file >= 0:
            text = json.dumps(vars(self.beat) | self._place | {"since": time.time()}, allow_nan=False)
            line = f'{text[:-1]}, "sum": {zlib.crc32(text.encode())}}}'
            self._width = max(self._width, len(line))  # blanks cover what is left of a longer one
            os.pwrite(self._file, line.ljust(self._width).encode(), 0)


def ask_to_end(directory: Path, ended: Callable[[], bool] = lambda: False) -> None:
    """Ask all ranks of a run to end, wherever they are: each looks for a file in the directory that they share.

    Args:
        directory: the run directory.
        ended: waits for that, and says whether all have ended; else the file stays for those that come late.
    """
    (directory / END).touch()
    if ended():
        (directory / END).unlink()


def end_with_run(directory: Path) -> None:
    """End this process, a rank, as soon as somebody has asked all ranks of the run to end."""

    def look() -> None:
        while not (directory / END).exists():
            time.sleep(LOOK_SECONDS)
        os._exit(130)

    threading.Thread(target=look, daemon=True).start()


def read(directory: Path) -> list[Beat]:
    """Return the last heartbeat of every rank that has one, in the order of ranks."""
    beats = []
    for path in directory.glob("heartbeat_rank*.json"):
        for _ in range(_LOOKS):
            with suppress(ValueError):  # empty, or caught half-way through a write
                beats.append(_whole(path.read_text().rstrip()))
                break
    return sorted(beats, key=lambda beat: beat.rank)


def _whole(line: str) -> Beat:
    """Read a heartbeat; raise ValueError where it is not all of one."""
    head, _, found = line.rpartition(', "sum": ')
    if found != f"{zlib.crc32(f'{head}}}'.encode())}}}":
        raise ValueError("parts of two heartbeats")
    return Beat(**json.loads(f"{head}}}"))


def culprits(beats: Sequence[Beat]) -> list[list[Beat]]:
    """Find whom a stalled run waits for.

    A rank that sends or receives waits for its peer. A rank in a collective waits for those peers that are not
    in it with it. Follow these waits: they end at a rank that waits for nobody, or go round in a circle, whose
    ranks wait for each other. Who only waits for a circle, from outside, is not to blame.

        rank 0: RecvGrad  --needs-->  rank 1: ForwardPass                               culprit: rank 1
        rank 2: RecvGrad  --needs-->  rank 1: RecvGrad  <--need each other-->  rank 0   culprits: ranks 0 and 1

    In the graph of waits these are the strongly connected components that no wait leads out of.

    Args:
        beats: the last heartbeat of every rank.

    Returns:
        One list for each culprit: a rank that waits for nobody, or all ranks of a circle.

    >>> [[beat.rank for beat in found] for found in culprits([Beat(0, "training", 3, "RecvGrad", 0, [1]), Beat(1)])]
    [[1]]
    """
    by_rank = {beat.rank: beat for beat in beats}

    def needs(beat: Beat) -> list[int]:
        """Return the ranks that this one waits for itself."""
        place = (beat.phase, beat.step, beat.instruction)
        peers = [by_rank[rank] for rank in beat.peers if rank in by_rank]
        if beat.instruction in COLLECTIVES:
            peers = [peer for peer in peers if (peer.phase, peer.step, peer.instruction) != place]
        return [peer.rank for peer in peers]

    def reach(rank: int) -> set[int]:
        """Return the ranks that this one waits for, itself or through others, and the rank."""
        found, new = {rank}, [rank]
        while new:
            more = set(needed[new.pop()]) - found
            found |= more
            new += more
        return found

    needed = {rank: needs(beat) for rank, beat in by_rank.items()}
    reached = {rank: reach(rank) for rank in by_rank}
    ends: list[set[int]] = []
    for found in reached.values():
        if found not in ends and all(reached[other] == found for other in found):
            ends.append(found)
    return [[by_rank[rank] for rank in sorted(end)] for end in ends]


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
