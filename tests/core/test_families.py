"""Every family of models that the catalog lists trains in a pipeline, on both engines, as in one process."""

import functools
import itertools
import re

import pytest
import torch
import torchvision
from conftest import SMALL_SGD, equal_but_for_rounding, run
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from pipetutor.core.config import read_config
from pipetutor.core.deepspeed_engines import Pipeline
from pipetutor.core.layers import build, join_layers
from pipetutor.core.partition import catalog
from pipetutor.core.torch_engine import TorchPipeline

STEPS, LEARNING_RATE, IMAGE = 2, 0.1, (3, 64, 64)
CONFIG = read_config(SMALL_SGD | {"optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}}})


def family(name):
    """``vgg11_bn`` is of the family ``vgg_bn``, ``efficientnet_b0`` of ``efficientnet``."""
    return re.sub(r"_(b\d|[slm]|tiny|small|base|large)$|\d+(?=_bn$|$)", "", name)


def smallest():
    """The model with the fewest weights of each family."""
    weights = {name: sum(layer.parameters for layer in layers) for name, layers in catalog().items()}
    return {family(name): name for name in sorted(weights, key=weights.__getitem__, reverse=True)}


FAMILIES = smallest()


NARROW = "a narrow ConvNeXt"
CUT = [0, 2, 8]  # behind a block whose output has channels last, ahead of a layer that wants them there


def model(name):
    torch.manual_seed(0)
    if name == NARROW:
        stages = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
        return torchvision.models.ConvNeXt(stages, layer_scale=1.0, num_classes=10)
    return build(name, dropout=0.0)


def micro_batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield [torch.randn(2, *IMAGE, generator=generator), torch.randint(10, (2,), generator=generator)]


def loss_of(net, data):
    return torch.stack([nn.functional.cross_entropy(net(x), y) for x, y in itertools.islice(data, 2)]).mean()


@functools.cache
def one_process(name):
    """Return the losses, those of a model that learns nothing, and the first gradient of the first layer."""
    net, data = model(name), micro_batches()
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    losses, gradient = [], None
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(net, data)
        loss.backward()
        gradient = next(net.parameters()).grad.clone() if gradient is None else gradient
        optimizer.step()
        losses.append(loss.item())
    net, data = model(name), micro_batches()
    with torch.no_grad():
        return losses, [loss_of(net, data).item() for _ in range(STEPS)], gradient


def engine_of(net, bounds, schedule, recompute):
    if schedule:
        return TorchPipeline(net, schedule, bounds, CONFIG, recompute, IMAGE)
    return Pipeline(net, len(bounds) - 1, ",".join(map(str, bounds)), CONFIG, recompute)


def rank(name, bounds, schedule, recompute=False):
    """Return the losses and the first layer's first gradient; without a schedule, of DeepSpeed's engine."""
    net, data, gradients = model(name), micro_batches(), []
    pipe, first = engine_of(net, bounds, schedule, recompute), next(net.parameters())

    def before(instruction, peers):
        if instruction.name == "OptimizerStep" and not gradients:
            gradients.append(None if first.grad is None else first.grad.clone())

    pipe.observe(before, lambda: None)
    return [pipe.train_batch(data).item() for _ in range(STEPS)], gradients[0]


def check(results, name):
    """All is that of one process but for rounding: a thousandth of what gradients that do not arrive would change."""
    wanted, untrained, gradient = one_process(name)
    for losses, _ in results:
        equal_but_for_rounding(losses, wanted, untrained)
    assert (results[0][1] - gradient).norm() < gradient.norm() / 1000


@pytest.mark.parametrize("schedule", [None, "1f1b"], ids=["deepspeed", "torch"])
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_two_stages_of_every_family_train_as_one_process(name, schedule, tmp_path):
    bounds = [0, len(catalog()[name]) // 2, len(catalog()[name])]
    check(run(tmp_path, 2, rank, name, bounds, schedule), name)


def test_the_families_are_those_of_the_catalog():
    assert set(FAMILIES) == {
        "alexnet",
        "convnext",
        "efficientnet",
        "efficientnet_v2",
        "mobilenet_v3",
        "vgg",
        "vgg_bn",
    }
    assert FAMILIES["convnext"] == "convnext_tiny" and FAMILIES["vgg_bn"] == "vgg11_bn"


def test_a_narrow_convnext_would_send_channels_last_both_ways():
    """What the tests below cut: neither the activation nor its gradient is contiguous if nothing is done."""
    before, behind = (nn.Sequential(*join_layers(model(NARROW))[low:high]) for low, high in itertools.pairwise(CUT))
    sent = before(next(micro_batches())[0])
    received = sent.detach().contiguous().requires_grad_()
    (gradient,) = torch.autograd.grad(behind(received).sum(), received)
    assert not sent.is_contiguous() and not gradient.is_contiguous()


@pytest.mark.parametrize(
    "schedule, recompute", [(None, False), (None, True), ("1f1b", False), ("1f1b", True), ("zero_bubble", False)]
)
def test_channels_last_cross_a_cut(schedule, recompute, tmp_path):
    check(run(tmp_path, 2, rank, NARROW, CUT, schedule, recompute), NARROW)


def evaluating_rank():
    pipe = engine_of(model(NARROW), CUT, None, False)
    return pipe.logits(micro_batches(), 3)


def test_channels_last_cross_a_cut_in_evaluation(tmp_path):
    net = model(NARROW).eval()
    with torch.no_grad():
        wanted = [net(images) for images, _ in itertools.islice(micro_batches(), 3)]
    torch.testing.assert_close(run(tmp_path, 2, evaluating_rank)[1], wanted)
