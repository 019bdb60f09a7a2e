"""What messages between ranks take: from one to the next, and a mean that several take of their gradients.

    message   0 -- latency --|-- (bytes - burst) / bandwidth --|   there; its sender goes on earlier
    mean      |-- copy --|-- latency + bytes / bandwidth, a sum --|-- divide, copy back --|

``costs.ranks`` measures them on one machine, beside the layers. Run as a job, one process a host forks the host's
ranks, for ``costs.links``.
"""

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipetutor.core import records
from pipetutor.processes.forks import forked, meet
from pipetutor.processes.host import hosts_made, is_mine
from pipetutor.processes.job import ROWS, do_job

__all__: list[str] = []

TIMES = 15  # that a message is sent
LINK_TIMES = 3  # that either is, over a link
SUM_TIMES = 6  # that a sum is taken
SUMS = (1_000, 1_000_000, 4_000_000)  # numbers in a tensor that is added up
COPIES = (1_000_000, 16_000_000)  # in one that is copied; glibc keeps memory for the first, and none for the second
PATIENCE_SECONDS = 600
SMALL = 4096  # bytes

Sized = tuple[int, float]  # bytes, and seconds
Sum = tuple[int, int, float]  # ranks of a group, bytes of each rank, and seconds


def transfers(rank: int, sizes: Sequence[int], peer: int = 1, times: int = TIMES) -> list[Sized]:
    """Send each size between rank 0 and a peer, to and fro, as activation and gradient; return (bytes, seconds)."""
    found = []
    for size in sizes:
        message, ways = torch.zeros(size, dtype=torch.uint8), []
        for _ in range(times):
            dist.barrier()
            begin = time.perf_counter()
            if rank == 0:
                dist.send(message, peer)
                dist.recv(message, peer)
            elif rank == peer:
                dist.recv(message, 0)
                message.clone()  # as DeepSpeed takes one of each activation
                dist.send(message, 0)
            ways.append((time.perf_counter() - begin) / 2)
        found.append((size, statistics.median(ways)))
    return found


def sending(rank: int, size: int, peer: int = 1) -> float:
    """Return the seconds for which rank 0 is held by sending one message to a peer."""
    message, taken = torch.zeros(size, dtype=torch.uint8), []
    for _ in range(LINK_TIMES):
        dist.barrier()
        begin = time.perf_counter()
        if rank == 0:
            dist.send(message, peer)
        elif rank == peer:
            dist.recv(message, 0)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def sums(rank: int, ranks: int, counts: Sequence[int] = SUMS, times: int = SUM_TIMES) -> list[Sum]:
    """Add up tensors over groups of ranks, all groups at once; return (ranks of a group, bytes, seconds)."""
    found = []
    for size in (n for n in range(2, ranks + 1) if ranks % n == 0):
        starts = range(0, ranks, size)
        groups: list[Any] = [dist.new_group(list(range(first, first + size))) for first in starts]
        for count in counts:
            gradients, taken = torch.ones(count), []
            for _ in range(times):
                dist.barrier()
                begin = time.perf_counter()
                dist.all_reduce(gradients, group=groups[rank // size])
                taken.append(time.perf_counter() - begin)
            found.append((size, gradients.nbytes, statistics.median(taken)))
    return found


def copies() -> list[Sized]:
    """Copy as DeepSpeed does around a sum: all gradients into one tensor, which is divided and copied back."""
    found = []
    for count in COPIES:
        gradients, taken = torch.ones(count), []
        for _ in range(SUM_TIMES):
            dist.barrier()
            begin = time.perf_counter()
            gradients.copy_(gradients.clone().div_(2))
            taken.append(time.perf_counter() - begin)
        found.append((gradients.nbytes, statistics.median(taken)))
    return found


def wire(transfers: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return latency in seconds and bandwidth in bytes a second of a wire, from (bytes, seconds) of its messages.

    They lie on a line, on which each size counts by its relative error. Where other work on the machine has bent it
    below what a wire can be, the latency is 0 or the bandwidth infinite.
    """
    sizes, ways = np.array(transfers).T
    slope, latency = np.polyfit(sizes, ways, 1, w=1 / ways)
    return max(float(latency), 0.0), float(1 / slope) if slope > 0 else float("inf")


def link(transfers: Sequence[Sized], sent: float) -> dict[str, float]:
    """Return what ``LayerCosts`` holds of messages over a link.

    seconds |             /
            |           /      1 / bandwidth is the slope of the longer ones
            |_________/        the line would begin below latency: so many bytes, the burst, go at once
            '---------------- bytes

    Args:
        transfers: of a short message, and of two long ones.
        sent: seconds for which the longest one holds its sender.
    """
    (_, latency), (half, sooner), (longest, later) = transfers
    if later <= sooner:  # other work has hidden the slope: the link is no slower than its longest message
        return {"latency": latency, "bandwidth": longest / later, "burst": 0.0, "buffer": float(longest)}
    bandwidth = (longest - half) / (later - sooner)
    burst, buffer = (longest - bandwidth * max(seconds - latency, 0.0) for seconds in (later, sent))
    return {"latency": latency, "bandwidth": bandwidth, "burst": max(burst, 0.0), "buffer": max(buffer, 0.0)}


def means(sums: Sequence[Sum], copies: Sequence[Sized]) -> tuple[tuple[int, float, float], ...]:
    """Return what ``LayerCosts.reduce`` holds: latency and bandwidth of a mean over each number of ranks."""
    of_ranks: dict[int, list[Sized]] = defaultdict(list)
    for ranks, size, seconds in sums:
        of_ranks[ranks].append((size, seconds))
    begin, copied = wire(copies)
    found = []
    for ranks, taken in of_ranks.items():
        latency, bandwidth = wire(taken)
        found.append((ranks, begin + latency, 1 / (1 / copied + 1 / bandwidth)))
    return tuple(found)


def _rank(rank: int, ranks: int, share: int, longest: int, count: int, directory: Path) -> dict[str, Any]:
    """Measure in one rank, while the others do the same."""
    meet(rank, ranks, directory / "store")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = value
        if rank == 0:
            records.append(directory / ROWS, {"measured": name, "found": value})

    long_ones = transfers(rank, (longest // 2, longest), peer=share, times=LINK_TIMES)
    keep("transfers", [*transfers(rank, (SMALL,), peer=share), *long_ones])
    keep("sent", sending(rank, longest, peer=share))
    keep("copies", copies())
    keep("sums", sums(rank, ranks, (1_000, count // 4, count), times=LINK_TIMES))
    return found


def _work(directory: Path, asked: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Fork the ranks of this host; the first host yields what ``LayerCosts`` holds of messages."""
    hosts = hosts_made()
    host = next(number for number in range(hosts) if is_mine(number))
    share = asked["ranks"] // hosts
    works = [
        functools.partial(_rank, rank, asked["ranks"], share, asked["longest"], asked["count"], directory)
        for rank in range(host * share, (host + 1) * share)
    ]
    found = forked(works, directory / "logs" / f"ranks_of_host{host}.log", PATIENCE_SECONDS)
    if host == 0:
        of_first = found[0]
        reduce = means(of_first["sums"], of_first["copies"])
        yield {**link(of_first["transfers"], of_first["sent"]), "reduce": reduce}


if __name__ == "__main__":
    do_job(_work)
