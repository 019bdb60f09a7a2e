"""Proofs that take minutes: `make prove` runs them, and `make test` does not."""

import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HANGS, SMALL, TINY, processes_of, train, wait_until
from test_launcher import deepspeed, ranks_of, script

from pipetutor import Run, launch
from pipetutor.core import checkpoint
from pipetutor.core.records import STEPS, read_lines
from pipetutor.costs import measure
from pipetutor.costs.links import over
from pipetutor.schedule.orders import deepspeed_1f1b
from pipetutor.schedule.simulate import simulate
from pipetutor.system import machine
from pipetutor.system.links import Link
from pipetutor.system.namespaces import check_hosts

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
@pytest.mark.parametrize("config, size", [("synthetic_90", 500), ("sums_90", 5_000)])
def test_the_readmes_commands_reach_90_percent_in_5_minutes(runs, config, size):
    """Two stages on two cores, from the start of the command to its end."""
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if f"configs/{config}.json" in line]
    words = line.split()[3:]
    assert line.split()[:3] == ["deepspeed", "--num_gpus", "2"]
    begin = time.monotonic()
    done = deepspeed(*words[2:], "--run-dir", str(runs), cwd=ROOT, ranks=2, timeout=560)
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr[-2000:]
    run = Run.load(runs)
    print(f"\n{run.accuracy:.1%} in {seconds:.0f} s, {run.samples_per_second:.1f} examples/s")
    assert re.search(rf"step \d+: \d+ of {size} test examples are right \(\d+\.\d%\)", done.stdout)
    assert run.accuracy >= 0.9 and seconds <= 300


@pytest.mark.timeout(600)
def test_the_whole_certificate_passes_in_5_minutes(tmp_path):
    begin = time.monotonic()
    command = [sys.executable, "-m", "pipetutor.certify", "--runs-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    seconds = time.monotonic() - begin
    print(f"\n{done.stdout}\n{seconds:.0f} s")
    assert (
        done.returncode == 0
        and "PASSED: 53 of 53 pipelines equal one process, 6 of 6" in done.stdout
        and not processes_of(tmp_path)
    )
    assert seconds <= 300


@pytest.mark.timeout(900)
def test_the_whole_test_set_gives_the_same_number_everywhere(runs):
    """500 images; micro-batches of 6 do not divide them."""
    config = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 6}
    config["optimizer"] = {"type": "Adam", "params": {"lr": 2e-4}}
    trained = train(runs / "a", "-s", 50, "--dropout", 0, "--save-every", 50, config=config, seconds=300)
    found = {}
    for stages, replicas in ((0, 1), (1, 1), (2, 1), (4, 1), (2, 2)):
        resumed = ["-s", 50, "--resume", trained.directory, "--eval-every", 1]
        run = train(
            runs / f"{stages}x{replicas}", *resumed, stages=stages, replicas=replicas, config=config, seconds=200
        )
        found[stages, replicas] = run.evaluations[-1]
    print(found)
    assert {result["correct"] for result in found.values()} == {found[0, 1]["correct"]}
    assert {result["images"] for result in found.values()} == {500}
    assert found[0, 1]["correct"] > 100


KILLS = 20


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "shape",
    [dict(config=SMALL), dict(replicas=2, config=SMALL | {"zero_optimization": {"stage": 1}})],
    ids=["two stages", "ZeRO-1 2 x 2"],
)
def test_20_kills_at_random_moments_lose_nothing(runs, shape):
    """A run that saves every step; each kill is followed by a resume, which is killed in turn."""
    steps = 1000
    common = dict(stages=2, model="mobilenet_v3_small", **shape)
    moments = random.Random(1138)
    losses: dict[int, float] = {}
    latest: Path | None = None
    begun = 0
    for kill in range(KILLS + 1):
        resume = "" if latest is None else f", resume={str(latest)!r}"
        here = runs / f"kill{kill}"
        kernel = script(here, f"launch(steps={steps}, save_every=1, **{common!r}{resume}, runs_dir=RUNS)")
        wait_until(lambda here=here: any(here.glob("*/steps.jsonl")), 100)
        (directory,) = here.iterdir()
        wait_until(lambda directory=directory: list(read_lines(directory / STEPS)), 100)
        time.sleep(moments.uniform(0, 3))  # the moment of the kill is the point
        victims = [*ranks_of(runs).values(), kernel]
        moments.choice(victims).send_signal(signal.SIGKILL)
        kernel.communicate(timeout=HANGS)
        wait_until(lambda: not processes_of(runs.parent))
        lines = list(read_lines(directory / STEPS))
        first = lines[0]["step"]
        assert first == begun + 1, "it went on from another step than the newest checkpoint's"
        for line in lines:
            known = losses.setdefault(line["step"], line["loss"])
            assert known == line["loss"], f"step {line['step']} after kill {kill}"
        if list(directory.glob("checkpoints/step-*")):
            latest, begun = directory, checkpoint.verify(directory)["step"]
    whole = launch(steps=max(losses), runs_dir=runs / "whole", **common)
    print(f"\n{KILLS + 1} runs were killed on the way to step {max(losses)}")
    assert [losses[step] for step in sorted(losses)] == whole.losses


def test_a_launch_reaches_its_first_step_in_twice_the_time_that_torch_and_deepspeed_take_to_load(runs):
    """Beside one step; five times, the two by turns."""
    ratios = []
    for _ in range(5):
        begin = time.time()
        subprocess.run([sys.executable, "-c", "import torch, deepspeed"], check=True, capture_output=True)
        loading, begin = time.time() - begin, time.time()
        run = launch(stages=2, steps=2, config=SMALL, runs_dir=runs)
        told = (run.directory / STEPS).stat().st_mtime - run.seconds[1]  # when the second step began
        ratios.append((told - begin - run.seconds[1]) / loading)
    print(f"\n{', '.join(f'{ratio:.2f}' for ratio in ratios)} times {loading:.1f} s")
    assert statistics.median(ratios) <= 2.0


@pytest.mark.timeout(1800)
def test_20_of_20_launches_with_hosts_train_and_what_is_killed_leaves_nothing(runs):
    """Each launch is made twice: once it trains to its end, once a process of it, another each time, is killed."""
    victims = random.Random(1138)
    for attempt in range(20):
        run = launch(stages=2, steps=3, hosts=2, link="100mbit", runs_dir=runs / "well", **TINY)
        assert run.status == "finished" and len(run.losses) == 3
        kernel = script(runs / f"ill{attempt}", f"launch(stages=2, steps=10**6, hosts=2, runs_dir=RUNS, **{TINY!r})")
        wait_until(lambda here=runs / f"ill{attempt}": any(here.glob("*/steps.jsonl")), 100)
        victim = victims.choice([process for process in processes_of(runs.parent) if process.is_running()])
        print(" ".join(victim.cmdline())[-60:])
        victim.kill()
        kernel.communicate(timeout=HANGS)
        wait_until(lambda: not processes_of(runs.parent), 60)


@pytest.mark.timeout(1800)
def test_a_class_of_20_launches_at_once(runs):
    """One machine, one directory for runs, one for data that is not drawn yet; every other one has hosts."""
    shared = f"runs_dir=RUNS, data_dir={str(runs / 'data')!r}, **{TINY!r}"
    lines = [f"launch(stages=2, steps=3, hosts={1 + number % 2}, {shared})" for number in range(20)]
    kernels = [script(runs / "class", line) for line in lines]
    ended = [(*kernel.communicate(timeout=1500), kernel.returncode) for kernel in kernels]
    for line, (_, errors, code) in zip(lines, ended, strict=True):
        assert code == 0, f"{line}: {errors[-2000:]}"
    found = [Run.load(path) for path in (runs / "class").iterdir()]
    assert len(found) == 20 and {run.status for run in found} == {"finished"}
    assert len({tuple(run.losses) for run in found}) == 1, "each trained as if it had been alone"
    assert not processes_of(runs.parent)


@pytest.mark.timeout(1200)
def test_steps_on_two_hosts_take_what_is_predicted(runs):
    """AlexNet in two stages and in two replicas, over three links: costs are measured beside what they predict."""
    try:
        check_hosts([Link(1e8)])
    except ValueError as refusal:
        pytest.skip(str(refusal))
    config = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}
    layouts = {"2 stages": (2, 1, [0, 16, 22]), "2 replicas": (1, 2, [0, 22])}
    errors = []
    print(f"\n{machine.cpu_name()}, {machine.cpu_cores()} cores")
    for link in ("unlimited", "1gbit", "100mbit"):
        linked = over(measure(micro_batch=8, ranks=2, runs_dir=runs), hosts=2, link=link, runs_dir=runs)
        for name, (stages, replicas, bounds) in layouts.items():
            shape = dict(stages=stages, replicas=replicas, partition=",".join(map(str, bounds)))
            run = launch(**shape, hosts=2, link=link, steps=5, config=config, runs_dir=runs)
            streams = [deepspeed_1f1b(stages, run.micro_batches, stage) for stage in range(stages)]
            stage_costs = linked.for_bounds(bounds, run.micro_batches, replicas=replicas)
            predicted, took = simulate(streams, stage_costs).seconds, statistics.median(run.seconds[1:])
            errors.append(predicted / took - 1)
            load = os.getloadavg()[0]
            print(
                f"{link:10}{name:11}predicted {predicted:6.2f} s, {took:6.2f} s, {errors[-1]:+4.0%}, load {load:.1f}"
            )
    assert max(map(abs, errors)) <= 0.15
