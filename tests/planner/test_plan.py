"""The search finds what trying everything finds, says why the next one loses, and takes seconds for 512 stages."""

import math
import subprocess
import sys
import time

import pytest
from conftest import HANGS

from pipetutor.core.description import Description, known_data
from pipetutor.core.gpt_sizes import gpt_sizes
from pipetutor.costs import memory
from pipetutor.costs.table import LayerCost, LayerCosts
from pipetutor.options import Options
from pipetutor.planner import published, search
from pipetutor.planner.layout import Layout
from pipetutor.planner.plan import LEGEND, plan, problem_of
from pipetutor.planner.search import judge
from pipetutor.preflight import World, preflight
from pipetutor.schedule.orders import deepspeed_1f1b
from pipetutor.schedule.simulate import simulate
from pipetutor.system.gpus import Gpus

MODEL = "layers=12,width=64,heads=4,sequence=32,vocabulary=500"
LINKS = "flops=1T,inside=1GB/s+5us,between=100MB/s+50us,memory_bandwidth=10GB/s"
CASES = [  # replicas of a stage on one host, on two, and across: the hosts hold 4 or 3 ranks
    (f"hosts=2,devices=4,memory=1GB,{LINKS}", 16, 1),
    (f"hosts=3,devices=4,memory=8MB,{LINKS}", 12, 1),
    (f"hosts=4,devices=3,memory=2.6MB,{LINKS}", 24, 1),
    (f"hosts=6,devices=2,memory=2MB,{LINKS}", 12, 2),
]


@pytest.mark.parametrize("cluster, batch, tensor", CASES)
def test_nothing_is_lost_by_not_playing_all(cluster, batch, tensor):
    problem = problem_of(MODEL, cluster, batch, tensor=tensor)
    played = [judge(problem, layout) for layout in problem.layouts()]
    for each in (("stages",), ("stages", "schedule"), ("zero_stage", "recompute", "micro_batch")):
        best, least = {}, {}
        for choice in played:
            key = tuple(getattr(choice.layout, name) for name in each)
            if choice.memory <= problem.cluster.memory:
                best[key] = min(best.get(key, math.inf), choice.seconds)
            else:
                least[key] = min(least.get(key, math.inf), choice.memory)
        found = search.search(problem, 5, each)
        assert [choice.seconds for choice in found.choices] == pytest.approx(sorted(best.values())[:5])
        wanted = sorted(size for key, size in least.items() if key not in best)
        assert [misfit.memory for misfit in found.misfits] == pytest.approx(wanted)
        assert found.layouts == len(played) and 0 < found.played < len(played) / 2
        print(f"{each}: {found.played} of {found.layouts} played, {len(best)} kinds fit, {len(wanted)} do not")


def test_replicas_that_cross_links_apart_are_all_played():
    """Three replicas on hosts of four: each lies otherwise, and the slowest makes the step."""
    problem = problem_of(MODEL, f"hosts=3,devices=4,memory=1GB,{LINKS}", 24)
    layout = Layout(4, 3, 1, 2, 4)
    costs = problem.costs(layout)
    assert len({tuple(one.message_bytes) for one in costs}) == 3
    assert judge(problem, layout).seconds == max(simulate(layout.streams(), one).seconds for one in costs)


def test_plans_are_a_table_that_says_why_the_next_one_loses():
    plans = plan("gpt2-xl", "dgx-a100:hosts=1,memory=9GB", 64)
    title, head, *rows = str(plans).replace(f"{LEGEND}\n", "").splitlines()
    assert "gpt2-xl on 8 devices, global batch 64" in title and "loses to the one above by" in head
    assert len(rows) == len(plans.choices) + len(plans.misfits) == 4
    for place, choice in enumerate(plans.choices[1:], start=1):
        before = plans.choices[place - 1]
        more = {part: choice.parts[part] - before.parts[part] for part in choice.parts}
        assert max(more, key=more.get) in plans.reason(place) and plans.reason(place) in rows[place]
        assert sum(more.values()) == pytest.approx(choice.seconds - before.seconds)
    assert rows[-1].startswith("does not fit: ") and rows[-1].endswith(" of 9")
    assert plans.reason(0) == "" and plans.best is plans.choices[0]


def test_512_stages_and_thousands_of_devices_take_seconds():
    began = time.monotonic()
    deep = "layers=1024,width=12288,heads=96,sequence=2048,vocabulary=51200"
    plans = plan(deep, "dgx-a100:hosts=512", 512, tensor=8)
    seconds = time.monotonic() - began
    print(f"{seconds:.1f} s\n{plans}")
    assert 512 in [choice.layout.stages for choice in plans.choices]
    assert {len(one.bounds) for one in plans.choices} == {1025} and seconds < 30


def measured():
    """A gpt's costs, as if measured: its blocks take twice as long backward."""
    sizes = gpt_sizes(layers=6, width=64)
    layers = [
        LayerCost(kind, 0.01, 0.01, 0.01, 0.002, count, 4096, ((place, 9000),), True, tied)
        for place, (kind, count, tied) in enumerate(sizes)
    ]
    reduce = ((2, 0.001, 1e8), (4, 0.002, 0.8e8))
    rest = {"load_images": 0.001, "load_labels": 0.001, "copy": 0.0, "latency": 1e-4, "bandwidth": 1e9}
    return LayerCosts(
        "gpt:layers=6,width=64", 4, 4, 1, tuple(layers), 128, optimizer=1e-9, directory=".", reduce=reduce, **rest
    )


def test_measured_costs_are_planned_as_their_runs_are_predicted():
    costs = measured()
    plans = plan(costs, "hosts=1,devices=4,memory=1GB", 32, each=("stages", "zero_stage", "recompute"), top=99)
    assert {(one.layout.stages, one.layout.replicas) for one in plans.choices} == {(1, 4), (2, 2), (4, 1)}
    assert len(plans.choices) == 4 + 4 + 2 and all(one.flops is None for one in plans.choices)
    for choice in plans.choices:
        layout = choice.layout
        if layout.recompute:
            continue
        split = {"replicas": layout.replicas, "zero_stage": layout.zero_stage}
        stages = costs.for_bounds(choice.bounds, layout.micro_batches, **split)
        streams = [list(deepspeed_1f1b(layout.stages, layout.micro_batches, s)) for s in range(layout.stages)]
        assert choice.seconds == simulate(streams, stages).seconds
        rows = memory.predict(costs, choice.bounds, streams, **split)
        assert choice.memory == max(row["parameters"] + row["optimizer"] + row["peak"] for row in rows)
    alone = {one.layout: one.seconds for one in plans.choices if one.layout.stages == 4}
    assert alone[Layout(4, 1, 1, 4, 8, recompute=True)] > alone[Layout(4, 1, 1, 4, 8)]


def test_a_choice_is_what_launch_takes():
    costs = measured()
    for choice in plan(
        costs, "hosts=1,devices=4,memory=1GB", 32, each=("stages", "zero_stage", "recompute"), top=99
    ).choices:
        options = Options(**choice.options(), dataset="sums")
        layout = choice.layout
        about = Description([*gpt_sizes(layers=6, width=64)], known_data("sums"))
        made = preflight(options, World(4, 4, Gpus(0)), about)
        assert (made.batch.micro, made.batch.accumulation) == (layout.micro_batch, layout.micro_batches)
        assert tuple(made.bounds) == choice.bounds


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"model": "gpt4"}, "unknown model 'gpt4'"),
        ({"cluster": "hosts=1,devices=2,memory=4GB"}, "does not fit: the nearest is 2 stages x 1 replica,"),
        ({"cluster": "hosts=1,devices=2,memory=80GB,flops=1T"}, "cluster: inside is not given"),
        ({"global_batch": 0}, "global_batch is 0"),
        ({"global_batch": 7, "cluster": "dgx-a100"}, "no layout of gpt2-xl has 3072 devices and a global batch of 7"),
        ({"tensor": 3}, "and its 8 cannot be divided into groups of 3: use 1, 2, 4, 8"),
        ({"tensor": 2}, "gpt2-xl has 25 heads to share out"),
        ({"schedules": ["1f2b"]}, "each item one of naive, gpipe, 1f1b"),
        ({"each": ["stage"]}, "each item one of stages, replicas"),
        ({"top": 0}, "top is 0"),
        ({"model": measured(), "tensor": 2}, "leave schedules and tensor out"),
        ({"model": measured(), "schedules": ["gpipe"]}, "leave schedules and tensor out"),
        ({"model": measured()}, "was measured with ranks=4, and the cluster has 8 devices"),
        (
            {"model": measured(), "cluster": "hosts=1,devices=4,memory=8GB", "global_batch": 3},
            "no layout of gpt:layers=6,width=64 has 4 devices",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(asked, words):
    with pytest.raises(ValueError) as refused:
        plan(**{"model": "gpt2-xl", "cluster": "dgx-a100:hosts=1", "global_batch": 64} | asked)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_the_command_prints_the_table_and_refuses_in_a_line():
    start = [sys.executable, "-m", "pipetutor", "plan", "gpt2-xl", "--global-batch", "64", "--cluster"]
    done = subprocess.run([*start, "dgx-a100:hosts=1"], capture_output=True, text=True, timeout=HANGS)
    assert done.stdout == f"{plan('gpt2-xl', 'dgx-a100:hosts=1', 64)}\n" and not done.returncode
    done = subprocess.run([*start, "dgx"], capture_output=True, text=True, timeout=HANGS)
    assert (
        done.returncode == 2
        and done.stderr.startswith("pipetutor: unknown cluster 'dgx'")
        and done.stderr.count("\n") == 1
    )


def test_published_runs_stand_beside_their_prediction():
    """With one efficiency, from the row without pipeline and tensors: what grows with the width is not predicted."""
    share = published.efficiency(published.MEGATRON[0])
    predictions = [published.predict(run, share) for run in published.MEGATRON]
    print(published.table(predictions))
    assert 0.4 < share < 0.6 and abs(predictions[0].error) < 1e-9
    assert all(abs(one.error) < 0.25 for one in predictions)
    for one in predictions:
        layout = one.choice.layout
        assert layout.stages * layout.tensor * layout.replicas == one.run.devices and layout.recompute
