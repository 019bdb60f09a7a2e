"""The measured cut is the best one, and what it needs is measured once."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, RankFailed, processes_of, train
from hypothesis import given, settings
from hypothesis import strategies as st
from test_costs import made

from pipetutor import launch, launcher
from pipetutor.core.description import known_layers
from pipetutor.core.partition import fastest
from pipetutor.costs import profile
from pipetutor.costs.table import FILE, LayerCost, LayerCosts
from pipetutor.schedule.timeline import CODE
from pipetutor.system import machine


def dump(costs, directory):
    content = dataclasses.asdict(costs)
    del content["directory"]
    directory.mkdir(parents=True)
    (directory / FILE).write_text(json.dumps(content))
    return dataclasses.replace(costs, directory=directory)


def drawn(model, seed, **changed):
    """Costs of a model's layers, by chance; transfers, loads and first savings are large enough to matter."""
    chance = np.random.default_rng(seed)
    layers = [
        LayerCost(kind, *chance.exponential(1, 3), 0.3, weights, int(chance.integers(1, 1000)), ((index, 8),), False)
        for index, (kind, weights, _) in enumerate(known_layers(model))
    ]
    rest = {"load_images": 1.5, "load_labels": 0.5, "copy": 1e-4, "latency": 0.1, "bandwidth": 1e3}
    whole = {"model": model, "micro_batch": 2, "ranks": 2, "threads": 1, "input_bytes": 1000, "optimizer": 0.0}
    return LayerCosts(**whole | rest | changed, layers=tuple(layers), directory=Path())


def splits(weights, stages):
    """Every split that gives each stage weights."""
    for cuts in itertools.combinations(range(1, len(weights)), stages - 1):
        bounds = [0, *cuts, len(weights)]
        if all(any(weights[low:high]) for low, high in itertools.pairwise(bounds)):
            yield bounds


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 8), st.integers(1, 4), st.integers(1, 12))
def test_no_split_is_better(chance, layers, stages, limit):
    """Small whole numbers, so that ties abound: the slowest stage, then the sum, then the earliest cuts decide."""
    weights = [chance.choice([0, 1, 1]) for _ in range(layers)]
    spans = list(itertools.combinations(range(layers + 1), 2))
    taken = {span: chance.randint(1, 6) for span in spans}
    sizes = [{span: chance.randint(1, 12) for span in spans} for _ in range(stages)]
    found = []
    for bounds in splits(weights, stages):
        pairs = list(itertools.pairwise(bounds))
        times = [taken[pair] for pair in pairs]
        found.append(((max(times), sum(times), bounds), max(sizes[s][pair] for s, pair in enumerate(pairs))))

    def cut(*memory):
        return fastest(weights, stages, lambda *span: taken[span], *memory)

    if not found:
        with pytest.raises(ValueError, match=f"{stages} stages, but {sum(weights)} layers have weights"):
            cut()
        return
    assert cut() == min(found)[0][2]
    fitting = [best for best, size in found if size <= limit]
    memory = (lambda stage, *span: sizes[stage][span]), limit
    if fitting:
        assert cut(*memory) == min(fitting)[2]
    else:
        with pytest.raises(ValueError, match=f"may need {limit} bytes.* at least {min(s for _, s in found)},"):
            cut(*memory)


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("model", ["alexnet", "vgg16", "gpt:layers=12"])
def test_the_slowest_stage_is_the_fastest_of_every_split(model, stages):
    costs = drawn(model, seed=stages)
    count = len(costs.layers)
    has_weights = [layer.parameters > 0 for layer in costs.layers]
    seconds = np.full((count + 1, count + 1), np.inf)
    for low, high in itertools.combinations(range(count + 1), 2):
        if any(has_weights[low:high]):
            layers = costs.layers[low:high]
            work = sum(x.forward + x.backward_input + x.backward_weight - x.first_saving / 4 for x in layers)
            received = costs.layers[low - 1].output_bytes if low else costs.input_bytes
            wait = 2 * (0.1 + received / 1e3) * (low > 0) + 2 * (0.1 + layers[-1].output_bytes / 1e3) * (high < count)
            seconds[low, high] = work + received * 1e-4 + wait + (1.5 if low == 0 else 0.5 * (high == count))
    bounds = np.array([(0, *cuts, count) for cuts in itertools.combinations(range(1, count), stages - 1)])
    best = seconds[bounds[:, :-1], bounds[:, 1:]].max(axis=1).min()
    found = profile.choose(costs, stages, micro_batches=4)
    assert max(profile.stage_seconds(costs, found, 4)) == pytest.approx(best, rel=1e-9)


def test_a_stage_takes_what_the_simulator_gives_its_instructions():
    costs, bounds = drawn("alexnet", seed=1), [0, 5, 14, 17, 22]
    seconds = costs.for_bounds(bounds, 8).seconds(range(4), full=True)
    kinds = [
        "LoadMicroBatch",
        "ForwardPass",
        "BackwardPass",
        "SendActivation",
        "RecvActivation",
        "SendGrad",
        "RecvGrad",
    ]
    expected = seconds[[CODE[kind] for kind in kinds]].sum(axis=0)
    assert profile.stage_seconds(costs, bounds, 8) == pytest.approx(expected.tolist())
    again = np.add(expected, seconds[CODE["ForwardPass"]])
    assert profile.stage_seconds(costs, bounds, 8, recompute=True) == pytest.approx(again.tolist())


def test_recomputation_moves_the_cut():
    layers = [
        LayerCost("Linear", forward, 0.0, back, 0.0, 1, 1, (), False) for forward, back in [(1, 9), (4, 1), (6, 1)]
    ]
    free = {"copy": 0.0, "latency": 0.0, "load_images": 0.0, "load_labels": 0.0}
    costs = dataclasses.replace(made(**free), layers=tuple(layers))
    assert profile.choose(costs, 2) == [0, 1, 3]  # 10 and 12; with all forward passes twice, 11 and 22
    assert profile.choose(costs, 2, recompute=True) == [0, 2, 3]  # 20 and 13


def test_a_limit_counts_what_adam_and_live_micro_batches_take():
    costs = made(input_bytes=100)
    # The whole model of 60 parameters, with the bytes of one micro-batch that test_costs knows.
    assert 16 * 60 + costs.for_bounds([0, 4]).activation_bytes[0] == 1227
    with pytest.raises(
        ValueError, match=f"a stage may need 1,226 bytes.* allow at least {16 * 60 + 267:,}, or use more"
    ):
        profile.choose(costs, 1, micro_batches=8, limit=1226)
    assert profile.choose(costs, 1, micro_batches=8, limit=1227) == [0, 4]
    assert profile.choose(costs, 2) == profile.choose(costs, 2, limit=1e9) == [0, 3, 4]
    # Stage 0 of 0,3,4 has 30 parameters, and two live micro-batches where there are two.
    assert profile.choose(costs, 2, micro_batches=8, limit=16 * 30 + 2 * (100 + 107 + 50)) == [0, 3, 4]
    with pytest.raises(ValueError, match=r"may need 993 bytes, but every split into 2 stages .* at least 994, or"):
        profile.choose(costs, 2, limit=993)
    assert profile.choose(costs, 2, micro_batches=1, limit=16 * 30 + 100 + 107 + 50) == [0, 3, 4]


def test_the_table_says_what_was_chosen_and_why():
    layers = [
        LayerCost("Linear", 0.001 * n, 0.0, 0.0, 0.0, weights, 1, (), False)
        for n, weights in [(5, 1), (2, 1), (1, 9)]
    ]
    free = {"copy": 0.0, "latency": 0.0005, "bandwidth": float("inf"), "load_images": 0.0, "load_labels": 0.0}
    costs = dataclasses.replace(made(**free), layers=tuple(layers))
    assert profile.table(costs, [0, 1, 3]).splitlines() == [
        "stage  layers  ms a micro-batch  share",
        "    0     0-0               6.0   0.60",
        "    1     1-2               4.0   0.40",
        "slowest stage of 0,1,3: 6.0 ms; parameters 0,2,3: 8.0 ms; uniform 0,2,3: 8.0 ms",
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for costs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(cache, monkeypatch):
    """What was asked of the measurement, which takes a moment and makes numbers up."""
    asked = []

    def measure(model, micro_batch, ranks, *, dataset, dropout, data_dir, runs_dir):
        asked.append((model, micro_batch, ranks, dropout))
        time.sleep(0.2)
        return dump(drawn(model, seed=7), runs_dir / f"costs-{len(asked)}")

    monkeypatch.setattr(profile, "measure", measure)
    return asked


def test_costs_are_measured_once_however_many_ask_at_once(cache, measured, capsys):
    found = []
    threads = [threading.Thread(target=lambda: found.append(profile.costs_of("alexnet", 8, 2))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5 and found.count(found[0]) == 5
    assert measured == [("alexnet", 8, 2, None)]
    assert profile.costs_of("alexnet", 8, 2) == found[0] and len(measured) == 1
    place = profile.cached("alexnet", 8, 2)
    assert place.is_relative_to(cache) and found[0].directory == place
    assert sorted(path.name for path in place.iterdir()) == [FILE, "key.json"]
    assert {path.name for path in place.parent.iterdir()} == {place.name, f".{place.name}.lock"}
    assert capsys.readouterr().out.count("measuring what each layer of alexnet costs here, once") == 1


def test_costs_hold_for_what_they_depend_on(cache, monkeypatch, tmp_path):
    for module in profile.MEASURING:  # the code that measures, changed in one place
        source = (Path(profile.__file__).parents[1] / f"{module}.py").read_text()
        copy = tmp_path / f"{module}.py"
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(source.replace("MICRO_BATCHES = 4, 4", "MICRO_BATCHES = 4, 5"))

    def places():
        given = [("alexnet", 8, 2), ("vgg11", 8, 2), ("alexnet", 4, 2), ("alexnet", 8, 1), ("alexnet", 8, 2, 0)]
        return [profile.cached(*some) for some in given]

    assert profile.cached("alexnet", 8, 2, 0) == profile.cached("alexnet", 8, 2, 0.0)
    seen = places()
    for change in (
        lambda: monkeypatch.setenv("OMP_NUM_THREADS", "7"),
        lambda: monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.16.0", "torchvision": "0.29.2"}),
        lambda: monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.16.0", "torchvision": "0.30.0"}),
        lambda: monkeypatch.setattr(profile, "__file__", str(tmp_path / "costs" / "profile.py")),
        lambda: monkeypatch.setattr(machine, "cpu_name", lambda: "abacus"),
        lambda: monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX"),
        lambda: monkeypatch.setattr(machine, "cpu_cores", lambda: 3),
        lambda: monkeypatch.setattr(profile, "DTYPE", "bfloat16"),
    ):
        change()
        seen += places()
    assert len(set(seen)) == len(seen) == 45
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert profile.cached("alexnet", 8, 2).parent == Path.home() / ".cache" / "pipetutor"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\0" * len(text),
        lambda text: text.replace('"latency"', '"lateness"'),
        lambda text: text.replace('"forward": ', '"forward": "x", "was": '),
        lambda text: text.replace('"latency": ', '"latency": -'),
        lambda text: json.dumps(json.loads(text) | {"layers": json.loads(text)["layers"][:-1]}),
    ],
)
def test_damaged_costs_are_measured_again(measured, damage):
    whole = profile.costs_of("alexnet", 8, 2)
    path = whole.directory / FILE
    path.write_text(damage(path.read_text()))
    assert profile.costs_of("alexnet", 8, 2) == whole
    assert len(measured) == 2
    assert profile.costs_of("alexnet", 8, 2) == whole and len(measured) == 2


def test_a_measurement_that_fails_leaves_nothing(cache, monkeypatch):
    def interrupted(*args, runs_dir, **kwargs):
        dump(drawn("alexnet", seed=7), runs_dir / "costs")
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profile.costs_of("alexnet", 8, 2)
    assert not [path for path in cache.rglob("*") if path.name.endswith(".json")]
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(ValueError, match=r"cannot keep costs in /dev/null/.*Not a directory.*XDG_CACHE_HOME"):
        profile.costs_of("alexnet", 8, 2)


def test_launch_measures_before_it_makes_a_run(runs, measured, monkeypatch, capsys):
    watched = []

    def watch(processes, *args):
        watched.append(processes[0].command)
        return {"code": 0}

    monkeypatch.setattr(launcher, "watch", watch)
    run = launch(stages=2, replicas=2, partition="profile", dropout=0.5, config=SMALL, runs_dir=runs)
    costs = profile.costs_of("alexnet", 2, 4, 0.5)
    assert measured == [("alexnet", 2, 4, 0.5)]
    assert run.bounds == profile.choose(costs, 2, run.micro_batches) != [0, 19, 22]
    said = capsys.readouterr().out
    assert profile.table(costs, run.bounds, run.micro_batches) in said
    assert watched[0][watched[0].index("--partition") + 1] == "profile"
    config = SMALL | {"train_batch_size": 8}
    flags = {"engine": "torch", "schedule": "interleaved_1f1b", "chunks": 2}
    run = launch(partition="profile", dropout=0.5, config=config, runs_dir=runs, **flags)
    assert run.bounds == profile.choose(profile.costs_of("alexnet", 2, 2, 0.5), 4, 4)
    there = list(runs.iterdir())
    monkeypatch.setattr(profile, "measure", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch(partition="profile", model="vgg11", runs_dir=runs)
    assert list(runs.iterdir()) == there


def first_rank_alone_has_a_cache():
    os.environ["XDG_CACHE_HOME"] = str(Path.cwd() / "cache") if os.environ["RANK"] == "0" else "/dev/null"


def test_the_first_rank_measures_and_cuts_for_all(runs):
    flags = ["-s", 1, "--model", "mobilenet_v3_small", "--dropout", 0, "--partition"]
    run = train(runs, *flags, "profile", stages=2, patch=first_rank_alone_has_a_cache)
    (place,) = (runs / "cache" / "pipetutor").glob("mobilenet*")
    costs = LayerCosts.load(place)
    assert (costs.micro_batch, costs.ranks, costs.threads) == (2, 2, 1)
    assert run.bounds == profile.choose(costs, 2, run.micro_batches)
    said = (runs / "rank0.txt").read_text()
    assert profile.table(costs, run.bounds, run.micro_batches) in said and "16/16 micro-batches" in said
    assert "stage " not in (runs / "rank1.txt").read_text()
    assert not processes_of(runs)


def nowhere():
    os.environ["XDG_CACHE_HOME"] = "/dev/null"


def test_a_rank_that_cannot_keep_costs_says_so(runs):
    with pytest.raises(RankFailed, match=r"codes \[2\]\n.*pipetutor: cannot keep costs in /dev/null"):
        train(runs, "-s", 1, "--partition", "profile", patch=nowhere)


def test_a_cut_loads_no_torch():
    script = "import sys, pipetutor.costs.profile; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
