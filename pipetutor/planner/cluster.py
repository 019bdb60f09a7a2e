"""A cluster as the planner sees it: hosts of equal devices, a fast link inside a host, a slower one between hosts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipetutor.planner.reading import quantity, read, whole_number
from pipetutor.system.kinds import check, shown

__all__ = ["CLUSTERS", "EXAMPLE", "Cluster", "Link"]

EXAMPLE = "hosts=2,devices=8,memory=80GB,flops=312T,inside=300GB/s,between=25GB/s+5us"


@dataclass(frozen=True)
class Link:
    """What joins two devices.

    Attributes:
        bandwidth: bytes a second that each device sends over it while it receives as many.
        latency: seconds of a message of 0 bytes.

    >>> Link.parse("25GB/s+5us").seconds(25e9)
    1.000005
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name, value, least in (("bandwidth", self.bandwidth, "above 0"), ("latency", self.latency, "from 0 up")):
            if not (value > 0 or (name == "latency" and value == 0)) or math.isnan(value):
                raise ValueError(f"a link's {name} is {shown(value)}: use a number {least}")

    @classmethod
    def parse(cls, text: str) -> "Link":
        """Read a link such as ``25GB/s``, ``100mbit`` or, with a latency, ``25GB/s+5us``.

        Raises:
            ValueError: it is none.
        """
        bandwidth, plus, latency = text.partition("+")
        return cls(quantity(bandwidth, "B/s"), quantity(latency, "s") if plus else 0.0)

    def seconds(self, size: float) -> float:
        """Return the seconds of a message of so many bytes."""
        return self.latency + size / self.bandwidth

    def ring(self, ranks: int, size: float) -> float:
        """Return the seconds of an all-reduce of so many bytes over a ring whose slowest link this is.

        Each rank sends R - 1 of R parts of it to be added up, and again R - 1 sums: 2(R-1) messages of size/R
        (Patarasuk and Yuan, doi:10.1016/j.jpdc.2008.09.002).

        >>> Link(1e9).ring(4, 4e9)
        6.0
        """
        return 2 * (ranks - 1) * self.seconds(size / ranks)


@dataclass(frozen=True)
class Cluster:
    """Hosts with devices.

    Attributes:
        hosts: number of them.
        devices: of each host.
        memory: bytes of each device.
        flops: FLOP/s at which a device multiplies matrices by its data sheet; None where costs are measured.
        efficiency: the share of that which it reaches.
        inside: the link between two devices of a host; None where each host has one.
        between: the link between devices of two hosts, for each device where all send; None for a single host.
        memory_bandwidth: bytes a second that a device reads or writes of its memory, which is what an optimizer's
            step takes; infinite: a step takes no time.

    Raises:
        ValueError: there is no such cluster.

    >>> Cluster.parse("hosts=2,devices=1,memory=4GB").ranks
    2
    """

    hosts: int
    devices: int
    memory: float
    flops: float | None = None
    inside: Link | None = None
    between: Link | None = None
    efficiency: float = 0.5
    memory_bandwidth: float = math.inf

    def __post_init__(self) -> None:
        check("hosts", self.hosts, "count", "cluster: ")
        check("devices", self.devices, "count", "cluster: ")
        for name in ("memory", "flops", "efficiency", "memory_bandwidth"):
            value = getattr(self, name)
            if not (value is None and name == "flops") and not value > 0:
                raise ValueError(f"cluster: {name} is {shown(value)}: use a number above 0")
        if self.efficiency > 1:
            raise ValueError(f"cluster: efficiency is {self.efficiency}: use a share of at most 1")

    @classmethod
    def parse(cls, text: str) -> "Cluster":
        """Read a cluster: one of ``CLUSTERS``, ``dgx-a100:hosts=48``, or as ``EXAMPLE``.

        Raises:
            ValueError: it is none; the message says what is wrong.
        """
        _, values = read(text, "cluster", CLUSTERS, KEYS, EXAMPLE)
        missing = [key for key in ("hosts", "devices", "memory") if key not in values]
        if missing:
            raise ValueError(f"cluster {shown(text)} needs {', '.join(missing)}, as in {EXAMPLE}")
        return cls(**values)

    @property
    def ranks(self) -> int:
        """Number of devices."""
        return self.hosts * self.devices

    def link(self, crosses: bool) -> Link:
        """Return the link between two devices.

        Args:
            crosses: whether they are on two hosts.

        Raises:
            ValueError: the cluster does not say.
        """
        link, name = (self.between, "between") if crosses else (self.inside, "inside")
        if link is None:
            hosts = "of two hosts" if crosses else "of a host"
            raise ValueError(f"cluster: {name} is not given, the link between devices {hosts}: {name}=25GB/s, say")
        return link

    def seconds(self, operations: float) -> float:
        """Return how long a device takes for so many FLOPs of matrix products.

        Raises:
            ValueError: the cluster does not say.
        """
        if self.flops is None:
            raise ValueError("cluster: flops is not given, what a device computes in a second: flops=312T, say")
        return operations / (self.flops * self.efficiency)


KEYS: dict[str, Callable[[str], Any]] = {
    "hosts": whole_number,
    "devices": whole_number,
    "memory": partial(quantity, unit="B"),
    "flops": partial(quantity, unit="FLOP/s"),
    "inside": Link.parse,
    "between": Link.parse,
    "efficiency": partial(quantity, unit=""),
    "memory_bandwidth": partial(quantity, unit="B/s"),
}
# Data sheets: peak of dense 16-bit matrix products; NVLink and InfiniBand in each direction, for each device.
CLUSTERS: dict[str, dict[str, Any]] = {
    # Selene, on which Megatron-LM's table was measured (arXiv:2104.04473, section 5): 8 HDR InfiniBand cards a host.
    "dgx-a100": {
        "hosts": 384,
        "devices": 8,
        "memory": 80e9,
        "flops": 312e12,
        "inside": Link(300e9, 3e-6),
        "between": Link(25e9, 5e-6),
        "memory_bandwidth": 2.0e12,
    },
    "dgx-h100": {
        "hosts": 32,
        "devices": 8,
        "memory": 80e9,
        "flops": 989e12,
        "inside": Link(450e9, 3e-6),
        "between": Link(50e9, 5e-6),
        "memory_bandwidth": 3.35e12,
    },
}
