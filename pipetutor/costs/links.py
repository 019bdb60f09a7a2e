"""What a model's ranks take when they stand on hosts with links between them: bytes become seconds.

A few messages are sent and a few sums taken, in ranks on hosts like those of ``launch(hosts=2, link="100mbit")``, and
the costs of the layers get what they took. The network limits a link with a token bucket (tc-tbf(8)): what was saved
up in a pause goes through at once, and then the rate counts, of all bytes, headers among them.
"""

from dataclasses import replace
from pathlib import Path

from pipetutor.core import records
from pipetutor.costs.table import LayerCosts
from pipetutor.processes import network
from pipetutor.processes.entry import briefly
from pipetutor.processes.environment import cpu_environment
from pipetutor.processes.job import run_job
from pipetutor.system.kinds import check, whole
from pipetutor.system.links import Link, parse_links
from pipetutor.system.namespaces import check_hosts

__all__ = ["on_paper", "over", "ring"]

LONGEST_MESSAGE, LONGEST_SUM = 2**22, 2**26  # bytes: enough where a link has no limit
MESSAGE_SECONDS, SUM_SECONDS = 0.4, 1.5  # that the longest one may take where it has one
LEAST_MESSAGE = 2**19  # bytes: several times what a link lets through at once
LEAST_RATE = 1e6  # bits a second
PAYLOAD = 1448 / 1514  # of each packet; the rest is headers of TCP, IP and Ethernet, and the rate counts them
MEASUREMENTS = 4  # messages, sending, copies and sums


@briefly
def over(costs: LayerCosts, hosts: int = 2, link: str = "unlimited", *, runs_dir: str | Path = "runs") -> LayerCosts:
    """Return costs for ranks on several hosts: the same layers, and messages over a link, measured now.

    It takes some ten seconds. The ranks are spread over the hosts as ``launch`` spreads them. A message has the
    costs of one between hosts, also where two stages are on the same host; a mean those of the ranks that take it.

    Args:
        costs: of the layers, measured with as many ranks as all hosts have together.
        hosts: how many.
        link: between every two of them, as in ``launch``.
        runs_dir: where the directory with ``costs.json`` is made.

    Raises:
        ValueError: something asked for cannot work; nothing was started.
        RunFailed: a measuring process failed.

    >>> slow = over(measure(ranks=2), hosts=2, link="100mbit")  # doctest: +SKIP
    >>> slow.for_bounds([0, 22], 4, replicas=2).all_reduce  # doctest: +SKIP
    [20.8]
    """
    check("hosts", hosts, whole(2))
    check("link", link, "text")
    rate = Link.parse(link).rate
    if rate < LEAST_RATE:
        raise ValueError(f"link {link!r}: messages take too long to measure at less than {Link(LEAST_RATE)} a second")
    if costs.ranks % hosts:
        raise ValueError(
            f"the costs were measured with ranks={costs.ranks}, which {hosts} hosts cannot share "
            f"evenly: measure with ranks={hosts}, or a multiple of it"
        )
    links = parse_links(hosts, link)
    check_hosts(links.values())
    directory = records.create(Path(runs_dir), "links")
    longest = int(max(LEAST_MESSAGE, min(LONGEST_MESSAGE, MESSAGE_SECONDS * rate / 8)))
    count = int(min(LONGEST_SUM, SUM_SECONDS * rate / 8)) // 4
    asked = {"ranks": costs.ranks, "longest": longest, "count": count}
    env = cpu_environment(costs.ranks) | network.ENVIRONMENT
    total = MEASUREMENTS + 1
    rows = run_job("pipetutor.costs.messages", directory, asked, env, total, "measurements", lambda _: link, links)
    *_, found = rows
    reduce = tuple(map(tuple, found.pop("reduce")))
    measured = replace(costs, **found, reduce=reduce, directory=directory)
    measured.save()
    return measured


def ring(ranks: int, size: float, rate: float) -> float:
    """Return the least seconds that a sum over a ring of ranks takes, as gloo takes one of large tensors.

    Each rank sends R - 1 shares of 1/R while they are added up, and as many while the sums go round:

        2 (R - 1) / R * bytes / rate

    (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.) Each link
    carries that much one way, and as much the other way at the same time where R is 2.

    Args:
        ranks: how many, R.
        size: bytes of each rank.
        rate: bits a second that a link carries one way.

    >>> f"{ring(2, 228e6, 100e6):.2f}"
    '18.24'
    """
    return 2 * (ranks - 1) / ranks * size * 8 / rate


def on_paper(costs: LayerCosts, rate: float) -> LayerCosts:
    """Return costs for links of any rate, by closed forms alone, and not by what they would be measured to be.

        message   latency + bytes / the smaller of two bandwidths: the link's, and that without a limit
        mean      what it takes without a limit, and then the ring's time

    A link adds headers to each packet. That it lets a burst through at once is left out, and so is that a rank can
    add up while it sends: in truth both are a little faster.

    Args:
        costs: without a limit: of one machine, or ``over`` an unlimited link.
        rate: bits a second.

    Raises:
        ValueError: the rate is not above 0.

    >>> on_paper(measure(ranks=2), 1e8).for_bounds([0, 22], 4, replicas=2).all_reduce  # doctest: +SKIP
    [19.4]
    """
    if not rate > 0:
        raise ValueError(f"rate is {rate} bits a second: use more than 0")
    useful = PAYLOAD * rate
    reduce = tuple(
        (ranks, latency, 1 / (1 / bandwidth + ring(ranks, 1, useful))) for ranks, latency, bandwidth in costs.reduce
    )
    return replace(costs, bandwidth=min(costs.bandwidth, useful / 8), burst=0.0, reduce=reduce)
