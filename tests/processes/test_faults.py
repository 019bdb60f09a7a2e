"""A run that hangs, dies or slows down is ended in time, and the error names who, where and why."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import HANGS, SMALL_SGD, RankFailed, processes_of, train

from pipetutor import RunFailed, launch
from pipetutor.core import records
from pipetutor.processes.diagnosis import diagnose
from pipetutor.processes.faults import KINDS, OF_HOSTS, Fault
from pipetutor.processes.heartbeat import Beat, Heartbeat, ask_for_stacks, culprits, read
from pipetutor.processes.supervise import Progress
from pipetutor.schedule.orders import Instruction

DEADLINE = 8  # of a run whose first step takes half a second, the others less: a machine may be ten times slower


def ranks_of(beats):
    return [beat.rank for beat in beats]


def blamed(waits):
    """Whom ``culprits`` blames, where each rank waits for the given ones, in a pass where for none."""
    beats = [
        Beat(rank, "training", 3, "RecvGrad" if peers else "ForwardPass", 0, peers) for rank, peers in waits.items()
    ]
    return [ranks_of(found) for found in culprits(beats)]


@pytest.mark.parametrize(
    "waits, expected",
    [
        ({0: [1], 1: [2], 2: []}, [[2]]),
        ({0: [], 1: [], 2: [1]}, [[0], [1]]),
        ({0: [1], 1: [0]}, [[0, 1]]),
        ({0: [1], 1: [0], 2: [1], 3: [2]}, [[0, 1]]),
        ({0: [1], 1: [2], 2: [3], 3: [1]}, [[1, 2, 3]]),
        ({0: [1], 1: [0], 2: [3], 3: [2], 4: [3]}, [[0, 1], [2, 3]]),
        ({0: [1], 1: [0], 2: [1], 3: []}, [[0, 1], [3]]),
        ({0: [1], 1: [2], 2: [3], 3: []}, [[3]]),
        ({0: [1], 1: [0, 2], 2: []}, [[2]]),
        ({0: [1, 3], 1: [0], 2: [0], 3: [2]}, [[0, 1, 2, 3]]),
        ({0: [7]}, [[0]]),
        ({}, []),
    ],
    ids=[
        "a chain",
        "two that wait for nobody",
        "a circle",
        "a circle with a tail",
        "a circle at the end of a tail",
        "two circles and a tail",
        "a circle, and one that waits for nobody",
        "a tail on a stalled rank",
        "a circle that waits for a stalled rank",
        "two circles that share a rank",
        "a peer without a heartbeat",
        "nobody",
    ],
)
def test_the_culprits_are_where_the_waits_end(waits, expected):
    """At a rank that waits for nobody, or in a circle; who waits for a circle from outside is not in it."""
    assert blamed(waits) == expected


@pytest.mark.parametrize("name", ["ReduceGrads", "OptimizerStep"])
def test_who_waits_in_one_collective_waits_for_who_is_missing(name):
    replicas = [
        Beat(0, "training", 3, name, None, [1, 2]),
        Beat(1, "training", 3, name, None, [0, 2]),
        Beat(2, "training", 3, "BackwardPass", 1),
    ]
    assert [ranks_of(found) for found in culprits(replicas)] == [[2]]


def test_a_collective_that_all_have_come_to_is_no_circle():
    """It takes its time, and nobody waits for anybody."""
    both = [Beat(rank, "training", 3, "ReduceGrads", None, [1 - rank]) for rank in (0, 1)]
    assert [ranks_of(found) for found in culprits(both)] == [[0], [1]]


def test_who_is_a_step_behind_is_waited_for():
    behind = [Beat(0, "training", 4, "RecvGrad", 0, [1]), Beat(1, "saving", 3)]
    assert [ranks_of(found) for found in culprits(behind)] == [[1]]


def test_a_circle_is_named_as_one(tmp_path):
    """Ranks 0 and 1 both receive, and rank 2 waits for rank 1; it came least far, and is not to blame."""
    beats = [
        {"rank": 0, "phase": "training", "step": 2, "instruction": "RecvGrad", "micro_batch": 0, "peers": [1]},
        {"rank": 1, "phase": "training", "step": 2, "instruction": "RecvActivation", "micro_batch": 1, "peers": [0]},
        {"rank": 2, "phase": "training", "step": 1, "instruction": "RecvActivation", "micro_batch": 0, "peers": [1]},
    ]
    said = diagnose(tmp_path, {"cancelled": False, "stalled": beats, "stopped": [], "deadline": 9, "ranks": 3})
    assert said.startswith(
        "no step was completed in 9 s: ranks 0 and 1 wait for each other in a circle: rank 0 is at RecvGrad of "
        "micro-batch 0 in step 2, which needs rank 1\n"
    )


def test_a_heartbeat_is_read_as_it_was_written(tmp_path):
    heart = Heartbeat(tmp_path, 3)
    assert read(tmp_path)[0].phase == "starting"
    heart.enter("training", 7)
    before = read(tmp_path)[0]
    heart.before(Instruction("RecvGrad", 3, 11), [2])
    (beat,) = read(tmp_path)
    assert (beat.rank, beat.step, beat.instruction, beat.micro_batch, beat.peers) == (3, 7, "RecvGrad", 11, [2])
    assert str(beat) == "RecvGrad of micro-batch 11 in step 7, which needs rank 2"
    assert beat.progress == before.progress, "an instruction of a step is no step"
    assert 0 <= time.time() - beat.since < 5
    heart.enter("evaluating", 7)
    heart.before(Instruction("ForwardPass", 3, 0))
    assert read(tmp_path)[0].progress == before.progress + 2
    assert str(read(tmp_path)[0]) == "ForwardPass of micro-batch 0 evaluating after step 7"


def test_a_heartbeat_that_is_being_written_is_read_at_the_next_look(tmp_path):
    Heartbeat(tmp_path, 0)
    (tmp_path / "heartbeat_rank1.json").write_text('{"rank": 1, "phase": "trai')
    assert ranks_of(read(tmp_path)) == [0]


def test_a_heartbeat_may_be_of_any_length(tmp_path):
    """A thousand ranks wait in a collective, and then two for each other: nothing of the longer line stays."""
    heart = Heartbeat(tmp_path, 0)
    for peers in ([], list(range(1, 1000)), [1]):
        heart.before(Instruction("ReduceGrads", 0), peers)
        (beat,) = read(tmp_path)
        assert (beat.instruction, beat.peers) == ("ReduceGrads", peers)
    assert json.loads((tmp_path / "heartbeat_rank0.json").read_text())["peers"] == [1]


def test_parts_of_two_heartbeats_are_none(tmp_path):
    """Of equal length and each of them JSON: only the checksum tells."""
    heart, path = Heartbeat(tmp_path, 0), tmp_path / "heartbeat_rank0.json"
    heart.enter("training", 3)
    heart.before(Instruction("ForwardPass", 0, 1))
    first = path.read_text()
    heart.before(Instruction("BackwardAll", 0, 2))
    second = path.read_text()
    torn = first[: first.index('"micro_batch"')] + second[second.index('"micro_batch"') :]
    path.write_text(torn)
    assert json.loads(torn)["instruction"] == "ForwardPass" and not read(tmp_path)


def test_a_process_writes_its_stack_when_asked(tmp_path):
    Heartbeat(tmp_path, 0)
    ask_for_stacks(tmp_path, {0: os.getpid()})
    assert "test_a_process_writes_its_stack_when_asked" in (tmp_path / "stack_rank0.txt").read_text()


def test_a_rank_that_gives_no_stack_and_one_that_is_stopped_are_named(tmp_path):
    beats = [{"rank": 0, "phase": "training", "step": 1, "instruction": "RecvGrad", "micro_batch": 0, "peers": [1]}]
    beats.append({"rank": 1, "phase": "training", "step": 1, "instruction": "ForwardPass", "micro_batch": 0})
    report = {"cancelled": False, "stalled": beats, "stopped": [], "deadline": 9, "ranks": 2}
    said = diagnose(tmp_path, report)
    assert "no step was completed in 9 s: rank 1 holds the others up" in said and "it gave no stack" in said
    said = diagnose(tmp_path, report | {"stopped": [1]})
    assert said.startswith("no step was completed in 9 s: rank 1 is stopped, by a SIGSTOP or a debugger;")


def test_a_rank_that_never_came_is_named(tmp_path):
    waiting = {"rank": 0, "phase": "starting"}
    said = diagnose(tmp_path, {"cancelled": False, "stalled": [waiting], "stopped": [], "deadline": 9, "ranks": 2})
    assert said.startswith("no step was completed in 9 s: rank 1 did not start\n    rank 0: starting, for ")


@pytest.mark.parametrize(
    "complaint",
    [
        "[pair.cc:545] Read error [127.0.0.1]:19894: Connection reset by peer.",
        "Connection closed by peer [127.0.0.1]:19894",
        "writev [127.0.0.1]:19894: Broken pipe",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "[unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete",
        "Read timeout [127.0.0.1]:19894",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_complaint_of_a_lost_connection_comes_after_its_cause(tmp_path, complaint):
    """The neighbour of a killed rank may say so before the supervisor has seen the killed one end."""
    (tmp_path / "logs").mkdir()
    records.write_failure(tmp_path, 0, RuntimeError(complaint), "")
    ended = [{"rank": 1, "pid": 2, "time": time.time() + 1, "code": -9}]
    report = {"code": 1, "cancelled": False, "ended": ended, "deadline": 300, "ranks": 2, "stalled": None}
    assert diagnose(tmp_path, report).startswith("rank 1 failed first: killed by SIGKILL (exit code -9)")


def head_and_next(directory, *ends, **more):
    """The first two lines of a diagnosis of ranks that ended so, one after another: (rank, code)."""
    (directory / "logs").mkdir(exist_ok=True)
    now = time.time()
    ended = [{"rank": rank, "pid": 2, "time": now + place, "code": code} for place, (rank, code) in enumerate(ends)]
    report = {"code": 1, "cancelled": False, "ended": ended, "deadline": 300, "ranks": 2, "stalled": None}
    return diagnose(directory, report | more).splitlines()[:2]


def test_what_a_rank_said_goes_before_how_it_was_ended(tmp_path):
    records.write_failure(tmp_path, 1, ArithmeticError("the loss"), "")
    head, _ = head_and_next(tmp_path, (0, -15), (1, -15))
    assert head == "rank 1 failed first: ArithmeticError: the loss (then ended by SIGTERM)"
    head, _ = head_and_next(tmp_path, (0, -15), (1, 1))
    assert head == "rank 1 failed first: ArithmeticError: the loss (exit code 1)"


def test_a_rank_that_was_asked_to_end_followed_another_one(tmp_path):
    assert head_and_next(tmp_path, (0, -15), (1, 3))[0].startswith(
        "rank 1 failed first: see its last lines (exit code 3)"
    )
    assert head_and_next(tmp_path, (0, -35), (1, 3))[0].startswith("rank 0 failed first: killed by signal 35 (exit")
    records.write_failure(tmp_path, 1, RuntimeError("Connection reset by peer"), "")
    assert head_and_next(tmp_path, (0, -15), (1, 1))[0].startswith("rank 0 failed first: killed by SIGTERM")


@pytest.mark.parametrize(
    "kills, words",
    [
        (1, "out of memory: the system's out-of-memory killer ended rank 1; use a smaller micro-batch, more stages"),
        (None, "nothing of this run killed rank 1: probably the system's out-of-memory killer did"),
        (0, "the system did not run out of memory: somebody sent rank 1 a SIGKILL"),
    ],
)
def test_a_rank_that_was_killed_ran_out_of_memory_as_far_as_the_system_tells(tmp_path, kills, words):
    head, then = head_and_next(tmp_path, (1, -9), oom_kills=kills)
    assert head == "rank 1 failed first: killed by SIGKILL (exit code -9)" and then.startswith(words)
    records.write_json(tmp_path / "run.json", {"command": "deepspeed --fault die:step=2,rank=1 -p 2"})
    asked = head_and_next(tmp_path, (1, -9), oom_kills=None)
    assert asked[1].startswith("it wrote nothing to "), "the fault was asked for"


@pytest.fixture
def little_memory():
    """A control group of 200 MB, where this user may make one."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (old if old.exists() else new) / f"pipetutor-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if old.exists() else "memory.max")
        limit.write_text("200M")
        for swap in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            if (group / swap).exists():
                (group / swap).write_text("200M" if "memsw" in swap else "0")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group of its own can be made here: {error}")
    yield group
    group.rmdir()


def test_the_systems_out_of_memory_killer_is_named_for_certain(runs, little_memory):
    """A rank that takes more than its container has: the supervisor sees the system's count of kills rise."""
    code = """
        import os, sys
        from pathlib import Path
        from pipetutor.core import records
        from pipetutor.processes.diagnosis import diagnose
        from pipetutor.processes.children import Process
        from pipetutor.processes.watch import watch

        directory = records.create(Path(sys.argv[1]), "hungry")
        (directory / "logs").mkdir()
        ranks = [Process([sys.executable, "-c", f"x = bytearray({size})"], dict(os.environ), f"rank{rank}.log")
                 for rank, size in enumerate((1, 10**9))]
        print(diagnose(directory, watch(ranks, directory, 300, directory / "steps.jsonl", 1, "steps", str)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(runs)]
    done = subprocess.run(
        command,
        preexec_fn=lambda: (little_memory / "cgroup.procs").write_text("0"),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.stdout.splitlines()[:2] == [
        "rank 1 failed first: killed by SIGKILL (exit code -9)",
        "out of memory: the system's out-of-memory killer ended rank 1; use a smaller micro-batch, more stages, or "
        "recompute=True (--recompute)",
    ], done.stderr


def no_memory():
    import torch

    torch.empty(1 << 45)


def cuda_out_of_memory():
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def shared_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_12>: No space left on device (28)")


@pytest.mark.parametrize(
    "fail, words",
    [
        (
            no_memory,
            "rank 1 ran out of memory: use a smaller micro-batch, more stages, or recompute=True (--recompute)",
        ),
        (cuda_out_of_memory, "rank 1 ran out of memory: use a smaller micro-batch"),
        (lambda: bytearray(1 << 60), "rank 1 ran out of memory: use a smaller micro-batch"),
        (shared_memory, "rank 1 probably found /dev/shm full"),
    ],
)
def test_memory_that_a_rank_does_not_get_is_named_in_words(tmp_path, fail, words):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        fail()
    records.write_failure(tmp_path, 1, caught.value, "")
    assert head_and_next(tmp_path, (0, -15), (1, 1))[1].startswith(words)


def test_memory_that_no_rank_could_tell_of_is_found_in_its_log_or_its_signal(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank1.log").write_text("terminate called after throwing an instance of 'std::bad_alloc'\n")
    assert head_and_next(tmp_path, (1, -6))[1].startswith("rank 1 ran out of memory")
    assert head_and_next(tmp_path, (0, -7))[1].startswith("rank 0 probably found /dev/shm full")


@pytest.mark.parametrize("phase, stands", [("training", True), ("saving", False), ("finished", False)])
def test_only_steps_have_to_meet_the_deadline(tmp_path, phase, stands):
    """A run that saves, or has done its last step, may take longer than a step may."""
    heart = Heartbeat(tmp_path, 0)
    heart.enter(phase, 3)
    progress = Progress(tmp_path, 1, deadline=1e-9)
    found = [progress.stalled() for _ in range(4)]  # progress, and then half a deadline each
    assert (found[-1] is not None) == stands


@pytest.mark.parametrize(
    "text, words",
    [
        ("hang:rank=1,step=3", "unknown fault 'hang': there is stall, die, slow, ragged"),
        ("stall", "needs a rank and a step, in numbers, for example stall:rank=1,step=3"),
        ("stall:rank=one,step=3", "needs a rank and a step"),
        ("stall:rank=1,step=3,seconds=2", "seconds is not for stall"),
        ("slow:rank=1,step=3,seconds=x", r"needs a rank and a step \(slow: seconds, too\), in numbers"),
        ("slow:rank=1,step=3,seconds=-2", "seconds is -2, but must be at least 0"),
    ],
)
def test_a_fault_that_says_too_little_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        launch(steps=3, fault=text)


@pytest.mark.parametrize(
    "fault, stages, words",
    [
        ("stall:rank=2,step=1", 2, "this run has the ranks 0 to 1 and the steps 1 to 3"),
        ("stall:rank=1,step=4", 2, "this run has the ranks 0 to 1 and the steps 1 to 3"),
        ("ragged:rank=1,step=1", 3, "only the first and the last stage load micro-batches; use rank 0 or 2"),
    ],
)
def test_a_fault_that_the_run_has_no_place_for_is_refused(fault, stages, words):
    with pytest.raises(ValueError, match=words):
        launch(stages=stages, steps=3, fault=fault)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_before_the_step_from_which_a_run_goes_on_is_refused(kind):
    who = "host" if kind in OF_HOSTS else "rank"
    fault = Fault.parse(f"{kind}:{who}=0,step=4")
    fault.check(ranks=2, stages=2, steps=6, done=3, hosts=2)
    with pytest.raises(ValueError, match=r"has the \w+ 0 to 1 and the steps 5 to 6, for it resumes after step 4$"):
        fault.check(ranks=2, stages=2, steps=6, done=4, hosts=2)
    with pytest.raises(ValueError, match=r"no step left to do, for it resumes after step 4$"):
        fault.check(ranks=2, stages=2, steps=4, done=4, hosts=2)


def test_a_fault_can_be_read_back():
    assert Fault.parse("slow:rank=1,step=3,seconds=0.5") == Fault("slow", 1, 3, 0.5)


def failure(runs, fault, **options):
    """Launch with a fault; return the error's text and how many seconds after the last step it came."""
    with pytest.raises(RunFailed) as failed:
        launch(steps=1000, model="mobilenet_v3_small", config=SMALL_SGD, fault=fault, runs_dir=runs, **options)
    last = max(path.stat().st_mtime for path in runs.glob("*/steps.jsonl"))
    assert not processes_of(runs.parent)
    assert records.Run.load(failed.value.directory).status == "failed", "the error knows where the run is kept"
    return str(failed.value), time.time() - last


def test_a_rank_that_stalls_is_named_with_its_stack(runs):
    said, late = failure(runs, "stall:rank=1,step=2", deadline=DEADLINE)
    assert said.startswith(f"no step was completed in {DEADLINE} s: rank 1 holds the others up, at ForwardPass of ")
    assert "\n    rank 1: ForwardPass of micro-batch 0 in step 2, for " in said
    assert "rank 0: RecvGrad of micro-batch 0 in step 2, which needs rank 1, for " in said
    assert "the Python stack of rank 1" in said and "faults.py" in said
    assert late < DEADLINE + 60


def test_a_replica_that_is_slow_is_named(runs):
    """Every rank gets on, but no step is completed in time; the baseline, whose ranks meet in ReduceGrads."""
    fault = f"slow:rank=1,step=2,seconds={0.8 * DEADLINE:g}"
    said, late = failure(runs, fault, stages=0, replicas=2, deadline=DEADLINE)
    head = said.splitlines()[0]
    assert "rank 1 holds the others up, at " in head and "Pass of micro-batch 0 in step 2" in head
    assert "rank 0: ReduceGrads of micro-batch 0 in step 2, which needs rank 1" in said
    assert "if the machine is only slow, give it longer: launch(..., deadline=SECONDS)" in said
    assert late < DEADLINE + 60


def test_a_rank_that_dies_is_named_with_what_it_did(runs):
    """Long before the deadline of 300 s: its end is noticed, and nobody waits for it."""
    said, late = failure(runs, "die:rank=0,step=2")
    assert said.startswith(
        "rank 0 failed first: killed by SIGKILL (exit code -9), at ForwardPass of micro-batch 0 in step 2"
    )
    assert "rank 1: RecvActivation of micro-batch 0 in step 2, which needs rank 0" in said and late < 60


RAGGED = "ragged micro-batch: it has 1 of 2 images"


def test_a_ragged_micro_batch_is_named_where_it_is_loaded(runs):
    """The last stage's; a first stage would send activations of another shape."""
    said, late = failure(runs, "ragged:rank=1,step=2")
    head = said.splitlines()[0]
    assert head.startswith(f"rank 1 failed first: ValueError: {RAGGED}")
    assert head.endswith(", at LoadMicroBatch of micro-batch 0 in step 2") and late < 60


def test_a_ragged_micro_batch_of_the_baseline_is_refused_as_well(runs):
    with pytest.raises(RankFailed, match=RAGGED):
        train(runs, "-s", 3, "--fault", "ragged:rank=0,step=2", "--model", "tiny", stages=0)
    said = diagnose(runs, {"cancelled": False, "stalled": None, "ended": [], "code": 1})
    assert said.splitlines()[0].endswith(", at LoadMicroBatch of micro-batch 0 in step 2")
