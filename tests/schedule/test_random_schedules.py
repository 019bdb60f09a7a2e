"""What is a schedule and what is none: our checker, torch and the simulator say the same of thousands."""

from collections import Counter

import pytest
from random_schedules import FAULTS, NOVEL, broken_schedule, random_schedule

from pipetutor.schedule.orders import build
from pipetutor.schedule.rules import ScheduleError, check, placement
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.text import parse

COUNT = 1000
REFUSALS = (
    AssertionError,
    ValueError,
    IndexError,
)  # torch's drawing of what is wrong fails for more ranks than steps


def torchs(streams):
    """Have torch check a schedule and add sends and receives, as its runtime does; no process group is needed."""
    from torch.distributed.pipelining import schedules

    kinds = {
        "ForwardPass": schedules.FORWARD,
        "BackwardPass": schedules.FULL_BACKWARD,
        "BackwardInput": schedules.BACKWARD_INPUT,
        "BackwardWeight": schedules.BACKWARD_WEIGHT,
    }
    runtime = object.__new__(schedules._PipelineScheduleRuntime)
    vars(runtime).update(
        _stages=[],
        pp_group_size=len(streams),
        _num_stages=stages_of(streams),
        _n_microbatches=1 + max(one.micro_batch for stream in streams for one in stream if one.name in kinds),
        _unshard_lookahead="full",
        _max_active_stages=3,
        _max_outstanding_sends=None,
        _defer_reduce_grad_wait=False,
        _defer_pp_recv=False,
    )
    runtime._prepare_schedule_with_comms(
        {
            rank: [schedules._Action(i.stage, kinds[i.name], i.micro_batch) for i in stream if i.name in kinds]
            for rank, stream in enumerate(streams)
        }
    )


def stages_of(streams):
    return 1 + max(one.stage for stream in streams for one in stream if one.micro_batch is not None)


def played(streams):
    return simulate(streams, Costs.equal(stages_of(streams)))


def test_what_is_valid_is_accepted_by_all():
    forms = set()
    for seed in range(COUNT):
        streams = random_schedule(seed)
        check(streams)
        torchs(streams)
        work = sum(one.micro_batch is not None for stream in streams for one in stream)
        assert played(streams).seconds * len(streams) >= work
        names = {one.name for stream in streams for one in stream}
        forms.add((len(streams), "BackwardPass" in names, "BackwardInput" in names))
    assert len(forms) == 4 * 3, "ranks, and backward passes whole, in halves and mixed"


def sends(streams, one):
    """Whether a pass has a result that another rank waits for."""
    other = one.stage + {"ForwardPass": 1, "BackwardWeight": 0}.get(one.name, -1)
    holders = {i.stage: rank for rank, stream in enumerate(streams) for i in stream if i.micro_batch is not None}
    return holders.get(other, holders[one.stage]) != holders[one.stage]


def test_what_is_broken_is_refused_by_all():
    """torch keeps sets of passes: one that is there twice it notices by its message alone, where there is one."""
    found = Counter()
    for seed in range(COUNT):
        fault, streams = broken_schedule(seed)
        reasons = []
        for judge in (check, played):
            with pytest.raises(ScheduleError) as error:
                judge(streams)
            reasons.append(str(error.value))
        assert reasons[0] == reasons[1]
        counted = Counter(one for stream in streams for one in stream)
        unseen = fault == "twice" and not sends(streams, counted.most_common(1)[0][0])
        found[fault, unseen] += 1
        if unseen:
            torchs(streams)
        else:
            with pytest.raises(REFUSALS):
                torchs(streams)
    assert {fault for fault, _ in found} == set(FAULTS) and min(found.values()) > COUNT // len(FAULTS) // 4


def test_a_schedule_that_no_library_has():
    streams = parse(NOVEL)
    check(streams)
    torchs(streams)
    assert placement(streams) == (1, 0, 1) and {len(stream) for stream in streams} == {9 + 2, 18 + 2}
    assert played(streams).seconds < played(build("naive", 3, 4)).seconds
