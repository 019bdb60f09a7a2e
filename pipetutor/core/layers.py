"""A vision model as a flat list of layers, which is the form that a pipeline cuts.

DeepSpeed's ``PipelineModule`` sends the output of each layer to the next and nothing else. A residual block has one
input and one output, so it is one layer, whatever it does inside. A model whose ``forward`` does more than call one
block after the other, such as an auxiliary head, has no such list.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from pipetutor.core.recompute import without_effect
from pipetutor.system.uncompiled import torchvision

__all__ = ["Flatten", "build", "flatten_layers", "join_layers", "layer_names"]

models = torchvision.models


class Flatten(nn.Flatten):
    """From (N, C, H, W) to (N, C*H*W): what the model's ``forward`` does between pooling and classifier."""


class Mean(nn.Module):
    """From (N, C, H, W) to (N, C): the mean of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute it."""
        return x.mean([2, 3])


class Tokens(nn.Module):
    """From (N, D, H, W) to (N, 1 + H*W, D): a vision transformer's class token and patches, with their positions.

    Both parameters are the model's own, and have the names here that they have in the model.
    """

    class_token: nn.Parameter

    def __init__(self, model: nn.Module):
        super().__init__()
        self.class_token = model.get_parameter("class_token")
        self.encoder: Any = nn.Module()
        self.encoder.pos_embedding = model.get_parameter("encoder.pos_embedding")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Put the class token first, and add the positions."""
        patches = x.flatten(2).permute(0, 2, 1)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1)
        return tokens + self.encoder.pos_embedding


class ClassToken(nn.Module):
    """From (N, T, D) to (N, D): the first token of each image, which is all that the classifier reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take it."""
        return x[:, 0]


POOL = partial(nn.AdaptiveAvgPool2d, 1)
Step = str | Callable[[], nn.Module]

# What ``forward`` of torchvision's models does: names of their parts, and modules of ours for its other lines.
CHAINS: dict[type[nn.Module], tuple[Any, ...]] = {
    models.DenseNet: ("features", partial(nn.ReLU, inplace=True), POOL, Flatten, "classifier"),
    models.MaxVit: ("stem", "blocks", "classifier"),
    models.MNASNet: ("layers", Mean, "classifier"),
    models.MobileNetV2: ("features", POOL, Flatten, "classifier"),
    models.RegNet: ("stem", "trunk_output", "avgpool", Flatten, "fc"),
    models.ResNet: (
        *("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
        *("avgpool", Flatten, "fc"),
    ),
    models.ShuffleNetV2: ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5", Mean, "fc"),
    models.SqueezeNet: ("features", "classifier", Flatten),
    models.SwinTransformer: ("features", "norm", "permute", "avgpool", "flatten", "head"),
    models.VisionTransformer: (
        *("conv_proj", Tokens, "encoder.dropout", "encoder.layers", "encoder.ln"),
        *(ClassToken, "heads"),
    ),
}
PARTS = ("features", "avgpool", "classifier")  # of any other model: AlexNet, VGG, MobileNetV3, EfficientNet, ConvNeXt
# What is a row of layers; whatever else torchvision has a class for, such as Conv2dNormActivation, is one layer.
ROWS = (nn.Sequential, nn.ModuleList, models.regnet.AnyStage, models.maxvit.MaxVitBlock)
WITH_HEADS = (models.GoogLeNet, models.Inception3)


def build(name: str, classes: int = 10, dropout: float | None = None) -> nn.Module:
    """Build an untrained torchvision classification model.

    Args:
        name: a torchvision model name, such as ``alexnet``.
        classes: outputs of the last layer.
        dropout: probability for every dropout layer; None keeps the model's own, 0 turns dropout off.
    """
    net = models.get_model(name, weights=None, num_classes=classes)
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


def join_layers(vision_model: nn.Module) -> list[nn.Module]:
    """Return the model as a flat list of layers; for AlexNet ``[*features, avgpool, flatten, *classifier]``.

    The list is proven before it is returned: with random images it must do what the model does, bit for bit, in eval
    mode and in training. Without all of its weights, as where a rank builds its own layers alone, there is no proof.
    The layers are the model's own, not copies.

    Args:
        vision_model: a model of torchvision that calls one block after the other, such as AlexNet, ResNet or ViT, or
            one of your own that is features, avgpool and classifier in a row.

    Returns:
        The layers in order; 22 for AlexNet.

    Raises:
        ValueError: the model is no such chain, or does more than that.

    >>> len(join_layers(torchvision.models.alexnet()))
    22
    """
    layers = flatten_layers(vision_model)
    if not any(parameter.is_meta for parameter in vision_model.parameters()):
        _prove(vision_model, layers)
    return layers


def flatten_layers(vision_model: nn.Module) -> list[nn.Module]:
    """Return the list of ``join_layers`` without its proof: for models of the catalog, also on the meta device.

    Raises:
        ValueError: the model is no chain of blocks.

    >>> [type(layer).__name__ for layer in flatten_layers(torchvision.models.resnet18())[3:6]]
    ['MaxPool2d', 'BasicBlock', 'BasicBlock']
    """
    if isinstance(vision_model, WITH_HEADS):
        raise _refusal(
            vision_model,
            "in training it has more outputs, of auxiliary heads in its middle, and a pipeline has that of its last "
            "layer alone; take another model, such as resnet18",
        )
    steps = next((CHAINS[kind] for kind in type(vision_model).__mro__ if kind in CHAINS), None)
    layers: list[nn.Module] = []
    for step in steps or _parts(vision_model):
        if isinstance(step, str):
            layers += _opened(vision_model.get_submodule(step))
        else:
            layers.append(Tokens(vision_model) if step is Tokens else step())
    return layers


def _parts(model: nn.Module) -> tuple[Step, ...]:
    missing = [part for part in PARTS if not isinstance(getattr(model, part, None), nn.Module)]
    if missing:
        raise _refusal(
            model,
            f"it has no {', no '.join(missing)}; a pipeline needs a model that is features, avgpool and classifier "
            "in a row, as AlexNet is, or torchvision's " + ", ".join(kind.__name__ for kind in CHAINS),
        )
    # A classifier may begin with a layer that still expects four dimensions (ConvNeXt's LayerNorm2d).
    if any(isinstance(layer, nn.Flatten) for layer in _opened(model.get_submodule("classifier"))):
        return PARTS
    return ("features", "avgpool", Flatten, "classifier")


def _opened(part: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a row of layers, and of the rows in it."""
    if type(part) not in ROWS:
        yield part
        return
    for layer in part._modules.values():  # ``children()`` would leave out a module that comes again
        if layer is not None:
            yield from _opened(layer)


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be flattened: {reason}")


def layer_names(model: nn.Module, layers: list[nn.Module]) -> list[str]:
    """Return the model's own name for each layer of its flat list; empty for a layer that was added.

    An added layer has no state, or its state has the model's names without more. So over all layers
    ``layer.state_dict(prefix=f"{name}." if name else "")`` has each entry of the model's ``state_dict`` once.

    >>> net = torchvision.models.alexnet()
    >>> layer_names(net, join_layers(net))[-1]
    'classifier.6'
    """
    names = {id(module): name for name, module in model.named_modules()}
    return [names.get(id(layer), "") for layer in layers]


def _prove(model: nn.Module, layers: list[nn.Module]) -> None:
    """Raise ValueError unless the layers, one after the other, do what the model does."""
    was_training = [(module, module.training) for module in model.modules()]
    try:
        images = _images(model, layers)
        for training in (False, True):
            model.train(training)
            wanted = _seen(model, layers, model, images)
            found = _seen(model, layers, lambda x: _in_a_row(model, layers, x), images)
            mode = "in training" if training else "in eval mode"
            for what, expected in wanted.items():
                if not torch.equal(expected, found[what]):
                    raise _refusal(model, f"{mode} {_difference(what, expected, found[what])}")
    finally:
        for module, training in was_training:
            module.training = training


def _images(model: nn.Module, layers: list[nn.Module]) -> torch.Tensor:
    """Return two random images of a size that the model takes."""
    parameter = next(model.parameters())
    # 64 pixels are the least that every family here can halve five times; AlexNet pools them up to 6 x 6. What was
    # made for one size has 224, or says which.
    own = getattr(model, "image_size", None)
    reason = ""
    for size in [own] if isinstance(own, int) else [64, 224]:
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(parameter)
        try:
            _seen(model, layers, model, images)
            return images
        except (RuntimeError, AssertionError) as error:
            reason = f"it does not take images of 3 x {size} x {size}: {str(error).splitlines()[0]}"
    raise _refusal(model, reason)


def _in_a_row(model: nn.Module, layers: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for index, layer in enumerate(layers):
        try:
            x = layer(x)
        except RuntimeError as error:
            raise _refusal(
                model,
                f"layer {index} ({type(layer).__name__}) does not take the output of layer {index - 1}: "
                f"{str(error).splitlines()[0]}",
            ) from None
    return x


def _seen(
    model: nn.Module, layers: list[nn.Module], compute: Callable[[torch.Tensor], Any], images: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return what can be seen of one computation: its output, and in training also what backward leaves.

    The model is left as it was, and so are random numbers: a second computation draws the same ones.
    """
    entering: list[torch.Tensor] = []
    own = set(model.modules())
    last = next(layer for layer in reversed(layers) if layer in own)
    # A last layer of zeros, as ViT's is at first, hides all that came before it.
    hook = last.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0].clone()))
    devices = [images.device] if images.is_cuda else []
    try:
        with torch.random.fork_rng(devices), without_effect(model), torch.set_grad_enabled(model.training):
            output = compute(images)
            if not isinstance(output, torch.Tensor):
                raise _refusal(model, f"its output is a {type(output).__name__}, and a pipeline's is one tensor")
            seen = {"output": output}
            if entering:
                seen["input of the last layer"] = entering[-1]
            effects = {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    finally:
        hook.remove()
    first = next((p for p in model.parameters() if p.requires_grad), None)
    if model.training and first is not None and not images.is_cuda:  # where backward may add in any order
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).to(x) for x in seen.values()]
        (gradient,) = torch.autograd.grad([*seen.values()], first, weights, allow_unused=True, materialize_grads=True)
        effects["gradient of its first parameter"] = gradient
    return {what: x.detach() for what, x in (seen | effects).items()}


def _difference(what: str, expected: torch.Tensor, found: torch.Tensor) -> str:
    if expected.shape != found.shape:
        return f"its {what} {tuple(expected.shape)} becomes {tuple(found.shape)} when its layers run in a row"
    return (
        f"its {what} and that of its layers in a row differ by up to {(expected - found).abs().max().item():.3g}; "
        "its forward does more than call them in order"
    )
