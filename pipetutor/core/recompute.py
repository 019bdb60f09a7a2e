"""The layers of a stage as one module, for both engines, with or without activation checkpointing.

A tensor travels between processes as its memory. A model that keeps channels last in it (ConvNeXt) hands over what
gloo refuses, and what NCCL would send for the other side to read in another order. So what crosses a cut is made
contiguous, in both directions.

A stage that recomputes keeps its input alone of each micro-batch, and computes the rest once more in the backward
pass (Chen et al., *Training Deep Nets with Sublinear Memory Cost*, arXiv:1604.06174).
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipetutor.core.tied import Tied

__all__: list[str] = []


@contextmanager
def without_effect(module: nn.Module) -> Iterator[None]:
    """Take back what is done to the module's buffers."""
    owners = [(owner, dict(owner._buffers)) for owner in module.modules() if owner._buffers]
    for owner, buffers in owners:
        owner._buffers.update(copy.deepcopy(buffers))
    try:
        yield
    finally:
        for owner, buffers in owners:
            owner._buffers.update(buffers)


class StageLayers(nn.Sequential):
    """One stage as a module.

    Args:
        layers: the stage's, in order.
        recompute: keep the input alone, and compute the rest once more to go backward.
    """

    def __init__(self, layers: Sequence[nn.Module], recompute: bool):
        super().__init__(*layers)
        self._recompute = recompute
        for layer in layers:  # what entered is kept: it gets a gradient, or all is computed from it once more
            if hasattr(layer, "inplace"):
                layer.inplace = False  # type: ignore[assignment]
            if any(True for _ in layer.parameters()):  # behind this one, there is other memory to work in
                break

    def _contexts(self) -> tuple[Any, Any]:
        return nullcontext(), without_effect(self)  # running statistics take in a micro-batch once

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return what gradients are made for: a split backward pass makes them for these alone."""
        apart = (layer.apart() for layer in self if isinstance(layer, Tied))
        return itertools.chain(super().parameters(recurse), *apart)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute the stage's output, contiguous, and have the input's gradient be so.

        The output is no view, either: a split backward pass detaches it in place.
        """
        if input.requires_grad:  # ``autograd.grad``, of a split backward pass, hands over gradients as they lie
            input.register_hook(torch.Tensor.contiguous)
        if self._recompute:
            output = checkpoint(super().forward, input, use_reentrant=False, context_fn=self._contexts)
        else:
            output = super().forward(input)
        if output._is_view() or not output.is_contiguous():
            output = output.clone(memory_format=torch.contiguous_format)
        return output
