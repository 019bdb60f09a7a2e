"""Costs are what layers take, byte for byte and, as far as a clock can tell, second for second."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import HANGS, processes_of, wait_until
from torch import nn

from pipetutor.core import records
from pipetutor.core.layers import build, join_layers
from pipetutor.costs.measuring import measure
from pipetutor.costs.ranks import look_at_memory, run_micro_batch, weight_shares, wire
from pipetutor.costs.table import LayerCost, LayerCosts
from pipetutor.processes.watch import RunFailed
from pipetutor.schedule.simulate import Costs


class Naps(torch.autograd.Function):
    """A scale that sleeps: forward, for the gradient of its input, and for that of its weight."""

    @staticmethod
    def forward(context, x, weight, naps):
        context.save_for_backward(x, weight)
        context.naps = naps
        time.sleep(naps[0])
        return x * weight

    @staticmethod
    def backward(context, gradient):
        x, weight = context.saved_tensors
        of_x = of_weight = None
        if context.needs_input_grad[0]:
            time.sleep(context.naps[1])
            of_x = gradient * weight
        if context.needs_input_grad[1]:
            time.sleep(context.naps[2])
            of_weight = (gradient * x).sum()
        return of_x, of_weight, None


class Sleeper(nn.Module):
    def __init__(self, *naps):
        super().__init__()
        self.weight, self.naps = nn.Parameter(torch.ones(())), naps

    def forward(self, x):
        return Naps.apply(x, self.weight, self.naps)


def sleepers():
    """Layers that sleep, among others that work in place, return their input, or return a view."""
    chain = [Sleeper(0.02, 9, 0.04), nn.ReLU(inplace=True), nn.Dropout(0), Sleeper(0.04, 0.02, 0.06), nn.Flatten()]
    return [*chain, Sleeper(0.03, 0.06, 0.02)]


@pytest.mark.alone
def test_known_times_are_recovered():
    """None is shorter than its nap, and none so long that it could have another nap in it, of 20 ms at least."""
    images, labels = torch.rand(2, 1, 2, 5), torch.tensor([0, 1])
    layers = sleepers()
    passes = [run_micro_batch(layers, images, labels, nn.CrossEntropyLoss()) for _ in range(4)]
    for found, expected in zip(
        (0, 1), ([0.02, 0, 0, 0.04, 0, 0.03], [0.04, 0, 0, 0.08, 0, 0.08]), strict=True
    ):  # layer 0 has no gradient of images to take 9 seconds for
        for layer, seconds in enumerate(expected):
            least = min(times[found][layer] for times in passes)
            assert seconds <= least < seconds + 0.02, f"layer {layer}, {['forward', 'backward'][found]}"


@pytest.mark.alone
def test_the_times_of_the_layers_add_up_to_the_whole():
    layers = join_layers(build("alexnet", dropout=0.0))
    images, labels = torch.rand(1, 3, 224, 224), torch.tensor([3])
    run_micro_batch(layers, images, labels, nn.CrossEntropyLoss())
    shares = []
    for _ in range(5):  # another process may come in between two of them, but not each time
        begin = time.perf_counter()
        forward, backward, copy = run_micro_batch(layers, images, labels, nn.CrossEntropyLoss())
        shares.append((sum(forward) + sum(backward) + copy) / (time.perf_counter() - begin))
    assert 0.9 < max(shares) <= 1


def test_the_gradients_are_those_of_an_ordinary_backward():
    layers = join_layers(build("alexnet", dropout=0.0))
    images, labels, loss = torch.rand(2, 3, 224, 224), torch.tensor([3, 4]), nn.CrossEntropyLoss()
    run_micro_batch(layers, images, labels, loss)
    net = nn.Sequential(*layers)
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    loss(net(images), labels).backward()
    for gradient, expected in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(gradient, expected.grad)


@pytest.mark.alone
def test_a_backward_is_divided_between_inputs_and_weights():
    shares = [weight_shares(sleepers(), torch.rand(2, 1, 2, 5)) for _ in range(3)]
    middle = [sorted(share)[1] for share in zip(*shares, strict=True)]
    assert middle == pytest.approx([1, 0, 0, 3 / 4, 0, 1 / 4], abs=0.1)


@pytest.mark.parametrize(
    "transfers, expected",
    [
        ([(1000, 0.11), (4000, 0.14), (9000, 0.19)], (0.1, 1e5)),
        ([(1000, 0.5), (4000, 0.4), (9000, 0.3)], (0.5133, float("inf"))),  # other work delayed the short messages
        ([(1000, 0.01), (9000, 0.9)], (0.0, 8000 / 0.89)),  # or the long ones
    ],
)
def test_a_wire_is_one_whatever_was_measured(transfers, expected):
    assert wire(transfers) == pytest.approx(expected, rel=0.1)
    dataclasses.replace(Costs.equal(2), **dict(zip(("latency", "bandwidth"), wire(transfers), strict=True)))


# Channels, height and width behind each layer of AlexNet, from its paper's kernels and strides.
SHAPES = [(64, 55, 55)] * 2 + [(64, 27, 27)] + [(192, 27, 27)] * 2 + [(192, 13, 13)] + [(384, 13, 13)] * 2
SHAPES += [(256, 13, 13)] * 4 + [(256, 6, 6)] * 4 + [(4096, 1, 1)] * 5 + [(10, 1, 1)]
# A convolution keeps its input, ReLU its output, pooling its input and for each output an index of 8 bytes, the
# average and a linear layer their input. What a layer before has kept is not kept again.
INPUT, OUTPUT, INDICES = "input", "output", "indices"
KEPT = {0: INPUT, 1: OUTPUT, 2: INDICES, 3: INPUT, 4: OUTPUT, 5: INDICES, 6: INPUT, 7: OUTPUT, 9: OUTPUT, 11: OUTPUT}
KEPT |= {12: INDICES, 13: INPUT, 16: INPUT, 17: OUTPUT, 20: OUTPUT}


def test_bytes_of_alexnet_are_exact():
    layers = join_layers(build("alexnet", dropout=0.0))
    found = look_at_memory(layers, torch.rand(2, 3, 224, 224))
    sizes = [2 * c * h * w for c, h, w in [(3, 224, 224), *SHAPES]]
    assert [row["output_bytes"] for row in found] == [4 * size for size in sizes[1:]]
    weights = {0: 64 * 363 + 64, 3: 192 * 1600 + 192, 6: 384 * 1728 + 384, 8: 256 * 3456 + 256, 10: 256 * 2304 + 256}
    weights |= {16: 4096 * 9217, 19: 4096 * 4097, 21: 10 * 4097}
    assert [row["parameters"] for row in found] == [weights.get(layer, 0) for layer in range(22)]
    seen = set()
    for layer, row in enumerate(found):
        size = {INPUT: 4 * sizes[layer], OUTPUT: 4 * sizes[layer + 1], INDICES: 8 * sizes[layer + 1]}
        new = {number: kept for number, kept in row["kept"] if number not in seen}
        assert list(new.values()) == ([size[KEPT[layer]]] if layer in KEPT else []), f"layer {layer}"
        seen |= set(new)
    assert [layer for layer, row in enumerate(found) if row["keeps_output"]] == [
        *(1, 4, 7, 9, 11),
        *(17, 18, 20),
    ], "dropout without a probability returns what ReLU kept"


def made(**changed):
    """Costs of a model of four layers, in round numbers."""
    layers = [
        LayerCost("Linear", 1.0, 0.0, 2.0, 0.5, 10, 100, ((0, 7),), False),
        LayerCost("ReLU", 0.5, 0.25, 0.0, 0.0, 0, 100, ((1, 100),), True),
        LayerCost("Linear", 3.0, 4.0, 5.0, 1.0, 20, 50, ((1, 100),), False),
        LayerCost("Linear", 6.0, 7.0, 8.0, 2.0, 30, 10, ((1, 100), (2, 50)), False),
    ]
    rest = {"load_images": 0.125, "load_labels": 0.0625, "copy": 0.001, "latency": 0.01, "bandwidth": 1e3}
    whole = {"model": "made", "micro_batch": 8, "ranks": 2, "threads": 1, "input_bytes": 1000, "optimizer": 0.1}
    return LayerCosts(**whole | rest | changed, layers=tuple(layers), directory=records.Path())


def test_layers_add_up_to_stages():
    assert dataclasses.asdict(made(burst=5.0, buffer=50.0).for_bounds([0, 2, 4])) == {
        "forward": pytest.approx([1.5 + 1.0, 9.0 + 0.1]),
        "backward_input": [0.25, 11.0],
        "backward_weight": [2.0, 13.0],
        "activation_bytes": [1000 + 107, 100 + 150 + 10],
        "message_bytes": [100],
        "latency": 0.01,
        "bandwidth": 1e3,
        "burst": 5.0,
        "buffer": 50.0,
        "load": [0.125, 0.0625],
        "optimizer": pytest.approx([1.0, 5.0]),
        "all_reduce": [0.0, 0.0],
        "tied_reduce": [0.0, 0.0],
    }
    assert made().for_bounds([0, 1, 4]).activation_bytes == [1000 + 7 + 100, 100 + 150 + 10]
    assert made().for_bounds([0, 2, 4], micro_batches=4).backward_weight == [2.0 - 0.5 / 4, 13.0 - 3.0 / 4]
    alone = made().for_bounds([0, 4])
    assert (alone.load, alone.message_bytes, alone.backward_weight) == ([0.125], [], [15.0])


@pytest.mark.parametrize(
    "bounds, micro_batches, words",
    [
        ([0, 2, 5], None, "partition 0,2,5 must start at 0, rise, and end at 4"),
        ([0, 1, 2, 4], None, "partition 0,1,2,4 gives stage 1 the layers 1 to 1, none of which has weights"),
        ([0, 2, 4], 0, "micro_batches is 0, but must be a whole number of at least 1: 2, say"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(bounds, micro_batches, words):
    with pytest.raises(ValueError, match=words):
        made().for_bounds(bounds, micro_batches)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"model": "alexnett"}, "unknown model 'alexnett': try 'alexnet'"),
        ({"micro_batch": 0}, "micro_batch is 0, but must be a whole number of at least 1"),
        ({"micro_batch": 2001}, "micro_batch is 2001, but must be a whole number of at least 1 and at most 2000"),
        ({"ranks": 0}, "ranks is 0, but must be a whole number of at least 1: 2, say"),
        ({"ranks": True}, "ranks is True"),
        ({"dropout": 1}, "dropout is 1, but must be a number from 0 and below 1"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(given, words, runs):
    with pytest.raises(ValueError, match=words):
        measure(**given, runs_dir=runs)
    assert not runs.exists()


def test_a_model_that_does_not_fit_is_refused(runs, monkeypatch):
    free = psutil.virtual_memory()._replace(available=3 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(ValueError, match=r"4 ranks takes? 4.3 GiB, and 3.0 are free: use 2 ranks or"):
        measure(ranks=4, runs_dir=runs)
    assert not runs.exists()


def test_a_measurement(runs):
    found = measure(micro_batch=1, dropout=0, runs_dir=runs)
    assert LayerCosts.load(found.directory) == found
    assert found.layers[0].kept == ((0, found.input_bytes),)
    assert (found.model, found.micro_batch, found.ranks, found.input_bytes) == ("alexnet", 1, 2, 3 * 4 * 224 * 224)
    assert records.read(found.directory)["status"] == "finished"
    weighted = [layer for layer in found.layers if layer.parameters]
    assert len(weighted) == 8 and all(min(x.forward, x.backward_weight) > 0 for x in weighted)
    assert found.layers[0].backward_input == 0 and all(x.backward_input > 0 for x in weighted[1:])
    assert found.layers[16].backward > found.layers[21].backward, "38 million weights against 41 thousand"
    assert all(abs(x.first_saving) <= x.backward_weight for x in found.layers)
    assert found.load_images > found.load_labels > 0 and found.optimizer > 0 and found.copy > 0
    assert found.bandwidth > 1e6 and 0 <= found.latency < 10, "bytes a second, and seconds"
    assert len(str(found).splitlines()) == 23
    stages = found.for_bounds([0, 16, 22], micro_batches=8)
    whole = found.for_bounds([0, 22], micro_batches=8)
    for name in ("backward_input", "backward_weight", "optimizer"):
        assert sum(getattr(stages, name)) == pytest.approx(getattr(whole, name)[0])
    assert not processes_of(runs.parent)


def test_a_measurement_that_fails_says_why(runs, monkeypatch):
    (runs.parent / "torchvision.py").write_text("raise RuntimeError('no eyes')")
    monkeypatch.setenv("PYTHONPATH", f"{runs.parent}:{os.environ.get('PYTHONPATH', '')}")  # found before the real one
    with pytest.raises(RunFailed, match=r"pipetutor.costs.ranks ended with status 1:(.|\n)*RuntimeError: no eyes"):
        measure(runs_dir=runs)


def test_an_interrupt_leaves_nothing_running(runs):
    runs.parent.mkdir(exist_ok=True)
    kernel = subprocess.Popen(
        [sys.executable, "-m", "pipetutor.costs", "--runs-dir", str(runs)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    try:
        # What the supervisor has started, and two ranks.
        wait_until(
            lambda: sum("pipetutor.costs.ranks" in " ".join(p.cmdline()) for p in processes_of(runs)) == 3, 100
        )
        kernel.send_signal(signal.SIGINT)
        _, said = kernel.communicate(timeout=20)
        assert kernel.returncode == 130
        assert said.endswith("-costs is interrupted, and all its processes have ended\n")
    finally:
        kernel.kill()
        kernel.wait()
    assert not processes_of(runs.parent)


def test_the_kernel_loads_no_torch():
    script = "import sys, pipetutor.costs.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command_refuses_bad_input_with_status_2(tmp_path):
    command = [sys.executable, "-m", "pipetutor.costs", "--model", "resnet19"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 2 and "unknown model 'resnet19'" in done.stderr and not list(tmp_path.iterdir())
