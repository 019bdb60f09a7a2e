"""The clock by which a rank times its instructions, and how much memory it has.

On a CPU it is the host's clock (``CLOCK_MONOTONIC``), which all ranks of a host share, and the process's resident
set. On CUDA it is events on the stream, because the host runs ahead of the device, and torch's allocator. Ranks
of other hosts estimate how far their clock is off. torch is imported only on a rank.
"""

import gc
import os
import time
from pathlib import Path
from typing import Any

__all__: list[str] = []

ROUNDS = 20  # of the exchange that estimates a clock's offset: the quickest one counts
PAGE = os.sysconf("SC_PAGE_SIZE")


class HostClock:
    """Times of a rank that computes on the CPU, where an instruction has ended when its call returns."""

    def __init__(self) -> None:
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)

    def start(self) -> None:
        """Begin a step: its peak of memory counts from here."""
        Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> float:
        """Mark a moment."""
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        """Return a mark as seconds of the host's clock."""
        return mark

    def memory(self) -> int:
        """Return the bytes that this process has in memory for itself: its resident set without mapped files."""
        _, resident, files, *_ = os.pread(self._statm, 64, 0).split()
        return (int(resident) - int(files)) * PAGE

    def tensors(self) -> int:
        """Return the bytes of all tensors that Python knows of; what autograd keeps for itself is not among them."""
        import torch

        alive = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        storages = [each.untyped_storage() for each in alive if each.device.type == "cpu"]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def peak(self) -> int:
        """Return the most of it since ``start``."""
        status = Path("/proc/self/status").read_text()
        names = ("VmHWM:", "RssFile:", "RssShmem:")
        highest, files, shared = (int(status.split(name)[1].split()[0]) for name in names)
        return (highest - files - shared) * 1024


class CudaClock:
    """Times of a rank that computes on a GPU: events on its stream, tied to the host's clock once a step."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda

    def start(self) -> None:
        """Begin a step, with the device idle, so that one event and one reading of the host's clock are the same."""
        self._cuda.reset_peak_memory_stats()
        self._cuda.synchronize()
        self._anchor, self._begin = self.now(), time.perf_counter()

    def now(self) -> Any:
        """Mark a moment on the stream."""
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: Any) -> float:
        """Return a mark as seconds of the host's clock, having waited for the device to pass it."""
        mark.synchronize()
        return self._begin + self._anchor.elapsed_time(mark) / 1e3

    def memory(self) -> int:
        """Return the bytes that torch's allocator has handed out."""
        return self._cuda.memory_allocated()

    def tensors(self) -> int:
        """Return the same: torch's allocator hands memory out to tensors alone."""
        return self.memory()

    def peak(self) -> int:
        """Return the most of it since ``start``."""
        return self._cuda.max_memory_allocated()


def clock_offset(device: Any, host: str | None = None) -> float:
    """Estimate how many seconds this rank's clock is behind that of rank 0; every rank calls this.

    Ranks of one host share a clock. Of every other host one rank exchanges its time with rank 0, and the
    quickest of ``ROUNDS`` exchanges counts: the answer was given between its begin and its end, so the estimate is
    off by half of that at the most (D. L. Mills, RFC 5905).

    Args:
        device: where the backend wants its tensors.
        host: what tells hosts apart; the system's boot by default.
    """
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    here = host or Path("/proc/sys/kernel/random/boot_id").read_text()
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, here)
    found = 0.0
    message = torch.zeros(1, dtype=torch.float64, device=device)
    for leader in sorted({hosts.index(host) for host in hosts} - {0}):
        exchanges = []
        for _ in range(ROUNDS if rank in (0, leader) else 0):
            begin = time.perf_counter()
            if rank == 0:
                dist.recv(message, leader)
                message.item()  # on a GPU, recv returns before the message is there
                dist.send(message.fill_(time.perf_counter()), leader)
            else:
                dist.send(message, 0)
                dist.recv(message, 0)
                answer, end = message.item(), time.perf_counter()
                exchanges.append((end - begin, answer - (begin + end) / 2))
        if exchanges:
            found = min(exchanges)[1]
    offsets: list[Any] = [None] * len(hosts)
    dist.all_gather_object(offsets, found)
    return offsets[hosts.index(here)]
