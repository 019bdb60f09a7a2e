"""The layers of a stage, with or without activation checkpointing, for an engine that takes any module.

A stage that recomputes keeps its input alone of each micro-batch, and computes the rest once more in the backward
pass (Chen et al., *Training Deep Nets with Sublinear Memory Cost*, arXiv:1604.06174).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def _without_effect(module: nn.Module) -> Iterator[None]:
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

    def _contexts(self) -> tuple[Any, Any]:
        return nullcontext(), _without_effect(self)  # running statistics take in a micro-batch once

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute the stage's output, which is no view: a split backward pass detaches it in place."""
        if self._recompute:
            output = checkpoint(super().forward, input, use_reentrant=False, context_fn=self._contexts)
        else:
            output = super().forward(input)
        return output.clone() if output._is_view() else output
