"""What passes from layer to layer, found out on torch's device ``meta``: shapes without memory, and what is wrong."""

import itertools

import torch

from pipetutor.core.model import Model

__all__ = ["check_model", "crossing"]


def crossing(model: Model, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return what enters each layer, and what leaves the last one, as tensors without memory.

    Args:
        model: held or not.
        inputs: of a micro-batch; only their shape matters.

    Raises:
        ValueError: a layer does not take what the one before gives, or gives what cannot be sent.
    """
    found, kinds = [inputs.to("meta")], [layer.kind for layer in model.about()]
    for index, layer in enumerate(model.layers):
        held = itertools.chain(layer.named_parameters(), layer.named_buffers())
        tensors = {name: torch.empty_like(t, device="meta") for name, t in held}
        about = f"layer {index} ({kinds[index]})"
        given = f"{_shape(found[-1])} of " + (f"layer {index - 1}" if index else "a micro-batch")
        try:
            with torch.no_grad():
                output = torch.func.functional_call(layer, tensors, found[-1].clone())
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if "meta" in words:
                raise ValueError(
                    f"{about} cannot be tried without numbers, on torch's device meta, with {given}: make each "
                    "tensor that it keeps a buffer (register_buffer), and depend on no value (.item(), if): "
                    f"{words}"
                ) from None
            raise ValueError(f"{about} does not take {given}: {words}") from None
        if not isinstance(output, torch.Tensor):
            raise ValueError(
                f"{about} gives a {type(output).__name__}, and one tensor passes from layer to layer: put what needs "
                "more than one into a layer together"
            )
        if not output.is_floating_point():
            raise ValueError(f"{about} gives {_shape(output)}, and no gradient can come back through whole numbers")
        found.append(output)
    return found


def _shape(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_model(model: Model, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise ValueError unless a micro-batch can go through all layers, and the loss is a mean.

    Args:
        model: held or not.
        inputs: of a micro-batch; only their shape matters.
        labels: of the same, as they are.
    """
    output = crossing(model, inputs)[-1]
    try:
        outputs = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
        loss = model.loss_fn(outputs, labels)
        twice = model.loss_fn(torch.cat([outputs, outputs]), torch.cat([labels, labels]))
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the loss does not take {_shape(output)} of the last layer with labels {_shape(labels)}: "
            f"{type(error).__name__}: {words}"
        ) from None
    if not isinstance(loss, torch.Tensor) or loss.dim():
        what = _shape(loss) if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"the loss gives {what}, and must give one number, the mean over the micro-batch")
    if not torch.allclose(loss, twice, rtol=1e-3, equal_nan=True):
        raise ValueError(
            f"the loss is {loss.item():.4g} for a micro-batch and {twice.item():.4g} for the same twice: it must "
            "be the mean over the examples, and no sum (reduction='mean')"
        )
