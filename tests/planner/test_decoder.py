"""Closed forms are what the simulator, the search for bounds and the bytes of each message say."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipetutor.core.partition import fastest
from pipetutor.planner.bound import lower_bound
from pipetutor.planner.decoder import blocks_of
from pipetutor.planner.layout import SCHEDULES, Layout
from pipetutor.planner.plan import problem_of
from pipetutor.planner.search import judge
from pipetutor.schedule.orders import build
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.timeline import peak_live

MODEL = "layers=12,width=64,heads=4,sequence=32,vocabulary=500"
CLUSTER = "hosts=8,devices=4,memory=1GB,flops=1T,inside=1GB/s+5us,between=100MB/s+50us,memory_bandwidth=10GB/s"


@pytest.mark.parametrize("head", [0.0, 0.3, 1.0, 2.6, 7.0])
@pytest.mark.parametrize("blocks", [4, 9, 16])
def test_equal_blocks_are_cut_as_well_as_by_the_search(blocks, head):
    for stages in range(1, min(blocks, 6) + 1):
        seconds = [1.0] * blocks + [head]
        found = blocks_of(blocks, stages, head)
        assert sum(found) == blocks and min(found[:-1], default=1) >= 1
        bounds = fastest([1] * (blocks + 1), stages, lambda low, high, seconds=seconds: sum(seconds[low:high]))
        best = max(sum(seconds[low:high]) for low, high in itertools.pairwise(bounds))
        assert max(*found[:-1], found[-1] + head) == pytest.approx(best) if stages > 1 else found == (blocks,)


def layouts():
    """Each schedule, on pipelines and micro-batches of many lengths."""
    for schedule, stages, micro_batches in itertools.product(SCHEDULES, (1, 2, 3, 4), (1, 2, 4, 8, 12)):
        chunked = schedule == "interleaved_1f1b"
        if (chunked and (micro_batches % stages or stages < 2)) or (
            schedule == "zero_bubble" and micro_batches < stages
        ):
            continue
        for chunks in (2, 3) if chunked else (1,):
            for recompute in (False, True):
                yield Layout(
                    stages,
                    32 // stages // 2 if 32 % stages == 0 else 1,
                    2,
                    3,
                    micro_batches,
                    schedule,
                    chunks,
                    recompute,
                )


LAYOUTS = list(layouts())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_live_activations_are_those_of_the_simulator(layout):
    problem = problem_of(MODEL, CLUSTER, 1, tensor=layout.tensor)
    played = simulate(layout.streams(), problem.costs(layout)[0])
    assert list(problem.live(layout)) == pytest.approx([peak.bytes for peak in peak_live(played)])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_parts_of_a_step_are_the_step_and_its_work_is_eq_3(layout):
    batch = layout.replicas * layout.micro_batch * layout.micro_batches
    problem = problem_of(MODEL, CLUSTER, batch, tensor=layout.tensor)
    choice = judge(problem, layout)
    assert sum(choice.parts.values()) == pytest.approx(choice.seconds) and min(choice.parts.values()) >= -1e-12
    devices = layout.stages * layout.replicas * layout.tensor
    done = problem.model.step_flops(batch, recompute=layout.recompute) / devices
    assert choice.parts["compute"] + choice.parts["recompute"] == pytest.approx(problem.cluster.seconds(done))
    assert (choice.parts["recompute"] > 0) == layout.recompute


def test_what_a_rank_sends_is_what_its_messages_add_up_to():
    """Two stages of two replicas on two devices a layer, written out."""
    problem = problem_of(MODEL, CLUSTER, 4, tensor=2)
    layout = Layout(2, 2, 2, 1, 2, zero_stage=1)
    size = 2 * 32 * 64  # what a block hands on: 16 bits, 32 tokens, width 64
    (first, last) = problem._blocks(layout)
    parameters = [
        first * problem.model.block_parameters + 532 * 64,
        last * problem.model.block_parameters + 2 * 64 + 500 * 64,
    ]
    ring = size  # an all-reduce of two devices: each sends a half twice
    passing = [
        size / 2 + size / 2
    ] * 2  # half of a message to the other stage, and that which came to the other device
    layers = [4 * blocks * ring + ring for blocks in (first, last)]
    mean = [
        2 * count / 2 * (1 + 0.5) for count in parameters
    ]  # 16 bits of half the parameters, and half of that again
    tied = 2 * 500 * 64 / 2
    wanted = [2 * (p + a) + m + tied for p, a, m in zip(passing, layers, mean, strict=True)]
    assert problem.sent(layout) == pytest.approx(max(wanted))


def test_memory_is_weights_gradients_state_and_what_is_in_flight():
    problem = problem_of(MODEL, CLUSTER, 16)
    layout = Layout(1, 2, 1, 1, 4)
    parameters, model = problem.model.parameters, problem.model
    live = 12 * model.block_bytes(1) + model.first_bytes(1) + model.last_bytes(1)
    assert problem.memory(layout) == pytest.approx(16 * parameters + live)
    assert problem.memory(Layout(1, 2, 1, 1, 4, zero_stage=1)) == pytest.approx((4 + 12 / 2) * parameters + live)
    again = 12 * model.output_bytes(1) + model.first_bytes(1) + model.last_bytes(1) + model.block_bytes(1)
    assert problem.memory(Layout(1, 2, 1, 1, 4, recompute=True)) == pytest.approx(16 * parameters + again)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(seed=st.integers(0, 10**9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_step_is_shorter_than_its_lower_bound(schedule, seed):
    draw = random.Random(seed)
    stages, chunks = draw.randint(1, 5), draw.choice((2, 3)) if schedule == "interleaved_1f1b" else 1
    stages = max(stages, chunks if chunks > 1 else 1)
    micro_batches = stages * draw.randint(1, 3) if chunks > 1 else draw.randint(1, 9)
    count = stages * chunks

    def some(most):
        return [draw.choice((0.0, draw.random())) * most for _ in range(count)]

    costs = Costs(some(1), some(1), some(1), message_bytes=some(draw.choice((0.1, 2)))[1:], latency=draw.random() / 5)
    costs = Costs(**vars(costs) | {"bandwidth": 1.0, "load": some(1), "optimizer": some(3), "all_reduce": some(9)})
    played = simulate(build(schedule, stages, micro_batches, chunks), costs).seconds
    least = lower_bound(costs, stages, micro_batches, split=schedule == "zero_bubble")
    assert least <= played * (1 + 1e-12)


@pytest.mark.parametrize("schedule, chunks", [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 3), ("zero_bubble", 1)])
def test_for_equal_stages_the_lower_bound_is_the_step(schedule, chunks):
    costs = Costs.equal(4 * chunks, 1.0, 2.0)
    played = simulate(build(schedule, 4, 8, chunks), costs).seconds
    assert lower_bound(costs, 4, 8, split=schedule == "zero_bubble") == pytest.approx(played)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_messages_means_and_steps_take_what_their_links_take(zero_stage):
    """Hosts of two ranks of two devices: the replicas of a stage share a host, and stages lie on several."""
    problem = problem_of(MODEL, CLUSTER, 8, tensor=2)
    inside, between = problem.cluster.link(False), problem.cluster.link(True)
    near, far = (Layout(2, replicas, 2, 1, 2, zero_stage=zero_stage) for replicas in (2, 4))
    (first, last) = problem._blocks(near)
    counts = [first * problem.model.block_parameters + 532 * 64, last * problem.model.block_parameters + 502 * 64]
    tied = between.ring(2, 2 * 500 * 64 / 2)
    for layout, link in ((near, inside), (far, between)):
        (costs,) = problem.costs(layout)
        assert costs.message(0) == pytest.approx(between.seconds(2 * 32 * 64 / 2))
        means = [(1 + zero_stage / 2) * link.ring(layout.replicas, 2 * count / 2) + tied for count in counts]
        assert costs.all_reduce == pytest.approx(means)
        share = layout.replicas if zero_stage else 1
        assert costs.optimizer == pytest.approx([28 * count / 2 / share / 10e9 for count in counts])
