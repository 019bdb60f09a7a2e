"""What the planner ranks first is first when it runs: each choice of six plans is trained for a few steps."""

import os
import textwrap
from collections import defaultdict

import numpy as np
import pytest

from pipetutor import launch
from pipetutor.costs import measure
from pipetutor.costs.links import over
from pipetutor.planner.plan import plan
from pipetutor.system import machine
from pipetutor.system.links import Link
from pipetutor.system.namespaces import check_hosts

pytestmark = pytest.mark.slow

# Most weights are those of one layer, as in AlexNet; a mean of all takes seconds over the slowest link, no minute.
MODULE = """
    from torch import nn

    def net():
        layers = [nn.Conv2d(3, 32, 7, 4, 3), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(6), nn.Flatten()]
        return [*layers, nn.Linear(4608, 1024), nn.ReLU(), nn.Linear(1024, 10)]
"""
LINKS, BATCHES, MICRO_BATCH = ("unlimited", "1gbit", "100mbit"), (64, 256), 16  # so M is 2 to 16


def places(values):
    """Return the place of each value in their order."""
    return np.argsort(np.argsort(values))


@pytest.mark.timeout(3600)
def test_runs_take_the_order_that_is_planned(runs, tmp_path):
    """Two stages, two replicas, and two with ZeRO-1, over three links and with two batches: 18 runs."""
    try:
        check_hosts([Link(1e8)])
    except ValueError as refusal:
        pytest.skip(str(refusal))
    (tmp_path / "planned.py").write_text(textwrap.dedent(MODULE))
    print(f"\n{machine.cpu_name()}, {machine.cpu_cores()} cores")
    found = defaultdict(list)
    for link in LINKS:
        costs = measure("planned:net", MICRO_BATCH, ranks=2, runs_dir=runs)  # beside the runs: the load changes
        linked = over(costs, hosts=2, link=link, runs_dir=runs)
        for batch in BATCHES:
            plans = plan(linked, "hosts=2,devices=1,memory=8GB", batch, each=("stages", "zero_stage"))
            for choice in plans.choices:
                run = launch(**choice.options(), hosts=2, link=link, steps=6, runs_dir=runs)
                took, load = min(run.seconds[1:]), os.getloadavg()[0]  # other work only makes a step longer
                found[link, batch].append((choice.seconds, took))
                error = choice.seconds / took - 1
                print(
                    f"{link:10} batch {batch:3}  {choice.layout!s:62} predicted {choice.seconds:6.3f} s, "
                    f"took {took:6.3f} s, {error:+4.0%}, load {load:.1f}",
                    flush=True,
                )
    predicted, took = zip(*(pair for plans in found.values() for pair in plans), strict=True)
    correlation = np.corrcoef(places(predicted), places(took))[0, 1]
    firsts, bests = ({link: 0.0 for link in LINKS} for _ in range(2))
    for (link, _), pairs in found.items():
        firsts[link] += pairs[0][1]
        bests[link] += min(took for _, took in pairs)
    lost = {link: firsts[link] / bests[link] - 1 for link in LINKS}
    print(f"Spearman's rank correlation of {len(took)} runs: {correlation:.3f}")
    print("first choices behind the best:", ", ".join(f"{link} {share:.1%}" for link, share in lost.items()))
    assert len(took) == 18 and correlation >= 0.9
    assert max(lost.values()) <= 0.1
