"""The links between the hosts of a run: how many bits a second go through each way, and how long the first one takes.

    "100mbit"                               every two hosts
    "1gbit 5ms"                             with a delay of 5 ms each way
    "0-1 10gbit, 2-3 10gbit, others 1gbit"  hosts 0 and 1, hosts 2 and 3, and any other two
    {"0-1": "10gbit", "others": "1gbit"}    the same, in a cell

Standard library only.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipetutor.system.kinds import shown

__all__ = ["EXAMPLE", "Link", "hosts_of", "parse_links"]

EXAMPLE = "'100mbit', '1gbit 5ms' or {'0-1': '10gbit', 'others': '100mbit'}"
UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
DELAYS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
LEAST, MOST = 1e4, 1e12  # bits a second
LONGEST = 10.0  # seconds of delay
UNLIMITED = "unlimited"
OTHERS = "others"


@dataclass(frozen=True)
class Link:
    """A link between two hosts, the same both ways.

    Attributes:
        rate: bits a second; infinite where nothing limits it.
        delay: seconds from one end to the other, beside those that the rate takes.
    """

    rate: float = math.inf
    delay: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Link":
        """Read a link such as ``100mbit`` or ``1gbit 5ms``; ``unlimited`` has no rate.

        Raises:
            ValueError: it is none; the message has an example.
        """
        found = re.fullmatch(
            r"\s*(?:(\d+(?:\.\d+)?)\s*([kmg]?bit)|unlimited)(?:\s+(\d+(?:\.\d+)?)\s*(us|ms|s))?\s*", str(text)
        )
        if not found:
            raise ValueError(
                f"link {shown(text)}: it takes a rate (bit, kbit, mbit, gbit) and maybe a delay: {EXAMPLE}"
            )
        number, unit, delay, seconds = found.groups()
        link = cls(float(number) * UNITS[unit] if number else math.inf, float(delay or 0) * DELAYS.get(seconds, 0.0))
        if number and not LEAST <= link.rate <= MOST:
            raise ValueError(f"link {shown(text)}: a rate is at least 10kbit and at most 1000gbit a second")
        if link.delay > LONGEST:
            raise ValueError(f"link {shown(text)}: a delay is at most {LONGEST:g} s")
        return link

    def __str__(self) -> str:
        unit, size = next(((unit, size) for unit, size in reversed(UNITS.items()) if self.rate >= size), ("bit", 1.0))
        rate = UNLIMITED if math.isinf(self.rate) else f"{self.rate / size:g}{unit}"
        return rate + (f" {self.delay * 1e3:g}ms" if self.delay else "")


def parse_links(hosts: int, given: str | Mapping[str, str] | None) -> dict[tuple[int, int], Link]:
    """Return the link between every two hosts.

    Args:
        hosts: how many there are, numbered from 0.
        given: one link for all, or one for each pair ``A-B``; ``others`` is for those that are not named, which have
            no limit without it.

    Raises:
        ValueError: a link is none, a host is not there, or a pair is named twice.

    >>> {pair: str(link) for pair, link in parse_links(3, "0-1 10gbit, others 1gbit").items()}
    {(0, 1): '10gbit', (0, 2): '1gbit', (1, 2): '1gbit'}
    """
    pairs = list(itertools.combinations(range(hosts), 2))
    if given is None or (isinstance(given, str) and not re.match(r"\s*(\d+-\d+|others)\b", given)):
        link = Link() if given is None else Link.parse(given)
        return dict.fromkeys(pairs, link)
    if isinstance(given, str):
        named = [(name, rate) for name, _, rate in (part.strip().partition(" ") for part in given.split(","))]
    else:
        named = list(given.items())
    found: dict[tuple[int, int], Link] = {}
    others: Link | None = None
    for name, rate in named:
        link = Link.parse(rate)
        ends = re.fullmatch(r"(\d+)-(\d+)", str(name))
        if name == OTHERS and others is None:
            others = link
            continue
        pair = tuple(sorted(map(int, ends.groups()))) if ends else ()
        if pair not in pairs or pair in found:
            raise ValueError(
                f"link between {shown(name)}: name two of the hosts 0 to {hosts - 1}, each pair once, or "
                f"others: {EXAMPLE}"
            )
        found[pair] = link
    return {pair: found.get(pair, others or Link()) for pair in pairs}


def hosts_of(links: Iterable[tuple[int, int]]) -> int:
    """Return how many hosts links join, 0 for none."""
    return max((1 + host for pair in links for host in pair), default=0)
