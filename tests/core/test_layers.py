"""join_layers proves that its list is the model, and refuses models that are more than a list."""

import warnings

import pytest
import torch
import torchvision
from families import image, smallest
from torch import nn
from torch.nn import functional

from pipetutor.core.crossing import crossing
from pipetutor.core.layers import build, flatten_layers, join_layers, layer_names
from pipetutor.core.model import build_model
from pipetutor.core.partition import catalog

MODELS = torchvision.models.list_models(module=torchvision.models)
WITH_HEADS = {"googlenet": "GoogLeNet", "inception_v3": "Inception3"}
SMALLEST = smallest()


def check_names(net, layers):
    """Each entry of the model's state is that of one layer, under the same name."""
    entries = [
        entry
        for name, layer in zip(layer_names(net, layers), layers, strict=True)
        for entry in layer.state_dict(prefix=f"{name}." if name else "", keep_vars=True).items()
    ]
    state = net.state_dict(keep_vars=True)
    assert sorted(name for name, _ in entries) == sorted(state)
    assert all(tensor is state[name] for name, tensor in entries)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_in_the_catalog_or_refused(name):
    if name in WITH_HEADS:
        assert name not in catalog()
        with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError) as refusal:
            build_model(name, held=[])
        words = str(refusal.value)
        assert words.startswith(f"{WITH_HEADS[name]} cannot be flattened: ") and "auxiliary heads" in words
        assert "\n" not in words
        return
    model = build_model(name, held=[])
    assert model.about() == list(catalog()[name])
    assert all(tensor.is_meta for tensor in model.whole.state_dict().values())
    check_names(model.whole, model.layers)
    images = torch.empty(2, *image(name), device="meta")
    assert crossing(model, images)[-1].shape == (2, 10)


QUICK = [pytest.param(name, marks=[pytest.mark.slow] * (image(name)[1] > 64)) for name in SMALLEST]


@pytest.mark.parametrize("name", QUICK)
def test_the_list_is_the_model(name):
    net = build(name)
    layers = join_layers(net)
    check_names(net, layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(catalog().keys() - set(SMALLEST)))
def test_every_list_is_its_model(name):
    test_the_list_is_the_model(name)


def test_what_is_a_row_is_opened_and_what_is_a_block_is_not():
    kinds = {name: [layer.kind for layer in catalog()[name]] for name in ("alexnet", "resnet18", "vit_b_16")}
    assert len(kinds["alexnet"]) == 22
    begin, end = ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"], ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    assert kinds["resnet18"] == [*begin, *["BasicBlock"] * 8, *end]
    begin, end = ["Conv2d", "Tokens", "Dropout"], ["LayerNorm", "ClassToken", "Linear"]
    assert kinds["vit_b_16"] == [*begin, *["EncoderBlock"] * 12, *end]
    assert not {kind for layers in catalog().values() for kind, *_ in layers} & {"Sequential", "ModuleList"}


def test_a_model_without_weights_gives_its_list_unproven():
    net = build_model("resnet18", held=[]).whole
    check_names(net, join_layers(net))


class Own(nn.Module):
    """Features, avgpool and classifier; a layer comes twice, and there is a row in the row."""

    def __init__(self):
        super().__init__()
        relu = nn.ReLU()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3), relu
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4, 5)

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def test_a_model_of_ones_own_is_taken():
    net = Own()
    layers = join_layers(net)
    kinds = ["Conv2d", "ReLU", "BatchNorm2d", "Conv2d", "ReLU", "AdaptiveAvgPool2d", "Flatten", "Linear"]
    assert [type(layer).__name__ for layer in layers] == kinds
    assert layers[1] is layers[4]
    check_names(net, layers)


def test_a_transformer_for_images_of_another_size_is_taken():
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32)
    assert [type(layer).__name__ for layer in join_layers(net)][:3] == ["Conv2d", "Tokens", "Dropout"]


def test_what_has_no_list_is_refused():
    class Other(nn.Module):
        classifier = None

    with pytest.raises(
        ValueError, match=r"^Other cannot be flattened: it has no features, no avgpool, no classifier;"
    ):
        join_layers(Other())


def changed(forward, kind=Own):
    """Return a model whose forward is another."""
    net = kind(num_classes=10) if kind is torchvision.models.AlexNet else kind()
    net.__class__ = type("Changed", (kind,), {"forward": forward})
    return net


@pytest.mark.parametrize(
    "forward, words",
    [
        (lambda self, x: 2 * Own.forward(self, x), "in eval mode its output and that of .* differ by up to"),
        (lambda self, x: {"logits": Own.forward(self, x)}, "its output is a dict, and a pipeline's is one tensor"),
        (lambda self, x: Own.forward(self, x)[:1], r"its output \(1, 5\) becomes \(2, 5\)"),
        (
            lambda self, x: Own.forward(self, functional.dropout(x, 0.5, self.training)),
            "in training its output and that of .* differ by up to",
        ),
        (lambda self, x: (Own.forward(self, x),) * 2 if self.training else Own.forward(self, x), "output is a tuple"),
        (
            lambda self, x: (Own.forward(self, x), Own.forward(self, x))[0],
            "in training its buffer .* differ by up to",
        ),
        (
            lambda self, x: Own.forward(self, x) + ((w := self.features[0][0].weight.sum()) - w.detach()),
            "in training its gradient of its first parameter and that of .* differ by up to",
        ),
        (lambda self, x: Own.forward(self, x[:, :1]), "does not take images of 3 x 224 x 224: .*channels"),
    ],
    ids=["doubled", "dict", "shorter", "drops", "two in training", "twice", "gradient", "channels"],
)
def test_a_model_that_only_looks_like_a_list_is_refused(forward, words):
    with pytest.raises(ValueError, match=words):
        join_layers(changed(forward))


def test_a_last_layer_of_zeros_hides_nothing():
    def forward(self, x):
        return self.classifier(2 * self.avgpool(self.features(x)).flatten(1))

    net = changed(forward)
    nn.init.zeros_(net.classifier.weight)
    with pytest.raises(ValueError, match="its input of the last layer and that of"):
        join_layers(net)


def test_proving_changes_neither_mode_nor_gradients_nor_random_numbers():
    net = build("mobilenet_v3_small").train()
    net.features.eval()
    modes = [module.training for module in net.modules()]
    next(net.parameters()).grad = kept = torch.ones_like(next(net.parameters()))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    tensors = {name: value.data_ptr() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    join_layers(net)
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in net.modules()] == modes
    assert next(net.parameters()).grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert all(p.grad is None for p in list(net.parameters())[1:])
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert {name: value.data_ptr() for name, value in net.state_dict().items()} == tensors
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_dropout_can_be_turned_off():
    assert {m.p for m in build("alexnet", dropout=0.0).modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert {m.p for m in build("alexnet").modules() if isinstance(m, nn.Dropout)} == {0.5}
    assert flatten_layers(build("vit_b_16", dropout=0.3))[3].self_attention.dropout == 0.3
