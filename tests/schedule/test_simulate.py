"""The simulator: closed forms to the last digits, worked examples, and what must hold for any costs."""

import dataclasses
import doctest
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_schedules import accepted, full

from pipetutor.schedule import simulate as module
from pipetutor.schedule import timeline as timeline_module
from pipetutor.schedule.formulas import closed_form
from pipetutor.schedule.orders import (
    LOOPED,
    SCHEDULES,
    STEP,
    V_SHAPED,
    Instruction,
    build,
    one_f_one_b,
    stages_a_rank,
)
from pipetutor.schedule.rules import GRADIENT, PASSES, ScheduleError, check
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.timeline import KINDS, SPAN, peak_live

repeatable = settings(deadline=None, derandomize=True, max_examples=60)


def rows(timeline, rank):
    """Spans as (kind, micro-batch, begin, end, waiting)."""
    spans = timeline.of(rank)[["kind", "micro_batch", "begin", "end", "waiting"]].tolist()
    return [(KINDS[kind], *rest) for kind, *rest in spans if KINDS[kind] not in STEP]


@pytest.mark.parametrize(("forward", "backward"), [(1, 2), (1, 1), (3, 1), (1, 7.3)])
@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b", *LOOPED, "deepspeed"])
def test_idle_share_is_the_closed_form(schedule, forward, backward):
    for ranks, micro_batches in itertools.product((1, 2, 3, 5, 8), (1, 2, 4, 15, 16)):
        for chunks in (2, 3) if schedule in LOOPED else (1,):
            costs = Costs.equal(ranks * chunks, forward, backward)
            if schedule == "deepspeed":
                expected = closed_form("1f1b", ranks, micro_batches)
                streams = full(ranks, micro_batches)
            elif chunks > 1 and (micro_batches % ranks if schedule == "interleaved_1f1b" else micro_batches < ranks):
                continue
            else:
                expected = closed_form(schedule, ranks, micro_batches, chunks)
                streams = build(schedule, ranks, micro_batches, chunks)
            assert simulate(streams, costs).bubble == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("times", [(1, 1, 1), (1, 2, 1), (2, 3, 1), (5, 2, 2), (3, 3, 2.5)])
def test_zero_bubble_is_the_papers(times):
    """Bubble (P-1)(T_F+T_B-T_W), where T_W is at most T_F and T_B, and M at least P."""
    forward, backward, weight = times
    for ranks in range(1, 7):
        for micro_batches in (ranks, ranks + 1, 2 * ranks, 17):
            costs = Costs((forward,) * ranks, (backward,) * ranks, (weight,) * ranks)
            timeline = simulate(build("zero_bubble", ranks, micro_batches), costs)
            bubble = (ranks - 1) * (forward + backward - weight)
            assert timeline.seconds == pytest.approx(micro_batches * sum(times) + bubble, rel=1e-12)
            if len(set(times)) == 1:
                assert timeline.bubble == pytest.approx(closed_form("zero_bubble", ranks, micro_batches), abs=1e-12)


@pytest.mark.parametrize("schedule", V_SHAPED)
def test_a_v_idles_as_its_closed_form_says(schedule):
    """Where F, B and W take the same time. In ZB-V no rank waits between its first pass and its last."""
    codes = [KINDS.index(kind) for kind in PASSES]
    for ranks, more in itertools.product(range(1, 8), (0, 1, 2, 9)):
        micro_batches = 2 * ranks - (schedule == "zbv") + more
        timeline = simulate(build(schedule, ranks, micro_batches), Costs.equal(2 * ranks))
        assert timeline.bubble == pytest.approx(closed_form(schedule, ranks, micro_batches), abs=1e-12)
        assert timeline.seconds == 6 * micro_batches + ranks - 1
        for rank in range(ranks) if schedule == "zbv" else ():
            passes = timeline.of(rank)[np.isin(timeline.of(rank)["kind"], codes)]
            assert passes["begin"][0] == rank and passes["end"][-1] == rank + 6 * micro_batches


@pytest.mark.parametrize("micro_batches", [8, 13])
def test_live_micro_batches_of_a_v(micro_batches):
    """Of stages half as large: 2P are what rank 0 of 1F1B has, and DualPipeV has one more, as DeepSeek says."""
    for ranks in (1, 2, 3, 4):
        for schedule, most in (("zbv", 2 * ranks), ("dualpipev", 2 * ranks + 1)):
            peaks = peak_live(simulate(build(schedule, ranks, micro_batches), Costs.equal(2 * ranks)))
            assert [peak.micro_batches for peak in peaks] == [most] * ranks


@pytest.mark.parametrize("micro_batches", [2, 4, 12])
def test_live_micro_batches(micro_batches):
    ranks = 4
    expected = {
        "naive": [1] * ranks,
        "gpipe": [micro_batches] * ranks,
        "1f1b": [min(ranks - rank, micro_batches) for rank in range(ranks)],
        "zero_bubble": [min(ranks, micro_batches)] * ranks,
    }
    for schedule, most in expected.items():
        peaks = peak_live(simulate(build(schedule, ranks, micro_batches), Costs.equal(ranks)))
        assert [peak.micro_batches for peak in peaks] == most == [peak.bytes for peak in peaks]
    peaks = peak_live(simulate(full(ranks, micro_batches), Costs.equal(ranks)))
    assert [peak.micro_batches for peak in peaks] == expected["1f1b"]


@pytest.mark.parametrize("chunks", [2, 3])
def test_live_micro_batches_of_chunks(chunks):
    """Megatron's warm-up, and the forward pass after it, are what a rank holds."""
    ranks, micro_batches = 4, 12
    timeline = simulate(build("interleaved_1f1b", ranks, micro_batches, chunks), Costs.equal(ranks * chunks))
    expected = [(chunks - 1) * ranks + 2 * (ranks - 1 - rank) + 1 for rank in range(ranks)]
    assert [peak.micro_batches for peak in peak_live(timeline)] == expected
    timeline = simulate(build("looped_bfs", ranks, micro_batches, chunks), Costs.equal(ranks * chunks))
    assert [peak.micro_batches for peak in peak_live(timeline)] == [chunks * micro_batches] * ranks


def test_peak_bytes_are_the_stages():
    costs = dataclasses.replace(Costs.equal(2), activation_bytes=(100.0, 7.0))
    assert peak_live(simulate(build("gpipe", 2, 3), costs)) == [(3, 300.0), (3, 21.0)]


def test_background_transfers_by_hand():
    """A message takes 0.5 + 10 / 20 = 1 s; rank 1 waits for it, and rank 0 for the gradient."""
    costs = Costs((2, 3), (1, 2), (1, 2), message_bytes=(10,), latency=0.5, bandwidth=20, activation_bytes=(8, 4))
    timeline = simulate(build("1f1b", 2, 1), costs)
    assert rows(timeline, 0) == [
        ("ForwardPass", 0, 0, 2, 0),
        ("RecvGrad", 0, 2, 11, 8),
        ("BackwardPass", 0, 11, 13, 0),
    ]
    assert rows(timeline, 1) == [
        ("RecvActivation", 0, 0, 3, 2),
        ("ForwardPass", 0, 3, 6, 0),
        ("BackwardPass", 0, 6, 10, 0),
        ("AggregateLoss", -1, 10, 13, 3),
    ]
    assert timeline.of(0)["memory"].tolist() == [8, 8, 0, 0, 0]
    assert timeline.of(1)["memory"].tolist() == [0, 4, 0, 0, 0, 0]


def test_messages_share_a_wire_by_hand():
    """Rank 0 makes an activation each second, the wire needs 10 s for each: the third is there after 31 s.

    Backward messages have a wire of their own, and the last of them leaves when the two before it have gone.
    """
    costs = Costs((1, 1), (1, 1), (1, 1), message_bytes=(10,), bandwidth=1)
    timeline = simulate(build("gpipe", 2, 3), costs)
    starts = {(kind, number): begin for kind, number, begin, _, _ in rows(timeline, 1)}
    assert [starts["ForwardPass", number] for number in range(3)] == [11, 21, 31]
    starts = {(kind, number): begin for kind, number, begin, _, _ in rows(timeline, 0)}
    assert [starts["BackwardPass", number] for number in range(3)] == [44, 54, 64]
    waits = [(end - begin, waiting) for kind, _, begin, end, waiting in rows(timeline, 1) if kind == "RecvActivation"]
    assert waits == [(11, 1), (9, 0), (9, 0)], "the rest is transfer: the wire was busy"


def test_rendezvous_by_hand():
    """As above, but rank 1 also loads, and whoever comes first to an exchange waits in it."""
    costs = Costs((2, 3), (1, 2), (1, 2), message_bytes=(10,), latency=0.5, bandwidth=20, load=(0.25, 0.25))
    timeline = simulate(full(2, 1), costs)
    assert rows(timeline, 0) == [
        ("LoadMicroBatch", 0, 0, 0.25, 0),
        ("ForwardPass", 0, 0.25, 2.25, 0),
        ("SendActivation", 0, 2.25, 3.25, 0),
        ("RecvGrad", 0, 3.25, 11.5, 7.25),
        ("BackwardPass", 0, 11.5, 13.5, 0),
    ]
    assert rows(timeline, 1) == [
        ("RecvActivation", 0, 0, 3.25, 2.25),
        ("LoadMicroBatch", 0, 3.25, 3.5, 0),
        ("ForwardPass", 0, 3.5, 6.5, 0),
        ("BackwardPass", 0, 6.5, 10.5, 0),
        ("SendGrad", 0, 10.5, 11.5, 0),
        ("AggregateLoss", -1, 11.5, 13.5, 2),
    ]


def test_a_link_lets_a_burst_through_and_a_buffer_frees_who_sends():
    """Of 10 bytes 4 go at once, and 6 / 2 = 3 s later the message is there; its sender is held for 10 - 8 of them."""
    costs = Costs((2, 3), (1, 2), (1, 2), message_bytes=(10,), latency=0.5, bandwidth=2, burst=4, buffer=8)
    timeline = simulate(full(2, 1), costs)
    spans = {(kind, stage): (begin, end) for stage in (0, 1) for kind, _, begin, end, _ in rows(timeline, stage)}
    assert spans["SendActivation", 0] == (2, 2 + 0.5 + 1) and spans["RecvActivation", 1] == (0, 2 + 0.5 + 3)
    assert spans["SendGrad", 1] == (12.5, 14) and spans["RecvGrad", 0] == (3.5, 16)
    quick = simulate(full(2, 1), dataclasses.replace(costs, burst=100, buffer=1))
    spans = {(kind, stage): (begin, end) for stage in (0, 1) for kind, _, begin, end, _ in rows(quick, stage)}
    assert spans["SendActivation", 0] == (2, 2.5) == (2, spans["RecvActivation", 1][1]), (
        "none leaves after it is there"
    )


def test_the_step_costs_what_a_ranks_stages_cost():
    costs = dataclasses.replace(Costs.equal(4), optimizer=(1, 2, 3, 4), all_reduce=(10, 20, 30, 40))
    for streams in (build("interleaved_1f1b", 2, 2, 2), build("gpipe", 4, 2), full(4, 2)):
        accounts = simulate(streams, costs).accounting()
        assert [row["optimizer"] for row in accounts] == ([4, 6] if len(streams) == 2 else [1, 2, 3, 4])
        assert [row["reduce"] for row in accounts] == ([40, 60] if len(streams) == 2 else [10, 20, 30, 40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backward_input": (1, 1, 1)}, "backward_input has 3 numbers, forward has 2"),
        ({"optimizer": (1,)}, "optimizer has 1 numbers, forward has 2"),
        ({"message_bytes": (1, 1)}, "message_bytes has 2 numbers, but 2 stages have 1 boundaries"),
        ({"forward": (1, -1)}, r"forward is \(1, -1\): use numbers from 0 up"),
        ({"latency": float("nan")}, "latency is nan: use numbers from 0 up"),
        ({"bandwidth": 0}, "bandwidth is 0 bytes a second: use more than 0"),
    ],
)
def test_bad_costs_teach(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Costs.equal(2), **change)


def test_costs_of_another_model():
    with pytest.raises(ValueError, match="costs for 3 stages, but the schedule has 4: give as many"):
        simulate(build("gpipe", 4, 2), Costs.equal(3))


def test_examples_of_the_docstrings():
    assert doctest.testmod(module) == (0, 3) and doctest.testmod(timeline_module) == (0, 3)


def many_ranks(ranks, micro_batches):
    timeline = simulate((one_f_one_b(ranks, micro_batches, rank) for rank in range(ranks)), Costs.equal(ranks))
    assert timeline.seconds == 3 * (micro_batches + ranks - 1)
    assert len(timeline.spans) > ranks * 2 * micro_batches


def test_many_ranks():
    many_ranks(64, 512)


@pytest.mark.slow
def test_512_ranks_in_30_seconds():
    begin = time.process_time()  # of one core, whatever else the machine does
    many_ranks(512, 4096)
    assert time.process_time() - begin < 30


@st.composite
def cases(draw):
    """A schedule of up to 4 ranks, and costs for it."""
    name = draw(st.sampled_from([*SCHEDULES, "deepspeed"]))
    ranks, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    micro_batches, chunks = accepted(name, ranks, micro_batches, draw(st.integers(2, 3)))
    streams = full(ranks, micro_batches) if name == "deepspeed" else build(name, ranks, micro_batches, chunks)
    stages = ranks * stages_a_rank(name, chunks)
    seconds = st.floats(0, 10, allow_subnormal=False)

    def each(count):
        return draw(st.lists(seconds, min_size=count, max_size=count))

    costs = Costs(
        forward=each(stages),
        backward_input=each(stages),
        backward_weight=each(stages),
        activation_bytes=each(stages),
        message_bytes=each(stages - 1),
        latency=draw(seconds),
        bandwidth=draw(st.sampled_from([0.5, 4.0, float("inf")])),
        load=each(stages),
        optimizer=each(stages),
        all_reduce=each(stages),
    )
    return streams, costs


def holders(streams):
    """The rank of each stage."""
    found = {i.stage: rank for rank, stream in enumerate(streams) for i in stream if i.micro_batch is not None}
    return [found[stage] for stage in range(len(found))]


def message(costs, boundary, holders):
    """Seconds of a message; within a rank there is none."""
    remote = holders[boundary] != holders[boundary + 1]
    return costs.latency + costs.message_bytes[boundary] / costs.bandwidth if remote else 0


@repeatable
@given(cases())
def test_no_step_is_shorter_than_its_work_or_its_longest_path(case):
    streams, costs = case
    timeline, held, stages = simulate(streams, costs), holders(streams), len(costs.forward)
    micro_batches = 1 + max(i.micro_batch for i in streams[0] if i.micro_batch is not None)
    work = np.add(np.add(costs.forward, costs.backward_input), costs.backward_weight) * micro_batches
    work = work + costs.optimizer + costs.all_reduce
    longest = max(sum(work[np.equal(held, rank)]) for rank in range(len(streams)))
    messages = 2 * sum(message(costs, boundary, held) for boundary in range(stages - 1))
    path = sum(costs.forward) + sum(costs.backward_input) + messages
    boundaries = [boundary for boundary in range(stages - 1) if held[boundary] != held[boundary + 1]]
    busiest = max((micro_batches * costs.wire(boundary) for boundary in boundaries), default=0)
    assert timeline.seconds >= max(longest, path, busiest) * (1 - 1e-12)


def assert_sound(streams, costs):
    """A rank's spans follow each other without a gap, and begin when their input is there."""
    timeline, held, last = simulate(streams, costs), holders(streams), len(costs.forward) - 1
    assert timeline.spans.dtype == SPAN
    sends = any(i.name == "SendActivation" for i in streams[0])
    at = {}
    for rank, stream in enumerate(streams):
        spans = timeline.of(rank)
        assert spans["begin"][0] == 0 and spans["end"][-1] == timeline.seconds
        assert (spans["begin"][1:] == spans["end"][:-1]).all()
        assert (spans["begin"] <= spans["end"]).all() and (spans["waiting"] >= 0).all()
        named = [(KINDS[s["kind"]], int(s["stage"]), int(s["micro_batch"])) for s in spans]
        at |= {name: (s["begin"], s["end"], s["waiting"]) for name, s in zip(named, spans, strict=True)}
        ours = [(i.name, i.stage, -1 if i.micro_batch is None else i.micro_batch) for i in stream]
        assert [name for name in named if name in set(ours)] == ours
        assert timeline.accounting()[rank]["other"] == pytest.approx(0, abs=1e-9)
        assert spans["memory"] == pytest.approx(np.maximum(spans["memory"], 0), abs=1e-9)
        assert spans["memory"][-1] == pytest.approx(0, abs=1e-9)
    for (name, stage, number), (begin, end, waiting) in at.items():
        if name == "ForwardPass":
            if not sends and stage > 0:
                sent = at[name, stage - 1, number][1]
                assert begin >= (sent + message(costs, stage - 1, held)) * (1 - 1e-12)
            load = costs.load[stage] if costs.load and ("LoadMicroBatch", 0, 0) not in at else 0
            assert end == pytest.approx(begin + load + costs.forward[stage], abs=1e-9)
        if name in GRADIENT:
            assert begin >= at["ForwardPass", stage, number][1]
            if not sends and stage < last:
                made = [at[kind, stage + 1, number][1] for kind in GRADIENT if (kind, stage + 1, number) in at]
                assert begin >= (made[0] + message(costs, stage, held)) * (1 - 1e-12)
        if name == "BackwardWeight":
            assert begin >= at["BackwardInput", stage, number][1]
        if name.startswith("Send"):
            receiver = stage + 1 if name == "SendActivation" else stage - 1
            there = at[name.replace("Send", "Recv"), receiver, number]
            assert there[1] == end and begin + waiting == pytest.approx(there[0] + there[2], abs=1e-9)
            took = message(costs, min(stage, receiver), held)
            assert end == pytest.approx(max(begin, there[0]) + took, abs=1e-9)
            made = at["ForwardPass" if name == "SendActivation" else "BackwardPass", stage, number]
            used = at["ForwardPass" if name == "SendActivation" else "BackwardPass", receiver, number]
            assert made[1] <= begin and end <= used[0]


@repeatable
@given(cases())
def test_every_step_is_sound(case):
    assert_sound(*case)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_messages_between_chunks(ranks):
    """From the last rank to the first a message takes its time, too; within a rank there is none."""
    costs = dataclasses.replace(
        Costs.equal(2 * ranks), latency=4.0, message_bytes=(10,) * (2 * ranks - 1), bandwidth=10
    )
    streams = build("interleaved_1f1b", ranks, 2 * ranks, 2)
    assert_sound(streams, costs)
    assert (simulate(streams, costs).bubble > 0) == (ranks > 1)


@repeatable
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 5), st.integers(1, 8), st.floats(0.1, 10))
def test_more_micro_batches_never_make_a_larger_bubble(schedule, ranks, micro_batches, backward):
    few, chunks = accepted(schedule, ranks, micro_batches, 2)
    costs = Costs.equal(ranks * stages_a_rank(schedule, chunks), 1.0, backward)
    more = few + (ranks if schedule == "interleaved_1f1b" else 1)
    few, more = (simulate(build(schedule, ranks, count, chunks), costs).bubble for count in (few, more))
    assert more <= few + 1e-12


@repeatable
@given(cases(), st.data())
def test_what_cannot_be_played_is_refused_as_the_checker_refuses_it(case, data):
    """Two of a rank's instructions change places, or one becomes another; the step's end stays."""
    streams, costs = case
    stream = streams[data.draw(st.integers(0, len(streams) - 1))]
    inside = st.integers(0, sum(i.micro_batch is not None for i in stream) - 1)
    one, other = data.draw(inside), data.draw(inside)
    swapped, renamed = data.draw(st.booleans()), data.draw(st.sampled_from([*KINDS, "Forward"]))
    if swapped:
        stream[one], stream[other] = stream[other], stream[one]
    else:
        stream[one] = stream[one]._replace(name=renamed)
    try:
        check(streams)
    except ScheduleError as error:
        with pytest.raises(ScheduleError) as refusal:
            simulate(streams, costs)
        assert str(refusal.value) == str(error)
    else:
        simulate(streams, costs)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("change", [{"stage": -1}, {"micro_batch": -1}, {"micro_batch": None}, {"name": "Forward"}])
def test_an_instruction_that_does_not_belong_is_refused(change, rank):
    streams = build("gpipe", 2, 2)
    streams[rank][1] = streams[rank][1]._replace(**change)
    with pytest.raises(ScheduleError, match=f"rank {rank}, instruction 1"):
        simulate(streams, Costs.equal(2))


@pytest.mark.parametrize(
    "extra",
    [Instruction("AggregateLoss", 0, None), Instruction("LoadMicroBatch", 0, 2), Instruction("SendGrad", 0, 0)],
)
def test_an_instruction_too_many_is_refused(extra):
    streams = full(2, 2)
    streams[0].insert(0, extra)
    with pytest.raises(ScheduleError):
        simulate(streams, Costs.equal(2))


def test_what_is_there_twice_is_refused():
    streams = build("gpipe", 2, 2)
    streams[0].insert(0, streams[0][0])
    with pytest.raises(ScheduleError, match="twice"):
        simulate(streams, Costs.equal(2))


def test_an_instruction_on_another_rank_is_refused():
    streams = build("gpipe", 2, 2)
    streams[0][0], streams[1][0] = streams[1][0], streams[0][0]
    with pytest.raises(ScheduleError, match="rank 1 holds stage 1"):
        simulate(streams, Costs.equal(2))


def test_streams_without_a_pass_are_refused():
    for streams in ([], [[]], [[], []]):
        with pytest.raises(ScheduleError, match="no pass is placed yet"):
            simulate(streams, Costs.equal(2))
