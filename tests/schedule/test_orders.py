"""Schedules: the order of torch and of DeepSpeed, the pictures of the docstrings, and what the checker refuses."""

import doctest
import inspect
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_schedules import accepted, full

from pipetutor.schedule import formulas, orders, rules
from pipetutor.schedule.formulas import closed_form
from pipetutor.schedule.orders import SCHEDULES, STEP, Instruction, build
from pipetutor.schedule.rules import ScheduleError, check, picture, placement

GRID = [(ranks, micro_batches) for ranks in range(1, 7) for micro_batches in (1, 2, 3, 4, 6, 8, 12, 15)]
TORCH = {"FORWARD": "ForwardPass", "FULL_BACKWARD": "BackwardPass"}
TORCH |= {"BACKWARD_INPUT": "BackwardInput", "BACKWARD_WEIGHT": "BackwardWeight"}


def passes(stream):
    return [instruction for instruction in stream if instruction.name not in STEP]


def run_by_torch(schedule, ranks, micro_batches, rank):
    """What torch's loop asks of a stage that only takes notes; no process group is needed.

    ``_get_pipeline_order`` is no help: in torch 2.15 it numbers the last stage's forward passes of 1F1B from 1.
    """
    torch_schedule = MagicMock(_n_microbatches=micro_batches, _num_stages=ranks)
    torch_schedule._check_inputs.return_value = [None] * micro_batches, [None] * micro_batches
    stage = torch_schedule._stage
    stage.stage_index = rank
    for operations in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stage, operations).side_effect = lambda micro_batch: []
    schedule._step_microbatches(torch_schedule)
    names = {"forward_one_chunk": "ForwardPass", "backward_one_chunk": "BackwardPass"}
    return [Instruction(names[c[0]], rank, c.args[0]) for c in stage.method_calls if c[0] in names]


def planned_by_torch(schedule, ranks, micro_batches, rank, chunks):
    """torch's list of actions, whose method reads a few numbers; it writes None where a rank waits.

    Of two passes that it runs at once, the forward pass stands first.
    """
    numbers = SimpleNamespace(_n_microbatches=micro_batches, pp_group_size=ranks, n_local_stages=chunks)
    numbers.microbatches_per_round, numbers.num_stages, numbers._stages = ranks, ranks * chunks, [None] * chunks
    actions = [action for action in schedule._calculate_single_rank_operations(numbers, rank) if action]
    actions = [part for action in actions for part in action.sub_actions or (action,)]
    return [Instruction(TORCH[a.computation_type.name], a.stage_index, a.microbatch_index) for a in actions]


@pytest.mark.parametrize(("ranks", "micro_batches"), GRID)
def test_order_is_torchs(ranks, micro_batches):
    from torch.distributed.pipelining import schedules as torchs

    for name, schedule in (("gpipe", torchs.ScheduleGPipe), ("1f1b", torchs.Schedule1F1B)):
        for rank, stream in enumerate(build(name, ranks, micro_batches)):
            assert passes(stream) == run_by_torch(schedule, ranks, micro_batches, rank)
    planned = [("zero_bubble", torchs.ScheduleInterleavedZeroBubble, 1), ("zbv", torchs.ScheduleZBVZeroBubble, 2)]
    planned += [("looped_bfs", torchs.ScheduleLoopedBFS, chunks) for chunks in (2, 3, 4)]
    if micro_batches % ranks == 0:
        planned += [("interleaved_1f1b", torchs.ScheduleInterleaved1F1B, chunks) for chunks in (2, 3, 4)]
    if micro_batches >= 2 * ranks:
        planned += [("dualpipev", torchs.ScheduleDualPipeV, 2)]
    for name, schedule, chunks in planned:
        for rank, stream in enumerate(build(name, ranks, micro_batches, chunks)):
            assert passes(stream) == planned_by_torch(schedule, ranks, micro_batches, rank, chunks), name


@pytest.mark.parametrize("stages", range(1, 9))
def test_full_stream_is_deepspeeds(stages):
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    for micro_batches in range(1, 33):
        streams = full(stages, micro_batches)
        check(streams)
        for stage, ours in enumerate(streams):
            theirs = TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage)
            buffers = theirs.num_pipe_buffers()
            expected = [(type(i).__name__, getattr(i, "buffer_id", None)) for step in theirs.steps() for i in step]
            assert expected == [(i.name, None if i.name in STEP else i.micro_batch % buffers) for i in ours]


@pytest.mark.parametrize("ranks", range(1, 7))
def test_dualpipev_is_deepspeeds_whose_backward_passes_are_whole(ranks):
    from deepspeed.runtime.pipe.schedule import DualPipeVSchedule

    for micro_batches in range(2 * ranks, 2 * ranks + 9):
        for rank, ours in enumerate(build("dualpipev", ranks, micro_batches)):
            theirs = DualPipeVSchedule(micro_batches=micro_batches, stages=ranks, stage_id=rank)
            found = [
                (i.name, *divmod(i.buffer_id, micro_batches)) for step in theirs for i in step if "Pass" in i.name
            ]
            whole = [i._replace(name=i.name.replace("Input", "Pass")) for i in passes(ours)]
            assert found == [(i.name, int(i.stage != rank), i.micro_batch) for i in whole if "Weight" not in i.name]


@pytest.mark.parametrize(
    ("schedule", "ranks", "micro_batches", "chunks"),
    [
        ("naive", 3, 3, 1),
        ("gpipe", 3, 4, 1),
        ("1f1b", 3, 4, 1),
        ("interleaved_1f1b", 2, 4, 2),
        ("zero_bubble", 3, 5, 1),
        ("looped_bfs", 2, 3, 2),
        ("zbv", 2, 4, 2),
        ("dualpipev", 2, 5, 2),
    ],
)
def test_docstring_shows_the_schedule(schedule, ranks, micro_batches, chunks):
    drawn = picture(build(schedule, ranks, micro_batches, chunks))
    text = "\n".join(line.strip() for line in inspect.getdoc(SCHEDULES[schedule]).splitlines())
    assert drawn in text


def test_picture_of_a_full_stream():
    assert picture(full(2, 2)).splitlines() == [
        "L0  F0  SA0 L1  F1  .   RG0 SA1 B0  .   .   RG1 B1",
        ".   .   RA0 L0  F0  B0  SG0 RA1 L1  F1  B1  SG1 .",
    ]


def test_examples_of_the_docstrings():
    assert [doctest.testmod(module).failed for module in (formulas, orders, rules)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpipe", 0, 4), "0 ranks and 4 micro-batches: use at least 1 of each"),
        (("naive", 4, 0), "4 ranks and 0 micro-batches: use at least 1 of each"),
        (("interleaved_1f1b", 4, 6, 2), "6 micro-batches are not a multiple of 4 ranks.* use 8 micro-batches"),
        (("interleaved_1f1b", 4, 8, 1), "chunks is 1, .* at least 2 a rank: chunks=2 .*, or 1f1b"),
        (("looped_bfs", 4, 6), "chunks is 1, .* at least 2 a rank: chunks=2 .*, or gpipe"),
        (("1f1b", 4, 8, 2), "2 chunks, but 1f1b has 1 on each rank: use interleaved_1f1b or looped_bfs"),
        (("zbv", 4, 8, 3), "3 chunks, but zbv has always 2 on each rank: leave chunks out"),
        (("dualpipev", 4, 7), "as many micro-batches as stages, two for each rank: use 8 or more, not 7, or zbv"),
        (("1b1f", 4, 8), "unknown schedule '1b1f': use naive, .*, zero_bubble, looped_bfs, zbv, dualpipev"),
    ],
)
def test_bad_numbers_teach(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


def test_no_such_rank():
    with pytest.raises(ValueError, match=r"rank 4 of 4 ranks: use 0 to 3"):
        list(SCHEDULES["1f1b"](4, 8, 4))


def test_no_closed_form():
    for name, chunks, enough in (("zero_bubble", 1, 4), ("looped_bfs", 2, 4), ("zbv", 1, 7)):
        with pytest.raises(ValueError, match=f"{name} .* {enough - 1} micro-batches .*: use {enough} or more"):
            closed_form(name, 4, enough - 1, chunks)
    with pytest.raises(ValueError, match="unknown schedule"):
        closed_form("zb", 4, 3)
    with pytest.raises(ValueError, match="3 chunks, but gpipe has 1 on each rank"):
        closed_form("gpipe", 4, 8, chunks=3)
    with pytest.raises(ValueError, match="6 micro-batches are not a multiple of 4 ranks"):
        closed_form("interleaved_1f1b", 4, 6, chunks=2)


@st.composite
def valid(draw, names=(*SCHEDULES, "deepspeed"), least_ranks=1):
    """A schedule of up to 4 ranks."""
    name = draw(st.sampled_from(names))
    ranks, micro_batches = draw(st.integers(least_ranks, 4)), draw(st.integers(1, 6))
    if name == "deepspeed":
        return full(ranks, micro_batches)
    return build(name, ranks, *accepted(name, ranks, micro_batches, draw(st.integers(2, 3))))


def place_of(draw, streams, wanted):
    """Draw the place, (rank, number), of an instruction that is wanted."""
    places = [(r, n) for r, stream in enumerate(streams) for n, i in enumerate(stream) if wanted(i)]
    return draw(st.sampled_from(places))


def before(stream, moved, other):
    """Put the first instruction just before the other."""
    rest = [instruction for instruction in stream if instruction != moved]
    return [item for i in rest for item in ((moved, i) if i == other else (i,))]


repeatable = settings(deadline=None, derandomize=True, max_examples=60)


@repeatable
@given(valid())
def test_valid_schedules_pass(streams):
    check(streams)


@repeatable
@given(valid(least_ranks=2), st.data())
def test_a_dropped_instruction_is_found(streams, data):
    """Reductions may be dropped: without replicas there is nothing to reduce."""
    rank, number = place_of(data.draw, streams, lambda i: not i.name.startswith("Reduce"))
    dropped = streams[rank].pop(number)
    with pytest.raises(ScheduleError, match=f"never runs {dropped}:|OptimizerStep must be last"):
        check(streams)


@repeatable
@given(valid(), st.data())
def test_an_instruction_that_is_there_twice_is_found(streams, data):
    rank, number = place_of(data.draw, streams, lambda i: True)
    twice = streams[rank][number]
    streams[rank].insert(data.draw(st.integers(0, len(streams[rank]))), twice)
    with pytest.raises(ScheduleError, match=f"rank {rank} runs {twice} twice, as instructions|the weights change"):
        check(streams)


@repeatable
@given(valid(), st.data())
def test_a_backward_before_its_forward_is_found(streams, data):
    rank, number = place_of(data.draw, streams, lambda i: i.name in ("BackwardPass", "BackwardInput"))
    backward = streams[rank][number]
    forward = backward._replace(name="ForwardPass")
    streams[rank] = before(streams[rank], backward, forward)
    with pytest.raises(ScheduleError, match=rf"rank {rank} runs {backward} \(.*\) before .* swap them"):
        check(streams)


@repeatable
@given(valid(names=("zero_bubble",)), st.data())
def test_a_weight_pass_before_its_input_pass_is_found(streams, data):
    rank, number = place_of(data.draw, streams, lambda i: i.name == "BackwardWeight")
    weight = streams[rank][number]
    streams[rank] = before(streams[rank], weight, weight._replace(name="BackwardInput"))
    with pytest.raises(ScheduleError, match=rf"{weight} \(.*\) before BackwardInput"):
        check(streams)


@repeatable
@given(valid(), st.data())
def test_a_step_before_the_last_pass_is_found(streams, data):
    rank = data.draw(st.integers(0, len(streams) - 1))
    step = streams[rank].pop()
    streams[rank].insert(data.draw(st.integers(0, len(streams[rank]) - 1)), step)
    with pytest.raises(ScheduleError, match=f"rank {rank}: .* OptimizerStep must be last"):
        check(streams)


@repeatable
@given(valid(), st.data(), st.sampled_from(["name", "AggregateLoss", "stage", "micro_batch", "none"]))
def test_an_instruction_that_does_not_belong_is_found(streams, data, what):
    rank, number = place_of(data.draw, streams, lambda i: i.micro_batch is not None)
    wrong = {
        "name": {"name": "Forward"},
        "AggregateLoss": {"name": "AggregateLoss", "micro_batch": None},
        "stage": {"stage": -1},
        "micro_batch": {"micro_batch": -1},
        "none": {"micro_batch": None},
    }
    streams[rank][number] = streams[rank][number]._replace(**wrong[what])
    with pytest.raises(ScheduleError, match=f"rank {rank}, instruction {number}: .*(use|does|holds)"):
        check(streams)


@repeatable
@given(st.integers(2, 5), st.integers(2, 8), st.data())
def test_two_neighbours_that_both_send_first_are_found(stages, micro_batches, data):
    """Where a gradient and an activation cross, one stage is made to send before it receives."""
    streams = full(stages, micro_batches)
    crossings = [
        (rank, number)
        for rank, stream in enumerate(streams)
        for number in range(len(stream) - 1)
        if (stream[number].name, stream[number + 1].name) == ("RecvGrad", "SendActivation")
    ]
    rank, number = data.draw(st.sampled_from(crossings))
    receive, send = streams[rank][number : number + 2]
    streams[rank][number : number + 2] = [send, receive]
    with pytest.raises(ScheduleError, match="deadlock") as error:
        check(streams)
    peer = f"RecvActivation {send.micro_batch} of stage {rank + 1} on rank {rank + 1}"
    assert f"rank {rank} stands at {send} and waits for {peer}" in str(error.value)
    peer = f"RecvGrad {receive.micro_batch} of stage {rank} on rank {rank}"
    sent = f"SendGrad {receive.micro_batch} of stage {rank + 1}"
    assert f"rank {rank + 1} stands at {sent} and waits for {peer}" in str(error.value)


def test_a_deadlock_of_compute_streams_names_every_stuck_rank():
    """Rank 0 wants its first gradient before it goes on; rank 1 wants all its inputs before it goes back."""
    with pytest.raises(ScheduleError) as error:
        check([build("naive", 2, 2)[0], build("gpipe", 2, 2)[1]])
    assert str(error.value).startswith(
        "deadlock: rank 0 stands at BackwardPass 0 of stage 0 and waits for BackwardPass 0 of stage 1 on rank 1; "
        "rank 1 stands at ForwardPass 1 of stage 1 and waits for ForwardPass 1 of stage 0 on rank 0. "
    )


def test_streams_without_a_pass_are_refused():
    for streams in ([], [[]], [[Instruction("OptimizerStep", 0, None)]]):
        with pytest.raises(ScheduleError, match="no pass is placed yet"):
            check(streams)


@pytest.mark.parametrize("order", [(0, 1, 2, 4, 3, 5), (0, 1, 3, 4, 2, 5)])
def test_reductions_come_in_order_after_the_passes(order):
    (stream,) = full(1, 1)
    with pytest.raises(
        ScheduleError, match="rank 0: ReduceTiedGrads, ReduceGrads, OptimizerStep end a step, in this"
    ):
        check([[stream[number] for number in order]])


def test_an_instruction_on_another_rank_is_found():
    streams = build("gpipe", 2, 2)
    streams[1].insert(0, streams[0].pop(0))
    streams[0].insert(0, streams[1].pop(1))
    with pytest.raises(ScheduleError, match="0: ForwardPass 0 of stage 1, but rank 1 holds stage 1"):
        check(streams)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_placement_of_a_name_is_that_of_its_streams(schedule):
    for ranks, micro_batches, chunks in ((1, 2, 2), (2, 4, 3), (3, 6, 2)):
        chunks = chunks if schedule in orders.LOOPED else 1
        assert orders.placement_of(schedule, ranks, chunks) == placement(
            build(schedule, ranks, micro_batches, chunks)
        )
