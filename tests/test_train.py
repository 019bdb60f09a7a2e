"""What the trainers compute, and in which order they read: the same at any number of stages."""

import itertools
import json

import pytest
from conftest import FAST_SGD, SMALL_SGD, TWICE_AS_FAST, RankFailed, equal_but_for_rounding, run, train

from pipetutor.core.config import read_config

QUIET = ["-s", 3, "--dropout", 0, "--model", "tiny"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The baseline, right and with a mistake: gradients summed over two micro-batches or replicas, not averaged."""
    directory = tmp_path_factory.mktemp("base")
    return [
        train(directory / name, *QUIET, stages=0, config=config)
        for name, config in {"right": FAST_SGD, "summed": TWICE_AS_FAST}.items()
    ]


@pytest.fixture(scope="module")
def one_stage(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), *QUIET, stages=1, config=FAST_SGD)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_any_number_of_stages_computes_the_same_to_the_last_bit(stages, runs, one_stage):
    """Dropout off, fp32, SGD, one thread a rank."""
    run = train(runs, *QUIET, stages=stages, config=FAST_SGD)
    assert run.losses == one_stage.losses and len(run.losses) == 3
    assert (len(run.bounds), run.bounds[-1], len(run.layers)) == (stages + 1, 14, 14)


def test_a_pipeline_computes_what_the_baseline_computes(base, one_stage):
    """But for rounding: the baseline adds gradients up elsewhere."""
    right, summed = base
    assert right.bounds == [] and right.status == "finished"
    equal_but_for_rounding(one_stage.losses, right.losses, summed.losses)


def test_replicas_read_the_images_of_one_process(base, runs):
    """But for rounding: replicas add gradients up in another order."""
    right, summed = base
    run = train(runs, *QUIET, "--partition", "0,9,14", stages=2, replicas=2, config=FAST_SGD)
    assert (run.micro_batches, run.bounds) == (1, [0, 9, 14])
    equal_but_for_rounding(run.losses, right.losses, summed.losses)


SIZE = 25


def note_what_is_read():
    """25 images: 6 micro-batches of 4 and a ragged one a pass. Each rank notes the images that it trains on."""
    from pathlib import Path

    from pipetutor.core import loop
    from pipetutor.data import loader

    whole, checked = loader.load, loop.Loop._checked

    def cut(*args):
        found = whole(*args)
        found.data, found.targets = found.data[:SIZE], list(range(SIZE))
        found.target_transform = lambda number: number
        return found

    def noted(self, micro_batch):
        images, numbers = checked(self, micro_batch)
        with Path(f"read_by_rank{loop.dist.get_rank()}").open("a") as file:
            file.write(json.dumps(numbers.tolist()) + "\n")
        return [images, numbers % 10]

    loader.load, loop.Loop._checked = cut, noted


def read(directory, rank):
    return [json.loads(line) for line in (directory / f"read_by_rank{rank}").read_text().splitlines()]


def test_two_passes_over_images_that_nothing_divides(runs):
    """3 stages, 4 steps of 4 micro-batches: two passes and more, each in an order of its own, as the baseline's."""
    config = SMALL_SGD | {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "wall_clock_breakdown": True}
    arguments = ["-s", 4, "--model", "tiny", "--dropout", 0]
    common = dict(config=config, patch=note_what_is_read)
    pipe = train(runs / "pipe", *arguments, stages=3, **common)
    base = train(runs / "base", *arguments, stages=0, **common)
    order = read(runs / "pipe", rank=0)
    assert order == read(runs / "pipe", rank=2) == read(runs / "base", rank=0), "first stage, last stage, baseline"
    first, second = (list(itertools.chain(*order[start : start + 6])) for start in (0, 6))
    assert first != second
    for one_pass in (first, second):
        assert len(set(one_pass)) == len(one_pass) == 24, "an image twice, or a ragged micro-batch"
    assert not (runs / "pipe" / "read_by_rank1").exists(), "a stage in the middle loads nothing"
    assert pipe.losses[0] == base.losses[0] and len(pipe.losses) == 4


def test_a_run_says_how_it_came_about(runs):
    run = train(runs, "-s", 1, "--model", "tiny")
    assert len(run.losses) == 1 and "--model tiny" in run.command
    said = (runs / "rank0.txt").read_text()
    assert "train batch 4 = micro-batch 2 x 2 micro-batches x 1 replica" in said
    assert "P = 1, M = 2: stages of equal work idle (P-1)/(M+P-1) = 0/2 = 0.0 % of each step" in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["-p", "2"], "3 ranks cannot be divided into 2 stages"),
        (["--run-dir", "/proc/nowhere"], "/proc/nowhere"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag (--help lists every flag)"),
    ],
)
def test_bad_input_ends_the_job_with_status_2_and_one_line(runs, arguments, words):
    """The other ranks leave with status 0: DeepSpeed's launcher ends the job at the first other one it sees."""
    with pytest.raises(RankFailed, match=r"exit codes \[2, 0, 0\]") as refusal:
        train(runs, "-s", 1, *arguments, stages=3)
    lines = [line for line in str(refusal.value).splitlines() if "pipetutor: " in line]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in str(refusal.value)


def test_a_slow_rank_takes_longer(runs):
    fault = ["--fault", "slow:rank=0,step=2,seconds=0.5"]
    run = train(runs, "-s", 2, "--model", "tiny", *fault)
    assert run.seconds[1] > 2, "two micro-batches, forward and backward, half a second each"


@pytest.mark.parametrize("stages, replicas", [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2)])
def test_bf16_trains_in_every_topology(runs, stages, replicas):
    """The losses are those of fp32 within torch's bound for bf16; batch normalisation is among the layers."""
    common = dict(stages=stages, replicas=replicas, config=SMALL_SGD)
    arguments = ["-s", 2, "--model", "tiny_norm", "--dropout", 0]
    exact = train(runs / "fp32", *arguments, **common)
    coarse = train(runs / "bf16", *arguments, "--dtype", "bf16", **common)
    assert coarse.losses == pytest.approx(exact.losses, rel=1.6e-2) and coarse.losses != exact.losses
    assert coarse.details["config"]["bf16"]["enabled"]


def test_images_one_by_one_train_the_same(runs):
    same = ["-s", 2, "--model", "tiny", "--dropout", 0]
    batched, pil = (
        train(runs / how, *same, "--transforms", how, stages=2, config=SMALL_SGD) for how in ("batched", "pil")
    )
    assert pil.losses == batched.losses


def of_ones_own(line, part):
    """What a script does that has no main: the reference's, without its process group."""
    import tiny

    from pipetutor.train import get_args, train_pipe

    tiny.enter()
    engine = train_pipe(get_args(line.split()), *part)
    return engine.module.parts if hasattr(engine, "module") else sorted(engine.state())


@pytest.mark.parametrize(
    "line, part, cut",
    [
        ("", [], [0, 3, 14]),
        ("--partition 0,7,14", [], [0, 7, 14]),
        ("--partition 0,7,14", ["uniform"], [0, 7, 14]),
        ("", ["0,5,14"], [0, 5, 14]),
    ],
)
def test_a_script_of_ones_own_trains_with_the_cut_that_it_asks_for(line, part, cut, runs):
    runs.mkdir()
    common = f"-p 2 -s 1 --model tiny --backend gloo --deepspeed_config {runs / 'ds.json'}"
    (runs / "ds.json").write_text(json.dumps(read_config(SMALL_SGD)))
    assert run(runs, 2, of_ones_own, f"{common} {line}", part) == [cut, cut]


def test_a_script_of_ones_own_plays_other_schedules(runs):
    runs.mkdir()
    (runs / "ds.json").write_text(json.dumps(read_config(SMALL_SGD)))
    line = f"-p 2 -s 1 --model tiny --engine torch --schedule gpipe --deepspeed_config {runs / 'ds.json'}"
    first, last = run(runs, 2, of_ones_own, line, [])
    assert first and last and not {*first} & {*last}
