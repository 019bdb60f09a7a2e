"""Why a rank waits: every second of a gap has a cause, and the critical path is as long as the step."""

import doctest
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from test_simulate import cases, full, repeatable

from pipetutor.schedule import causes as module
from pipetutor.schedule.causes import causes, critical_path, path_words
from pipetutor.schedule.orders import build
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.timeline import CODE, SPAN, Timeline


def test_the_examples_of_its_documentation():
    assert doctest.testmod(module).failed == 0


def step(rows, end=None):
    """A measured step; a row is (rank, stage, instruction, micro-batch, begin, end, waiting)."""
    spans = [(rank, stage, 0, CODE[name], m, begin, to, waits, 0) for rank, stage, name, m, begin, to, waits in rows]
    table = np.array(sorted(spans, key=lambda span: (span[0], span[5])), SPAN)
    return Timeline(table, 0.0, float(table["end"].max()) if end is None else end)


def told(pieces):
    return [(piece.rank, piece.name, piece.micro_batch, piece.begin, piece.end) for piece in pieces]


def test_a_gap_is_as_long_as_what_was_waited_for():
    """GPipe, two ranks: rank 0 waits for the gradient of micro-batch 0, while rank 1 runs F1 and B0."""
    timeline = simulate(build("gpipe", 2, 2), Costs.equal(2, backward=1))
    first, second, third = causes(timeline)
    assert first[:5] == (0, 2, 4, "waiting", "the gradient of micro-batch 0 from stage 1")
    assert told([first.waits_for]) == [(1, "BackwardPass", 0, 3, 4)]
    assert told(first.chain) == [(1, "ForwardPass", 1, 2, 3), (1, "BackwardPass", 0, 3, 4)]
    assert first.words("slots") == (
        "rank 0 waits 2 slots for the gradient of micro-batch 0 from stage 1; meanwhile: F1 of stage 1, B0 of stage 1"
    )
    assert second[:5] == (1, 0, 1, "waiting", "the activation of micro-batch 0 from stage 0")
    assert second.words("slots").startswith("rank 1 waits 1 slot for")
    assert third[:5] == (1, 5, 6, "waiting", "rank 0 to end the step")


def test_what_was_waited_for_had_waited_itself():
    """Three ranks, one micro-batch: what rank 0 waits for lies on two other ranks, one after the other."""
    gap = causes(simulate(build("gpipe", 3, 1), Costs.equal(3)))[0]
    assert told(gap.chain) == [
        (1, "ForwardPass", 0, 1, 2),
        (2, "ForwardPass", 0, 2, 3),
        (2, "BackwardPass", 0, 3, 5),
        (1, "BackwardPass", 0, 5, 7),
    ]


def test_the_way_of_a_message_is_part_of_the_path():
    costs = Costs((2, 3), (1, 2), (1, 2), message_bytes=(10,), latency=0.5, bandwidth=20)
    passes = [(0, 0, 2), (1, 3, 6), (1, 6, 10), (0, 11, 13)]
    for streams in (build("gpipe", 2, 1), full(2, 1)):
        timeline = simulate(streams, costs)
        path = critical_path(timeline)
        assert [(p.rank, p.begin, p.end) for p in path if p.category == "compute"] == passes
        assert [(p.begin, p.end) for p in path if p.category == "transfer"] == [(2, 3), (10, 11)]
        (gap,) = [gap for gap in causes(timeline) if gap.rank == 0 and gap.kind == "waiting"]
        assert gap.end == 10 and gap.waits_for.name in ("BackwardPass", "SendGrad")


def test_messages_that_wait_for_the_wire_are_one_behind_the_other():
    """A slow wire sets the step's length, not the passes whose messages stand in line for it."""
    timeline = simulate(build("gpipe", 2, 3), Costs((1, 1), (1, 1), (1, 1), message_bytes=(10,), bandwidth=1))
    path = [(p.name, p.micro_batch, p.begin, p.end) for p in critical_path(timeline)]
    assert path == [
        ("ForwardPass", 0, 0, 1),
        *(("RecvActivation", number, 1 + 10 * number, 11 + 10 * number) for number in range(3)),
        ("ForwardPass", 2, 31, 32),
        ("BackwardPass", 0, 32, 34),
        *(("RecvGrad", number, 34 + 10 * number, 44 + 10 * number) for number in range(3)),
        ("BackwardPass", 2, 64, 66),
    ]


def test_messages_that_are_only_late_do_not_stand_in_line():
    """Latency alone holds up nobody: each message is on its way while the others are."""
    timeline = simulate(build("gpipe", 2, 3), Costs((1, 0), (1, 1), (1, 1), latency=10))
    begins = [(p.micro_batch, p.begin) for p in critical_path(timeline) if p.name == "RecvActivation"]
    assert begins == [(2, 3)]


MEASURED = [
    # Blocking calls: rank 1 has come late to the first activation, rank 0 is slow with the second.
    (0, 0, "ForwardPass", 0, 0.5, 2.0, 0.0),
    (0, 0, "SendActivation", 0, 2.0, 5.0, 2.0),
    (0, 0, "ForwardPass", 1, 5.0, 9.0, 0.0),
    (0, 0, "SendActivation", 1, 9.0, 9.5, 0.0),
    (0, 0, "AggregateLoss", -1, 9.5, 12.5, 2.5),
    (1, 1, "LoadMicroBatch", 0, 0.0, 3.5, 0.0),
    (1, 1, "RecvActivation", 0, 4.0, 5.0, 0.0),
    (1, 1, "ForwardPass", 0, 5.0, 6.0, 0.0),
    (1, 1, "RecvActivation", 1, 6.0, 9.5, 3.0),
    (1, 1, "ForwardPass", 1, 9.5, 12.0, 0.0),
    (1, 1, "AggregateLoss", -1, 12.0, 12.5, 0.0),
]


def test_a_measured_step_by_hand():
    timeline = step(MEASURED, end=12.75)
    waits = {(gap.rank, gap.begin): gap for gap in causes(timeline) if gap.kind == "waiting"}
    taken, slow, last = waits[0, 2.0], waits[1, 6.0], waits[0, 9.5]
    assert taken.reason == "stage 1 to take the activation of micro-batch 0"
    assert told(taken.chain) == [(1, "LoadMicroBatch", 0, 2.0, 3.5), (1, "", -1, 3.5, 4.0)]
    assert slow.reason == "the activation of micro-batch 1 from stage 0"
    assert told(slow.chain) == [(0, "ForwardPass", 1, 6.0, 9.0)]
    assert last.reason == "rank 1 to end the step"
    assert told(last.chain) == [(1, "ForwardPass", 1, 9.5, 12.0)]
    assert told(critical_path(timeline)) == [
        (1, "LoadMicroBatch", 0, 0.0, 3.5),
        (1, "", -1, 3.5, 4.0),
        (0, "SendActivation", 0, 4.0, 5.0),
        (0, "ForwardPass", 1, 5.0, 9.0),
        (1, "RecvActivation", 1, 9.0, 9.5),
        (1, "ForwardPass", 1, 9.5, 12.0),
        (0, "AggregateLoss", -1, 12.0, 12.5),
        (0, "", -1, 12.5, 12.75),
    ]
    others = [(gap.rank, gap.begin, gap.end) for gap in causes(timeline) if gap.kind == "other"]
    assert others == [(0, 0.0, 0.5), (0, 12.5, 12.75), (1, 3.5, 4.0), (1, 12.5, 12.75)]
    assert any("between LoadMicroBatch 0 of stage 1 and the activation" in str(gap) for gap in causes(timeline))


def test_the_path_in_words_begins_with_the_longest():
    words = path_words(critical_path(step(MEASURED, end=12.75)), "s")
    assert words.startswith(
        "the critical path, 12.8 s long, is 4 s computing on stage 0, 3.5 s load, 2.5 s computing"
    )


def test_clocks_that_disagree_close_no_circle():
    """Two ranks that seem to wait for each other until the same moment: it is said so, and the walk goes on."""
    rows = [
        (0, 0, "ForwardPass", 0, 0.0, 1.0, 0.0),
        (0, 0, "RecvGrad", 0, 1.0, 3.0, 2.0),
        (1, 1, "ForwardPass", 0, 0.0, 2.0, 0.0),
        (1, 1, "RecvActivation", 0, 2.0, 3.0, 1.0),
    ]
    timeline = step(rows)
    assert sum(piece.seconds for piece in critical_path(timeline)) == 3.0
    assert [piece.name for piece in critical_path(timeline)][-1] == "waiting"


def test_a_rank_waits_for_the_stage_of_its_own_replica():
    rows = [
        (replica + 2 * stage, stage, replica, CODE[name], 0, begin + replica, end + replica, waits, 0)
        for stage, name, begin, end, waits in (
            (0, "ForwardPass", 0.0, 2.0, 0.0),
            (0, "SendActivation", 2.0, 2.5, 0.0),
            (1, "RecvActivation", 1.0, 2.5, 1.0),
            (1, "ForwardPass", 2.5, 4.0, 0.0),
        )
        for replica in (0, 1)
    ]
    spans = np.array(sorted(rows, key=lambda row: (row[0], row[5])), SPAN)
    waits = [gap for gap in causes(Timeline(spans, 0.0, 5.0)) if gap.kind == "waiting"]
    assert [(gap.rank, gap.waits_for.rank) for gap in waits] == [(2, 0), (3, 1)]


def test_a_collective_waits_for_the_last_to_come():
    rows = [
        (rank, 0, rank, CODE["ReduceGrads"], -1, begin, 6.0, max(0.0, 5.0 - begin), 0)
        for rank, begin in enumerate((1.0, 5.0, 2.0))
    ]
    gaps = causes(Timeline(np.array(rows, SPAN), 0.0, 6.0))
    waits = [(gap.rank, gap.reason) for gap in gaps if gap.kind == "waiting"]
    assert waits == [(0, "rank 1 to come to ReduceGrads"), (2, "rank 1 to come to ReduceGrads")]


@repeatable
@given(cases())
def test_every_second_without_work_has_a_cause(case):
    timeline = simulate(*case)
    tolerance = pytest.approx(0, abs=1e-7 * max(timeline.seconds, 1))
    gaps = causes(timeline)
    for rank, account in enumerate(timeline.accounting()):
        for kind in ("waiting", "transfer", "other"):
            found = sum(gap.seconds for gap in gaps if gap.rank == rank and gap.kind == kind)
            assert found - account[kind] == tolerance, (rank, kind)
    for gap in gaps:
        assert sum(piece.seconds for piece in gap.chain) - gap.seconds == tolerance
        assert gap.kind != "waiting" or all(piece.name not in ("", "waiting") for piece in gap.chain)


@repeatable
@given(cases())
def test_the_critical_path_is_as_long_as_the_step(case):
    timeline = simulate(*case)
    path = critical_path(timeline)
    if not timeline.seconds:
        assert not path
        return
    assert path[0].begin == timeline.begin and path[-1].end == timeline.end
    assert all(one.end == other.begin for one, other in itertools.pairwise(path))
    assert sum(piece.seconds for piece in path) == pytest.approx(timeline.seconds)
    assert all(piece.category not in ("other", "waiting") for piece in path), "a simulated rank always has a reason"


@repeatable
@given(cases())
def test_what_makes_the_path_longer_makes_the_step_longer(case):
    """A second more for the forward passes of a stage: at least one more for each of them on the path."""
    streams, costs = case
    costs = replace(costs, bandwidth=float("inf"))  # else a message may stand in line, which a later one does not
    timeline = simulate(streams, costs)
    on_it = Counter(piece.stage for piece in critical_path(timeline) if piece.name == "ForwardPass")
    for stage, count in on_it.items():
        slower = [seconds + (at == stage) for at, seconds in enumerate(costs.forward)]
        longer = simulate(streams, replace(costs, forward=slower)).seconds - timeline.seconds
        assert longer >= count - 1e-6, (stage, count, longer)
