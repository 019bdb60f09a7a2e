"""What if a stage were faster: the same order with other costs, and costs that come from the timeline itself."""

import doctest

import numpy as np
import pytest
from conftest import TINY, train
from hypothesis import given
from test_simulate import cases, full, repeatable

from pipetutor.schedule import whatif as module
from pipetutor.schedule.orders import build, deepspeed_1f1b
from pipetutor.schedule.rules import ScheduleError
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.timeline import CODE, SPAN, Timeline
from pipetutor.schedule.whatif import costs_of, faster, streams_in
from pipetutor.tracing import trace


def test_the_examples_of_its_documentation():
    assert doctest.testmod(module).failed == 0


@repeatable
@given(cases())
def test_a_simulated_timeline_gives_its_streams_back(case):
    streams, costs = case
    assert streams_in(simulate(streams, costs)) == streams


@pytest.mark.parametrize("streams", [build("gpipe", 3, 4), build("zero_bubble", 3, 4), full(3, 4)])
def test_costs_are_those_that_it_was_simulated_with(streams):
    given_ = Costs((1, 2, 3), (2, 1, 2), (1, 1, 3), message_bytes=(0.5, 0.5), bandwidth=1, optimizer=(1, 2, 1))
    found = costs_of(simulate(streams, given_))
    assert found.forward == given_.forward and found.optimizer == given_.optimizer
    both = np.add(found.backward_input, found.backward_weight)
    assert both.tolist() == np.add(given_.backward_input, given_.backward_weight).tolist()
    assert [found.message(boundary) for boundary in range(2)] == [0.5, 0.5]


def test_a_message_that_was_there_before_it_was_asked_for_says_nothing_of_its_way():
    """In the background: rank 1 waits for one activation of three, which takes half a second from when it is made."""
    rows = [(0, 0, CODE["ForwardPass"], number, number, number + 1, 0) for number in range(3)]
    receives = [(0.0, 1.5, 1.0), (5.5, 5.51, 0.0), (8.5, 8.51, 0.0)]
    for number, (begin, end, waits) in enumerate(receives):
        rows.append((1, 1, CODE["RecvActivation"], number, begin, end, waits))
        rows.append((1, 1, CODE["ForwardPass"], number, end, end + 1, 0))
    spans = np.array([(rank, stage, 0, *rest, 0) for rank, stage, *rest in rows], SPAN)
    assert costs_of(Timeline(spans, 0.0, 10.0)).message(0) == 0.5


def test_the_slow_stage_is_the_one_that_counts():
    """Two of three stages have time to spare, and the third is nearly all of the step."""
    costs = Costs((1, 4, 1), (1, 4, 1), (1, 4, 1))
    first, slow, last = faster(simulate(build("1f1b", 3, 16), costs), 0.25)
    assert slow.saved > 0.2 > 0.02 > first.saved and last.saved < 0.02
    assert slow.before == first.before == simulate(build("1f1b", 3, 16), costs).seconds
    quicker = Costs((1, 3, 1), (1, 3, 1), (1, 3, 1))
    assert slow.after == simulate(build("1f1b", 3, 16), quicker).seconds


def test_costs_that_are_given_count():
    timeline = simulate(build("gpipe", 2, 2), Costs.equal(2))
    assert faster(timeline, costs=Costs.equal(2, 10.0, 20.0))[0].before == pytest.approx(10 * timeline.seconds)


@pytest.mark.parametrize("share", [-0.1, 1.5, 10])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"share is .*: give the part of a stage's time that is saved, such as 0.1"):
        faster(simulate(build("gpipe", 2, 2), Costs.equal(2)), share)


def test_half_a_step_is_refused():
    whole = simulate(build("gpipe", 2, 2), Costs.equal(2))
    part = whole.spans[whole.spans["kind"] != CODE["BackwardPass"]]
    with pytest.raises(ScheduleError):
        faster(Timeline(part, whole.begin, whole.end))


EIGHT = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}


@pytest.mark.parametrize(
    ("flags", "replicas"),
    [([], 1), ([], 2), (["--engine", "torch", "--schedule", "interleaved_1f1b", "--chunks", 2], 1)],
    ids=["deepspeed", "replicas", "torch"],
)
def test_a_real_run_is_played_anew_in_its_own_order(runs, flags, replicas):
    asked = ["-s", 2, "--trace", "--model", TINY["model"], "--dataset", TINY["dataset"], "--dropout", 0, *flags]
    config = EIGHT | {"train_batch_size": 8 * replicas}
    run = train(runs, *asked, stages=2, replicas=replicas, config=config)
    timeline = trace.load(run).typical.timeline
    if flags:
        expected, stages = build("interleaved_1f1b", 2, 4, 2), 4
    else:
        expected, stages = [list(deepspeed_1f1b(2, 4, stage)) for stage in range(2)], 2

    def passes(streams):
        return [[each for each in stream if each.micro_batch is not None] for stream in streams]

    assert passes(streams_in(timeline)) == passes(expected)
    answers = faster(timeline)
    assert [each.stage for each in answers] == list(range(stages))
    assert all(each.after <= each.before for each in answers)
    assert all(f"stage {each.stage} 10% faster: the step is " in str(each) for each in answers)
