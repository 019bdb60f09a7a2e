"""Traces: every instruction, once, on one clock, in a file that Perfetto and chrome://tracing read."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from conftest import train

from pipetutor.schedule.orders import deepspeed_1f1b
from pipetutor.schedule.timeline import CODE, KINDS, SPAN, Timeline
from pipetutor.tracing import chrome, trace

MODEL = ["--model", "tiny", "--partition", "0,3,14", "--dropout", 0]


def instructions(timeline: Timeline, rank: int) -> list[tuple[str, int | None]]:
    spans = timeline.of(rank)
    return [(KINDS[s["kind"]], None if s["micro_batch"] < 0 else int(s["micro_batch"])) for s in spans]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    directory = tmp_path_factory.mktemp("traced")
    config = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
    return train(directory, "-s", 3, "--trace", *MODEL, stages=2, replicas=2, config=config)


def test_every_rank_has_the_engines_instructions_in_their_order(traced):
    for number, step in enumerate(trace.load(traced).steps, start=1):
        assert step.number == number and step.timeline.ranks == 4
        for rank in range(4):
            planned = [(i.name, i.micro_batch) for i in deepspeed_1f1b(2, 4, rank // 2)]
            assert instructions(step.timeline, rank) == [*planned, ("AggregateLoss", None)]
            spans = step.timeline.of(rank)
            assert set(spans["stage"]) == {rank // 2} and set(spans["replica"]) == {rank % 2}
            assert (spans["memory"] > 1e6).all() and step.peaks[rank] >= spans["memory"].max() * 0.99


def test_one_clock_for_all_ranks(traced):
    """A message is sent before it is there, and spans of a rank follow each other, within their step."""
    for step in trace.load(traced).steps:
        timeline = step.timeline
        times = {(KINDS[s["kind"]], s["rank"], s["micro_batch"]): s for s in timeline.spans}
        for (name, rank, micro_batch), span in times.items():
            assert timeline.begin <= span["begin"] <= span["end"] <= timeline.end
            assert 0 <= span["waiting"] <= span["end"] - span["begin"]
            if name == "RecvActivation":
                assert span["end"] >= times["SendActivation", rank - 2, micro_batch]["begin"]
        for rank in range(4):
            for one, other in itertools.pairwise(timeline.of(rank)):
                assert one["end"] <= other["begin"]


def test_the_account_adds_up_to_the_step(traced):
    """Nothing counts twice."""
    for step in trace.load(traced).steps:
        for account in step.timeline.accounting():
            assert sum(account.values()) == pytest.approx(step.timeline.seconds)
            assert min(account.values()) >= 0


def busy_between_steps():
    """Rank 1 has something else to do for two seconds after each step."""
    import os
    import time

    from pipetutor.core.records import StepWriter

    if os.environ["RANK"] == "1":
        write = StepWriter.write
        StepWriter.write = lambda self, *step: (write(self, *step), time.sleep(2))


def test_a_step_begins_on_all_ranks_at_once(runs):
    """What a rank still does between two steps is no part of the second one, which would not know what it was."""
    run = train(runs, "-s", 2, "--trace", *MODEL, stages=2, patch=busy_between_steps)
    for account in trace.load(run).steps[1].timeline.accounting():
        assert account["other"] < 1


def slow_first_stage(runs):
    """Stage 0 takes half a second more for each of four passes. Return the second step: its run and two accounts."""
    fault = ["--fault", "slow:rank=0,step=2,seconds=0.5"]
    run = train(runs, "-s", 2, "--trace", *fault, *MODEL, stages=2)
    return run, trace.load(run).steps[1].timeline.accounting()


def test_who_waits_for_whom(runs):
    """Stage 1 waits for each activation, and that is no transfer; most of the step is explained."""
    run, (first, second) = slow_first_stage(runs)
    assert first["compute"] > 2
    assert second["waiting"] > 0.5 and second["waiting"] > 2 * max(first["waiting"], second["transfer"])
    for account in (first, second):
        assert account["other"] < run.seconds[1] / 4


def test_with_zero_a_rank_waits_for_all_others():
    """In 2 x 2: its replica, its other stage, and through them the fourth. Copies of tied weights stay two pairs."""
    step, tied = CODE["OptimizerStep"], CODE["ReduceTiedGrads"]
    norms = {(0, step): (0, 1, 2), (1, step): (0, 1, 3), (2, step): (0, 2, 3), (3, step): (1, 2, 3)}
    copies = {(rank, tied): (rank % 2, rank % 2 + 2) for rank in range(4)}
    assert trace._joined(norms | copies) == {key: (0, 1, 2, 3) for key in norms} | copies


def test_copies_of_tied_weights_wait_for_each_other(runs):
    """The last stage, which has gone backward first, waits for the first one; the middle one has no copy."""
    config = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.1}
    asked = ["--model", "gpt:layers=2,width=16", "--dataset", "sums", "--partition", "0,2,3,6", "--trace", "-s", "3"]
    for step in trace.load(train(runs, *asked, stages=3, config=config)).steps:
        spans = step.timeline.spans
        first, middle, last = spans[spans["kind"] == CODE["ReduceTiedGrads"]]
        early, late = sorted((first, last), key=lambda span: span["begin"])
        assert middle["waiting"] == late["waiting"] == 0 < early["waiting"]
        assert early["begin"] + early["waiting"] == pytest.approx(min(late["begin"], early["end"]), abs=1e-6)
        norms = spans[spans["kind"] == CODE["OptimizerStep"]]
        assert min(norms["waiting"]) == 0 < max(norms["waiting"]), "the norm of all gradients needs all stages"


@pytest.mark.slow
def test_the_account_is_the_step_that_the_run_timed(runs):
    """Within 2 %, and hardly any of it is left unexplained."""
    run, accounts = slow_first_stage(runs)
    for account in accounts:
        assert sum(account.values()) == pytest.approx(run.seconds[1], rel=0.02) and account["other"] < 0.1


def test_a_data_parallel_step_is_traced_too(runs):
    run = train(runs, "-s", 2, "--trace", "--model", "tiny", stages=0, replicas=1)
    names = Counter(name for name, _ in instructions(trace.load(run).typical.timeline, 0))
    assert names == {"LoadMicroBatch": 2, "ForwardPass": 2, "BackwardPass": 2, "OptimizerStep": 1}


def another_host():
    """Rank 1 believes that it runs on another host, whose clock is 1,000 s behind."""
    import os
    import time
    from pathlib import Path

    if os.environ["RANK"] == "1":
        read, clock = Path.read_text, time.perf_counter
        Path.read_text = lambda path, **how: "another" if path.name == "boot_id" else read(path, **how)
        time.perf_counter = lambda: clock() - 1000


def test_clocks_of_two_hosts_are_brought_together(runs):
    """Both clocks are the same one here, so what the estimate should be is known, but for half an exchange."""
    run = train(runs, "-s", 2, "--trace", *MODEL, stages=2, patch=another_host)
    measured = trace.load(run)
    offsets = [head["clock_offset"] for head in measured.heads]
    assert offsets[0] == 0 and offsets[1] == pytest.approx(1000, abs=1)
    assert measured.typical.timeline.seconds < 60


def test_chrome_trace(traced):
    """The required keys of the format; arrows that begin and end within slices; every span is there."""
    content = json.loads((traced.directory / "trace.json").read_text())
    assert content["displayTimeUnit"] == "ms" and content["otherData"]["devices"] == ["cpu"] * 4
    assert content["otherData"]["waiting"] == chrome.WAITING[True]
    by_phase: dict[str, list[dict]] = {}
    for event in content["traceEvents"]:
        assert {"name", "ph", "pid"} <= event.keys()
        by_phase.setdefault(event["ph"], []).append(event)
    assert by_phase.keys() == {"M", "X", "s", "f", "C"}
    slices = [e for e in by_phase["X"] if e["name"] not in ("waiting", "transfer")]
    assert len(slices) == sum(len(step.timeline.spans) for step in trace.load(traced).steps)
    assert all(e["dur"] >= 0 and e["ts"] >= 0 and {"tid", "args"} <= e.keys() for e in by_phase["X"])
    assert sorted(e["id"] for e in by_phase["s"]) == sorted(e["id"] for e in by_phase["f"])
    assert len({e["id"] for e in by_phase["s"]}) == len(by_phase["s"]) == 3 * 2 * 4 * 2
    for arrow in by_phase["s"] + by_phase["f"]:
        end = {"s": "Send", "f": "Recv"}[arrow["ph"]]
        assert around(slices, arrow)["name"].split()[0] == end + arrow["name"]
        assert arrow["ph"] == "s" or around(by_phase["X"], arrow)["name"] == "transfer"
    assert forwards(by_phase)
    assert one_micro_batch(by_phase)
    arrives = {e["id"]: e["ts"] for e in by_phase["f"]}
    assert all(e["ts"] < arrives[e["id"]] for e in by_phase["s"]), "a message cannot arrive before it leaves"
    waits = [e for e in by_phase["X"] if e["cat"] == "waiting"]
    assert waits and all(any(e["ts"] == w["ts"] and e["dur"] >= w["dur"] for e in slices) for w in waits)


def around(slices, arrow):
    """The slice that a viewer binds the end of an arrow to: of those around it the one that began last."""
    open_then = [e for e in slices if e["tid"] == arrow["tid"] and e["ts"] <= arrow["ts"] < e["ts"] + e["dur"]]
    return max(open_then, key=lambda e: (e["ts"], -e["dur"]))


def ends(by_phase):
    """For each arrow the slices at its two ends."""
    leaves, arrives = ({e["id"]: around(by_phase["X"], e) for e in by_phase[phase]} for phase in "sf")
    return [(leaves[number], arrives[number]) for number in leaves]


def one_micro_batch(by_phase):
    """Whether both ends of each arrow are in slices of the same micro-batch."""
    return all(one["args"]["micro_batch"] == other["args"]["micro_batch"] for one, other in ends(by_phase))


def forwards(by_phase):
    """Whether each arrow leaves a slice that begins before the one at its other end: else Perfetto turns it round."""
    return all(one["ts"] < other["ts"] for one, other in ends(by_phase))


def test_arrows_of_messages_in_the_background(runs):
    """torch's engine: a message leaves when it is computed, and arrives later, whenever its Send is waited for."""
    flags = ["-s", 2, "--trace", "--engine", "torch", "--schedule", "interleaved_1f1b", "--chunks", 2]
    run = train(runs, *flags, "--model", "tiny", "--dropout", 0, stages=2)
    events = json.loads((run.directory / "trace.json").read_text())["traceEvents"]
    leaves, arrives = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert leaves.keys() == arrives.keys() and len(leaves) == 2 * 2 * 3 * 2, "steps, ways, boundaries, micro-batches"
    for message, left in leaves.items():
        assert left["ts"] < arrives[message]["ts"] and left["tid"] != arrives[message]["tid"]
    by_phase = {phase: [e for e in events if e["ph"] == phase] for phase in "Xsf"}
    made = {"Activation": "ForwardPass", "Grad": "BackwardPass"}
    assert all(around(by_phase["X"], arrow)["name"].split()[0] == made[arrow["name"]] for arrow in by_phase["s"])
    assert forwards(by_phase)
    assert one_micro_batch(by_phase)


SENT = [
    # rank, instruction, micro-batch, begin, end; what of it is waiting with blocking calls, and in the background
    (0, "ForwardPass", 0, 0.0, 2.0, 0.0, 0.0),
    (0, "SendActivation", 0, 2.0, 9.0, 6.0, 6.0),  # until rank 1 has come to its Recv
    (0, "SendActivation", 1, 9.0, 9.5, 0.0, 0.5),  # over before: into a buffer, or taken in the background
    (1, "ForwardPass", 7, 0.0, 8.0, 0.0, 0.0),
    (1, "RecvActivation", 0, 8.0, 9.0, 0.0, 0.0),
    (1, "RecvActivation", 1, 11.0, 12.0, 0.0, 0.0),
    (1, "BackwardPass", 0, 12.0, 14.0, 0.0, 0.0),
    (0, "RecvGrad", 0, 9.5, 15.0, 5.0, 4.5),  # until rank 1 has come to its Send, or has computed the gradient
    (1, "SendGrad", 0, 14.5, 15.0, 0.0, 0.0),
]


@pytest.mark.parametrize("blocking", [True, False])
def test_waiting_by_hand(blocking):
    spans = np.array(
        [(r, r, 0, CODE[name], number, begin, end, 0, 0) for r, name, number, begin, end, *_ in SENT], dtype=SPAN
    )
    assert trace._waiting(spans, blocking, {}).tolist() == [row[5 if blocking else 6] for row in SENT]


def test_no_trace(runs):
    run = train(runs, "-s", 1, "--model", "tiny")
    with pytest.raises(ValueError, match="holds no traced step: launch the run with trace=True"):
        trace.load(run)


def timed_recorder():
    """Each rank notes the processor time that its recorder takes, step by step: what else runs has no part in it."""
    import time

    from pipetutor.tracing.record import Recorder

    spent = [0.0]

    def timed(name, method):
        def run(self, *arguments):
            begin = time.thread_time()
            method(self, *arguments)
            spent[-1] += time.thread_time() - begin
            if name == "end":
                self._path.with_suffix(".cost").write_text(str(spent))
                spent.append(0.0)

        return run

    for name in ("begin", "before", "after", "end"):
        setattr(Recorder, name, timed(name, getattr(Recorder, name)))


def test_tracing_costs_less_than_2_percent_of_a_step(runs):
    """Measured within a real run of AlexNet, whose steps are short here: the more a recorder has to take of them."""
    config = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
    flags = ["-s", 4, "--trace", "--partition", "0,16,22", "--dropout", 0]
    run = train(runs, *flags, stages=2, config=config, patch=timed_recorder)
    for rank in range(2):
        spent = json.loads((run.directory / f"trace_rank{rank}.cost").read_text())
        shares = [cost / seconds for cost, seconds in zip(spent, run.seconds, strict=True)]
        print(f"rank {rank}: tracing takes {', '.join(f'{share:.2%}' for share in shares)} of its steps")
        assert sorted(shares)[2] < 0.02
