"""Costs over links are those of the links: what a clock tells is asserted as bounds that hold on any machine."""

import math
import os

import pytest
from conftest import processes_of
from test_costs import made

from pipetutor.costs.links import on_paper, over, ring
from pipetutor.costs.messages import link, means
from pipetutor.costs.table import LayerCosts
from pipetutor.processes.watch import RunFailed
from pipetutor.schedule.simulate import Costs
from pipetutor.system.links import Link
from pipetutor.system.namespaces import check_hosts

LATENCY, RATE, BURST, BUFFER = 0.001, 1e6, 1e5, 1e6


def seconds(size, free=BURST):
    """What a message over a link takes that lets some bytes through at once."""
    return LATENCY + max(size - free, 0) / RATE


def test_a_link_is_recovered_from_its_messages():
    sizes = [1000, 500_000, 2_000_000]
    found = link([(size, seconds(size)) for size in sizes], sent=seconds(2_000_000, BUFFER))
    assert found == pytest.approx({"latency": LATENCY, "bandwidth": RATE, "burst": BURST, "buffer": BUFFER})


@pytest.mark.parametrize("ways", [(0.1, 0.2, 0.1), (0.1, 0.1, 0.1), (0.5, 0.1, 0.2)])
def test_a_link_is_one_whatever_other_work_has_done_to_its_messages(ways):
    found = link(list(zip([1000, 500_000, 1_000_000], ways, strict=True)), sent=9.0)
    costs = Costs((1, 1), (1, 1), (1, 1), message_bytes=(10_000,), **found)
    assert found["bandwidth"] < math.inf, "JSON has no word for it"
    assert 0 <= costs.message(0) < 1


def test_a_mean_is_its_copies_and_its_sum():
    sums = [(ranks, size, 0.5 + ranks * size / 1e6) for ranks in (2, 4) for size in (4000, 1_000_000)]
    copies = [(1_000_000, 0.25), (2_000_000, 0.5)]
    assert means(sums, copies) == (
        (2, pytest.approx(0.5), pytest.approx(1e6 / 2.25)),
        (4, pytest.approx(0.5), pytest.approx(1e6 / 4.25)),
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_a_ring_carries_what_its_ranks_send(ranks):
    """Each round every rank sends one share to the next one; twice R - 1 rounds."""
    rounds = [1e6 / ranks for _ in range(2) for _ in range(ranks - 1)]
    assert ring(ranks, 1e6, 8e3) == pytest.approx(sum(rounds) / 1e3)


def test_theory_adds_the_ring_to_a_mean_and_slows_messages():
    costs = made(reduce=((2, 0.5, 1e6), (4, 0.5, 1e6)), bandwidth=1e6)
    slow = on_paper(costs, 8e3)  # 1000 bytes a second, of which headers take some
    carried = [latency + 1e6 / bandwidth - 1.5 for _, latency, bandwidth in slow.reduce]
    assert carried == pytest.approx([1000 * 1.0456, 1500 * 1.0456], rel=1e-3)
    assert slow.bandwidth == pytest.approx(1000 / 1.0456, rel=1e-3)
    free = on_paper(costs, math.inf)
    assert (free.bandwidth, free.reduce) == (1e6, ((2, 0.5, pytest.approx(1e6)), (4, 0.5, pytest.approx(1e6))))
    with pytest.raises(ValueError, match="rate is 0 bits a second: use more than 0"):
        on_paper(costs, 0)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"hosts": 1}, "hosts is 1, but must be a whole number of at least 2"),
        ({"hosts": 3}, "measured with ranks=2, which 3 hosts cannot share evenly: measure with ranks=3, or a multip"),
        ({"link": "fast"}, "link 'fast': it takes a rate"),
        (
            {"link": "100kbit"},
            "link '100kbit': messages take too long to measure at less than 1mbit a second",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_starts(given, words, runs):
    with pytest.raises(ValueError, match=words):
        over(made(), **given, runs_dir=runs)
    assert not runs.exists()


def test_a_machine_without_the_tools_is_refused(runs, monkeypatch):
    monkeypatch.setattr("pipetutor.system.namespaces.PATH", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"hosts on one machine need .*tc, which this one lacks: install"):
        over(made(), link="10mbit", runs_dir=runs)
    assert not runs.exists()


@pytest.fixture
def hosts():
    try:
        check_hosts([Link(1e7)])
    except ValueError as refusal:
        pytest.skip(str(refusal))


def test_a_slow_link_takes_what_its_rate_says_at_least(runs, hosts):
    """A token bucket lets no more through than its rate, but for what it saved up."""
    costs = made()
    free = over(costs, link="unlimited", runs_dir=runs)
    slow = over(costs, link="10mbit", runs_dir=runs)
    assert LayerCosts.load(slow.directory) == slow and slow.layers == costs.layers
    size = 100e6
    ((ranks, latency, bandwidth),) = slow.reduce
    assert ranks == 2 and latency + size / bandwidth > ring(2, size, 10e6) / 2, "no mean is faster than the link"
    assert slow.bandwidth < 2 * 10e6 / 8, "bytes a second; other work may have held the shorter message up"
    assert free.bandwidth > 2 * slow.bandwidth and free.reduce[0][2] > 2 * bandwidth
    assert 0 <= slow.latency < 10 and slow.burst >= 0 and slow.buffer >= 0
    assert not processes_of(runs.parent)


def test_four_ranks_on_two_hosts_have_fast_means_within_a_host(runs, hosts):
    """And slow ones over all: a mean over two is that of neighbours in number, which share a host."""
    slow = over(made(ranks=4), link="10mbit", runs_dir=runs)
    within, (four, _, between) = slow.reduce
    assert (within[0], four) == (2, 4) and within[2] > 2 * between


def test_a_measurement_that_fails_says_why(runs, hosts, monkeypatch):
    (runs.parent / "torch.py").write_text("raise RuntimeError('no eyes')")
    monkeypatch.setenv("PYTHONPATH", f"{runs.parent}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(RunFailed, match=r"pipetutor.costs.messages ended with status 1:(.|\n)*RuntimeError: no eyes"):
        over(made(), runs_dir=runs)
