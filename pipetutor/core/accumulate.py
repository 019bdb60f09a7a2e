"""Weight gradients of linear layers that are added up where they are, without a fresh buffer for each micro-batch.

Autograd computes the gradient of each micro-batch into new memory, then adds it to the sum:

    stock       new = dyᵀ x;  grad += new       2 writes and 2 reads of the weight's size, and its pages mapped anew
    in place    grad += dyᵀ x                   1 write and 1 read: one call of BLAS

A pipeline adds up M of them in each step, and AlexNet's largest weight has 151 MB. At 8 images on one core, the
backward pass of that layer takes two thirds of its time so, and a third where memory comes in pages of 4 KB.
Megatron-LM does the same as *gradient accumulation fusion* (``--no-gradient-accumulation-fusion`` turns it off).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

__all__ = ["accumulate_in_place"]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # the parameter, which has the sum; a checkpoint would save a stand-in for it
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows, inputs = dy.flatten(end_dim=-2), x.flatten(end_dim=-2)
        fresh = None
        if for_weight and weight.grad is None:
            fresh = rows.t() @ inputs
        elif for_weight:
            weight.grad.addmm_(rows.t(), inputs)
        return dy @ weight if for_x else None, fresh, rows.sum(0) if for_bias else None


class Linear(nn.Linear):
    """``nn.Linear`` whose backward pass adds to ``weight.grad`` itself.

    Whoever waits for autograd to hand over a weight's gradient is told of the first micro-batch's alone: hooks of the
    weight, ZeRO's among them, and ``torch.autograd.grad``. Under autocast it is ``nn.Linear``: the product has fewer
    bits than the sum, and autograd casts it.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute what ``nn.Linear`` does."""
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # ``meta`` has none
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)


def accumulate_in_place(layers: Sequence[nn.Module]) -> None:
    """Turn each ``nn.Linear`` among the layers, and within them, into a ``Linear``; its parameters stay its own.

    Args:
        layers: changed in place; other layers, and subclasses of ``nn.Linear``, are left as they are.

    >>> layers = join_layers(net)  # doctest: +SKIP
    >>> accumulate_in_place(layers)  # doctest: +SKIP
    """
    for layer in layers:
        for module in layer.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear
