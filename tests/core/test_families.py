"""Every family of models that the catalog lists trains in a pipeline, on both engines, as in one process."""

import functools
import itertools
import re

import pytest
import torch
import torchvision
from conftest import SMALL_SGD, equal_but_for_rounding, run
from families import image, smallest
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from pipetutor.core.config import read_config
from pipetutor.core.deepspeed_engines import Pipeline
from pipetutor.core.layers import build, flatten_layers, join_layers
from pipetutor.core.model import Model
from pipetutor.core.partition import catalog, parameters_of
from pipetutor.core.recompute import StageLayers
from pipetutor.core.torch_engine import TorchPipeline
from pipetutor.schedule import orders

STEPS, LEARNING_RATE = 2, 0.1
CONFIG = read_config(SMALL_SGD | {"optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}}})
SMALLEST = smallest()
ENGINES = pytest.mark.parametrize("schedule", [None, "1f1b"], ids=["deepspeed", "torch"])

NARROW = "a narrow ConvNeXt"
CUT = [0, 2, 9]  # behind a block whose output has channels last, ahead of a layer that wants them there


def model(name):
    torch.manual_seed(0)
    if name == NARROW:
        stages = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
        return torchvision.models.ConvNeXt(stages, layer_scale=1.0, num_classes=10)
    net = build(name, dropout=0.0)
    if name.startswith("vit"):
        nn.init.normal_(net.heads.head.weight, std=0.02)  # zeros at first, through which no gradient comes
    return net


def micro_batches(name):
    generator = torch.Generator().manual_seed(0)
    while True:
        yield [torch.randn(2, *image(name), generator=generator), torch.randint(10, (2,), generator=generator)]


def loss_of(net, data):
    return torch.stack([nn.functional.cross_entropy(net(x), y) for x, y in itertools.islice(data, 2)]).mean()


@functools.cache
def one_process(name):
    """Return the losses, those of a model that learns nothing, and the first gradient of the first layer."""
    net, data = model(name), micro_batches(name)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    losses, gradient = [], None
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(net, data)
        loss.backward()
        gradient = next(net.parameters()).grad.clone() if gradient is None else gradient
        optimizer.step()
        losses.append(loss.item())
    net, data = model(name), micro_batches(name)
    with torch.no_grad():
        return losses, [loss_of(net, data).item() for _ in range(STEPS)], gradient


def engine_of(net, bounds, schedule, recompute, images):
    if schedule:
        return TorchPipeline(
            Model.of(net), orders.build(schedule, len(bounds) - 1, 2), bounds, CONFIG, images.to("meta"), recompute
        )
    return Pipeline(Model.of(net), len(bounds) - 1, ",".join(map(str, bounds)), CONFIG, recompute)


def rank(name, bounds, schedule, recompute=False):
    """Return the losses and the first layer's first gradient; without a schedule, of DeepSpeed's engine."""
    net, data, gradients = model(name), micro_batches(name), []
    images, _ = next(micro_batches(name))
    pipe, first = engine_of(net, bounds, schedule, recompute, images), next(net.parameters())

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
    (found,) = [found for _, found in results if found is not None]
    assert (found - gradient).norm() < gradient.norm() / 1000


SLOW = {name for name in SMALLEST if image(name)[1] > 64 or parameters_of(catalog()[name]) > 20e6}
QUICK = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SMALLEST]


@ENGINES
@pytest.mark.parametrize("name", QUICK)
def test_two_stages_of_every_family_train_as_one_process(name, schedule, tmp_path):
    bounds = [0, len(catalog()[name]) // 2, len(catalog()[name])]
    check(run(tmp_path, 2, rank, name, bounds, schedule), name)


@pytest.mark.slow
@ENGINES
@pytest.mark.parametrize("name", sorted(catalog().keys() - set(SMALLEST)))
def test_two_stages_of_every_model_train_as_one_process(name, schedule, tmp_path):
    test_two_stages_of_every_family_train_as_one_process(name, schedule, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_every_layer_can_be_a_stage_of_torchs_engine(name, tmp_path):
    """A cut wherever there can be one, in one run; where the layers are odd in number, all but the last but one."""
    count = len(catalog()[name])
    bounds = [*range(count - count % 2), count]
    check(run(tmp_path, 2, rank, name, bounds, "interleaved_1f1b"), name)


def test_the_families_are_those_of_the_catalog():
    families = "alexnet convnext densenet efficientnet efficientnet maxvit mnasnet mobilenet mobilenet regnet resnet "
    families += "resnet resnext shufflenet squeezenet swin swin vgg vgg vit wide"
    assert [re.match("[a-z]+", name)[0] for name in SMALLEST] == families.split()
    assert {"convnext_tiny", "vgg11_bn", "efficientnet_v2_s", "resnet50", "swin_v2_t"} < set(SMALLEST)


def pieces(name, bounds, recompute):
    """Train one step of a model in pieces, of which each takes what another process would have sent it."""
    net, (images, labels) = model(name).double(), next(micro_batches(name))
    layers, passed = flatten_layers(net), []
    for low, high in itertools.pairwise(bounds):
        sent = passed[-1][1] if passed else images.double()
        received = sent.detach().requires_grad_(low > 0)
        passed.append((received, StageLayers(layers[low:high], recompute)(received)))
    loss = nn.functional.cross_entropy(passed[-1][1], labels)
    loss.backward()
    for (_, sent), (received, _) in reversed([*itertools.pairwise(passed)]):
        assert sent.is_contiguous() and received.grad.is_contiguous()
        sent.backward(received.grad)
    return effects(net, loss)


def effects(net, loss):
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in net.named_parameters()}
    return {"loss": loss.detach()} | gradients | dict(net.named_buffers())


@functools.cache
def in_one_piece(name):
    net, (images, labels) = model(name).double(), next(micro_batches(name))
    loss = nn.functional.cross_entropy(net(images.double()), labels)
    loss.backward()
    return effects(net, loss)


def check_pieces(name, bounds, recompute):
    torch.testing.assert_close(pieces(name, bounds, recompute), in_one_piece(name))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", QUICK)
def test_every_layer_can_begin_and_end_a_stage(name, recompute):
    check_pieces(name, range(len(catalog()[name]) + 1), recompute)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", SMALLEST)
def test_every_cut_in_two_computes_the_same(name, recompute):
    count = len(catalog()[name])
    for cut in range(1, count):
        check_pieces(name, [0, cut, count], recompute)


@pytest.mark.parametrize("schedule, recompute", [(None, False), (None, True), ("1f1b", False), ("1f1b", True)])
def test_an_activation_that_works_in_place_begins_a_stage(schedule, recompute, tmp_path):
    """What entered is needed once more: for its gradient, or to compute from it again."""
    layers = flatten_layers(model("mobilenet_v3_small"))
    assert isinstance(layers[16], nn.Hardswish) and layers[16].inplace
    check(run(tmp_path, 2, rank, "mobilenet_v3_small", [0, 16, 19], schedule, recompute), "mobilenet_v3_small")


def test_a_narrow_convnext_would_send_channels_last_both_ways():
    """What the tests below cut: neither the activation nor its gradient is contiguous if nothing is done."""
    before, behind = (nn.Sequential(*join_layers(model(NARROW))[low:high]) for low, high in itertools.pairwise(CUT))
    sent = before(next(micro_batches(NARROW))[0])
    received = sent.detach().contiguous().requires_grad_()
    (gradient,) = torch.autograd.grad(behind(received).sum(), received)
    assert not sent.is_contiguous() and not gradient.is_contiguous()


@pytest.mark.parametrize(
    "schedule, recompute", [(None, False), (None, True), ("1f1b", False), ("1f1b", True), ("zero_bubble", False)]
)
def test_channels_last_cross_a_cut(schedule, recompute, tmp_path):
    check(run(tmp_path, 2, rank, NARROW, CUT, schedule, recompute), NARROW)


def evaluating_rank():
    images, _ = next(micro_batches(NARROW))
    pipe = engine_of(model(NARROW), CUT, None, False, images)
    return pipe.logits(micro_batches(NARROW), 3)


def test_channels_last_cross_a_cut_in_evaluation(tmp_path):
    net = model(NARROW).eval()
    with torch.no_grad():
        wanted = [net(images) for images, _ in itertools.islice(micro_batches(NARROW), 3)]
    torch.testing.assert_close(run(tmp_path, 2, evaluating_rank)[1], wanted)
