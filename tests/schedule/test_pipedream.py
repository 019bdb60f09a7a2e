"""1F1B without a flush: no bubble, for a price that the checker names and that can be counted."""

import doctest
import inspect
import itertools

import numpy as np
import pytest

from pipetutor.schedule import pipedream as module
from pipetutor.schedule.orders import SCHEDULES, build, one_f_one_b
from pipetutor.schedule.pipedream import pipedream, staleness, versions
from pipetutor.schedule.rules import ScheduleError, check, picture
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.timeline import KINDS


def streams(ranks, micro_batches):
    return [list(pipedream(ranks, micro_batches, rank)) for rank in range(ranks)]


def test_docstring_shows_the_schedule():
    text = "\n".join(line.strip() for line in inspect.getdoc(pipedream).splitlines())
    assert picture(streams(3, 6)) in text
    assert doctest.testmod(module) == (0, 3)


@pytest.mark.parametrize("ranks", range(1, 7))
def test_a_bubble_comes_once_and_not_once_a_step(ranks):
    """Four steps of M with flushes have four, PipeDream has one; between its first gradient and its last forward
    pass no rank waits."""
    costs = Costs.equal(ranks)
    for each in (ranks, 2 * ranks, 3 * ranks + 1):
        timeline = simulate(streams(ranks, 4 * each), costs)
        assert timeline.seconds == 3 * (4 * each + ranks - 1)
        assert timeline.bubble == pytest.approx((ranks - 1) / (4 * each + ranks - 1), abs=1e-12)
        flushed = simulate(build("1f1b", ranks, each), costs).seconds
        assert 4 * flushed - timeline.seconds == 3 * 3 * (ranks - 1)
        for rank in range(ranks):
            spans = timeline.of(rank)
            work = spans[np.isin(spans["kind"], [KINDS.index("ForwardPass"), KINDS.index("BackwardPass")])]
            steady = work[ranks - rank : len(work) - (ranks - rank) + 1]
            assert steady[0]["kind"] == KINDS.index("BackwardPass")
            assert (steady["begin"][1:] == steady["end"][:-1]).all()


@pytest.mark.parametrize("ranks", range(2, 6))
def test_it_is_refused_for_what_its_gradients_are_of(ranks):
    with pytest.raises(ScheduleError) as error:
        check(streams(ranks, 3 * ranks))
    backward = ranks + 2  # P forward passes, B0, its step, the next forward pass
    assert str(error.value) == (
        f"rank 0: the weights change (instruction {ranks + 1}) between ForwardPass 1 of stage 0 and its BackwardPass "
        f"(instruction {backward + 1}), so a gradient would be taken of weights that are there no more: flush, for "
        "OptimizerStep must be last"
    )


def test_each_rank_keeps_a_version_for_each_micro_batch_in_flight():
    for ranks in range(1, 7):
        assert versions(streams(ranks, 2 * ranks)) == [ranks - rank for rank in range(ranks)]
        assert staleness(streams(ranks, 2 * ranks)) == [ranks - 1 - rank for rank in range(ranks)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_flush_leaves_one_version_that_is_never_stale(schedule):
    chunks = 2 if schedule in ("interleaved_1f1b", "looped_bfs") else 1
    for ranks in (1, 2, 4):
        played = build(schedule, ranks, 8, chunks)
        assert versions(played) == [1] * ranks and staleness(played) == [0] * ranks


def test_it_computes_in_the_order_of_1f1b():
    for ranks, micro_batches in itertools.product(range(1, 6), (1, 2, 7)):
        for rank, stream in enumerate(streams(ranks, micro_batches)):
            passes = [i for i in one_f_one_b(ranks, micro_batches, rank) if i.micro_batch is not None]
            assert [i for i in stream if i.micro_batch is not None] == passes
