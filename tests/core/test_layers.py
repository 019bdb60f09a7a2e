"""join_layers proves that its list is the model, and refuses models that are more than a list."""

import pytest
import torch
import torchvision
from torch import nn

from pipetutor.core.layers import build, join_layers
from pipetutor.core.partition import catalog

FAMILIES = [
    "alexnet",
    "vgg11",
    "vgg11_bn",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "convnext_tiny",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_list_is_the_model_and_the_catalog_knows_it(name):
    net = build(name).eval()
    layers = join_layers(net)
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(nn.Sequential(*layers)(images), net(images), rtol=0, atol=0)
    found = [
        (type(layer).__name__, sum(p.numel() for p in layer.parameters() if p.requires_grad)) for layer in layers
    ]
    assert found == [tuple(layer) for layer in catalog()[name]]
    assert {id(p) for layer in layers for p in layer.parameters()} == {id(p) for p in net.parameters()}


def test_alexnet_has_22_layers():
    assert len(join_layers(torchvision.models.AlexNet(num_classes=10))) == 22


@pytest.mark.parametrize("name, words", [("resnet18", "no features"), ("googlenet", "no features")])
def test_models_that_are_no_list_are_refused(name, words):
    net = torchvision.models.get_model(name, weights=None, init_weights=False) if name == "googlenet" else build(name)
    with pytest.raises(ValueError, match=words):
        join_layers(net)


def test_a_model_that_only_looks_like_a_list_is_refused():
    class Doubled(torchvision.models.AlexNet):
        def forward(self, x):
            return super().forward(x) * 2

    class Branch(torchvision.models.AlexNet):
        def forward(self, x):
            return {"logits": super().forward(x)}

    with pytest.raises(ValueError, match="differ by up to"):
        join_layers(Doubled())
    with pytest.raises(ValueError, match="its output"):
        join_layers(Branch())


def test_proving_changes_neither_mode_nor_random_numbers():
    net = build("vgg11_bn").train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    join_layers(net)
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in net.modules())
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)


def test_dropout_can_be_turned_off():
    assert {m.p for m in build("alexnet", dropout=0.0).modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert {m.p for m in build("alexnet").modules() if isinstance(m, nn.Dropout)} == {0.5}
