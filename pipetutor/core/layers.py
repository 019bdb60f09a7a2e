"""A vision model as a flat list of layers, which is the form that a pipeline cuts.

DeepSpeed's ``PipelineModule`` sends the output of each layer to the next and nothing else. A model whose
``forward`` does more than that, a skip connection around layers or an auxiliary head, has no such list.
"""

from pathlib import Path

import torch
from torch import nn

from pipetutor.core.partition import Layer
from pipetutor.core.records import to_json
from pipetutor.system.uncompiled import torchvision

__all__ = ["Flatten", "build", "catalog_entry", "join_layers", "layer_names", "write_catalog"]

PARTS = ("features", "avgpool", "classifier")


class Flatten(nn.Flatten):
    """From (N, C, H, W) to (N, C*H*W): what the model's ``forward`` does between pooling and classifier."""


def build(name: str, classes: int = 10, dropout: float | None = None) -> nn.Module:
    """Build an untrained torchvision classification model.

    Args:
        name: a torchvision model name, such as ``alexnet``.
        classes: outputs of the last layer.
        dropout: probability for every dropout layer; None keeps the model's own, 0 turns dropout off.
    """
    net = torchvision.models.get_model(name, weights=None, num_classes=classes)
    if dropout is not None:
        set_dropout(net, dropout)
    return net


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the probability with which each part of a model drops what it passes on."""
    for part in model.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd | torchvision.ops.StochasticDepth):
            part.p = probability
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = probability


def flatten_layers(vision_model: nn.Module) -> list[nn.Module]:
    """Return what ``join_layers`` does, without the proof: of a model whose weights are on ``meta``, say."""
    name = type(vision_model).__name__
    missing = [part for part in PARTS if not isinstance(getattr(vision_model, part, None), nn.Module)]
    if missing:
        raise ValueError(
            f"{name} cannot be flattened: it has no {', no '.join(missing)}; a pipeline needs a model that is "
            "features, avgpool and classifier in a row, such as alexnet or vgg11"
        )
    features, avgpool, classifier = (getattr(vision_model, part) for part in PARTS)
    # A classifier may begin with a layer that still expects four dimensions (ConvNeXt's LayerNorm2d).
    flatten = [] if any(isinstance(layer, nn.Flatten) for layer in classifier) else [Flatten()]
    return [*features, avgpool, *flatten, *classifier]


def join_layers(vision_model: nn.Module) -> list[nn.Module]:
    """Return the model as the flat list ``[*features, avgpool, flatten, *classifier]``.

    The list is proven before it is returned: on a random batch of two images, in eval mode, it must give
    the model's own output bit for bit. The layers are the model's own, not copies.

    Args:
        vision_model: a model with ``features``, ``avgpool`` and ``classifier``, such as AlexNet or VGG.

    Returns:
        The layers in order; 22 for AlexNet.

    Raises:
        ValueError: the model lacks one of the three parts, or is not their composition.

    >>> len(join_layers(torchvision.models.alexnet()))
    22
    """
    layers = flatten_layers(vision_model)
    _prove(vision_model, layers)
    return layers


def layer_names(model: nn.Module, layers: list[nn.Module]) -> list[str]:
    """Return the model's own name for each layer of its flat list; empty for the flatten that was added.

    >>> net = torchvision.models.alexnet()
    >>> layer_names(net, join_layers(net))[-1]
    'classifier.6'
    """
    names = {id(module): name for name, module in model.named_modules()}
    return [names.get(id(layer), "") for layer in layers]


@torch.no_grad()
def _prove(model: nn.Module, layers: list[nn.Module]) -> None:
    """Raise ValueError unless the layers, one after the other, compute what the model computes."""
    name = type(model).__name__
    was_training = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    # 64 pixels are the least that every family here can halve five times; AlexNet pools them up to 6 x 6.
    images = torch.randn(2, 3, 64, 64, generator=generator).to(parameter)
    model.eval()
    try:
        expected, found = model(images), images
        for index, layer in enumerate(layers):
            try:
                found = layer(found)
            except RuntimeError as error:
                raise ValueError(
                    f"{name} cannot be flattened: layer {index} ({type(layer).__name__}) does not take the output "
                    f"of layer {index - 1}: {str(error).splitlines()[0]}"
                ) from None
        if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
            raise ValueError(
                f"{name} cannot be flattened: its output {tuple(getattr(expected, 'shape', ()))} becomes "
                f"{tuple(found.shape)} when its layers run in a row"
            )
        if not torch.equal(expected, found):
            raise ValueError(
                f"{name} cannot be flattened: its output and that of its layers in a row differ by up to "
                f"{(expected - found).abs().max().item():.3g}; its forward does more than call them in order"
            )
    finally:
        for module, training in was_training:
            module.training = training


def catalog_entry(layers: list[nn.Module]) -> list[Layer]:
    """Return what the catalog says of a flat list of layers."""

    def weights(layer: nn.Module) -> int:
        return sum(p.numel() for p in layer.parameters() if p.requires_grad)

    return [Layer(type(layer).__name__, weights(layer)) for layer in layers]


def write_catalog(path: Path) -> None:
    """Write models.json: for every torchvision model that can be flattened, its layers and their weights."""
    models: dict[str, list[Layer]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        net = build(name)
        try:
            layers = join_layers(net)
        except ValueError:
            continue
        models[name] = catalog_entry(layers)
    lines = (f"{to_json(name)}: {to_json(layers)}" for name, layers in models.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_catalog(Path(__file__).with_name("models.json"))
