"""The simulator, fed with what was measured, against real runs that the same test makes."""

import statistics
import time

import pytest
from conftest import train

from pipetutor.costs.measuring import measure
from pipetutor.schedule.orders import build, deepspeed_1f1b
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.timeline import CODE
from pipetutor.tracing import trace

WITHIN = 0.10


def deepspeeds(stages, micro_batches):
    return [list(deepspeed_1f1b(stages, micro_batches, stage)) for stage in range(stages)]


def sleepy_stages():
    """Every stage takes its own time for a pass, and needs no core for it: four of them on any machine."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    def slower(execute, seconds):
        def run(self, *args, **kwargs):
            time.sleep(seconds * (1.5 if self.stage_id == 2 else 1))
            execute(self, *args, **kwargs)

        return run

    seconds = {"ForwardPass": 0.08, "BackwardPass": 0.16}
    for kind, execute in PipelineEngine._INSTRUCTION_MAP.items():
        if kind.__name__ in seconds:
            PipelineEngine._INSTRUCTION_MAP[kind] = slower(execute, seconds[kind.__name__])


def four_stages(runs):
    """Return what is predicted for 1F1B and for one micro-batch after the other, and what a run of 1F1B measured.

    The costs of a stage are those of its own passes; what is predicted is how they fall together.
    """
    micro_batches = 6
    config = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}
    arguments = ["-s", 3, "--trace", "--model", "tiny", "--dropout", 0]
    run = train(runs, *arguments, stages=4, config=config, patch=sleepy_stages)
    timeline = trace.load(run).typical.timeline

    def median(stage, kind):
        spans = timeline.spans[(timeline.spans["stage"] == stage) & (timeline.spans["kind"] == CODE[kind])]
        return statistics.median(spans["end"] - spans["begin"])

    forward = [median(stage, "ForwardPass") for stage in range(4)]
    backward = [median(stage, "BackwardPass") for stage in range(4)]
    assert min(forward) > 0.08 and min(backward) > 0.16, "the stages did not sleep"
    costs = Costs(forward, [0.0] * 4, backward)
    theory, naive = (simulate(s, costs) for s in (deepspeeds(4, micro_batches), build("naive", 4, micro_batches)))
    print(
        f"\nP = 4: predicted {theory.seconds:.2f} s, measured {timeline.seconds:.2f} s, naive {naive.seconds:.2f} s"
    )
    return theory, naive, timeline


def test_four_stages(runs):
    """On any machine a run is nearer to its own schedule than to the naive one, which takes twice as long."""
    theory, naive, timeline = four_stages(runs)
    for name in ("seconds", "bubble"):
        predicted, other, measured = (getattr(each, name) for each in (theory, naive, timeline))
        assert abs(measured - predicted) < abs(measured - other), name


@pytest.mark.slow  # what else the machine does counts in full
def test_four_stages_within_10_percent(runs):
    theory, _, timeline = four_stages(runs)
    assert theory.seconds == pytest.approx(timeline.seconds, rel=WITHIN)
    assert theory.bubble == pytest.approx(timeline.bubble, abs=0.1)


@pytest.mark.slow  # what else the machine does between two measurements counts in full
def test_two_stages_of_alexnet(runs):
    """DeepSpeed's 1F1B and torch's GPipe, from the costs of layers that were measured by themselves.

    Costs and runs are measured in turns; where something else is at work on the machine in the first round, the
    median of three counts.
    """
    common = ["-s", 6, "--trace", "--dropout", 0, "--partition", "0,16,22"]
    config = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}
    cases = {
        "1f1b": (deepspeeds(2, 8), []),
        "gpipe": (build("gpipe", 2, 8), ["--engine", "torch", "--schedule", "gpipe"]),
    }
    ratios = {name: [] for name in cases}
    for turn in range(3):
        measured = measure(dropout=0.0, runs_dir=runs / "costs").for_bounds([0, 16, 22], micro_batches=8)
        for name, (streams, flags) in cases.items():
            run = train(runs / f"{name}{turn}", *common, *flags, stages=2, config=config)
            seconds = trace.load(run).typical.timeline.seconds
            theory = simulate(streams, measured)
            ratios[name].append(theory.seconds / seconds)
            print(
                f"\n{name}: predicted {theory.seconds:.2f} s, measured {seconds:.2f} s, ratio {ratios[name][-1]:.3f}"
            )
        medians = {name: statistics.median(found) for name, found in ratios.items()}
        if turn != 1 and all(abs(ratio - 1) < WITHIN for ratio in medians.values()):
            break
    assert medians == {name: pytest.approx(1, abs=WITHIN) for name in cases}
