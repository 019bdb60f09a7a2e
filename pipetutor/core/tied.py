"""Weights that several layers of a model share, such as those of an embedding and of the head of a transformer.

On one rank they are one module; ranks that hold different places of it have a copy each, and add the copies'
gradients up once a step.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__: list[str] = []


class Tied(nn.Module):
    """One place of a module that has several in the list.

    Args:
        key: of the module.
        module: the same one in all places that a rank holds, and a copy of it on another rank.
        forward: takes the module and what comes in; None for the module's own.
    """

    def __init__(self, key: str, module: nn.Module, forward: Callable[[nn.Module, Any], Any] | None = None):
        super().__init__()
        self.key, self.module = key, module
        self._forward = forward
        self._twin: tuple[nn.Module, ...] = ()  # where torch does not look for modules

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute what the module does in this place."""
        module = self.module
        if self._twin:
            module = self._twin[0].train(module.training)
        return self._forward(module, input) if self._forward else module(input)

    def apart(self) -> Iterator[nn.Parameter]:
        """Return the parameters whose gradients are added up apart, if any."""
        return itertools.chain.from_iterable(twin.parameters() for twin in self._twin)

    def sum_apart(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """From now on, add the gradients of this place up apart from those of the others.

        Returns:
            Each of the module's parameters, and one that has the same memory and gets the gradients of this place.
        """
        twins = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in self.module.parameters()}
        shared = {id(buffer): buffer for buffer in self.module.buffers()}
        self._twin = (copy.deepcopy(self.module, {**twins, **shared}),)
        return zip(self.module.parameters(), self._twin[0].parameters(), strict=True)


def owner(layer: nn.Module) -> nn.Module:
    """Return the module that has a layer's parameters."""
    return layer.module if isinstance(layer, Tied) else layer


class TiedSums:
    """The gradients of tied places that one rank holds, added up apart, as by two ranks that hold one each.

        one sum       e₀ + h₀ + e₁ + h₁           the order of one process: other roundings than on two ranks
        apart         (e₀ + e₁) + (h₀ + h₁)       e and h: of embedding and head, of micro-batches 0 and 1

    So the losses do not depend on the number of stages, to the last bit.

    Args:
        layers: those of the rank, on its device, with the memory that they will train in.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        tied = [layer for layer in layers if isinstance(layer, Tied)]
        first: dict[str, Tied] = {}
        later = [layer for layer in tied if first.setdefault(layer.key, layer) is not layer]
        self._pairs = [pair for layer in later for pair in layer.sum_apart()]

    def add(self) -> None:
        """Give each parameter the sum of its gradients."""
        for parameter, twin in self._pairs:
            if parameter.grad is not None and twin.grad is not None:
                parameter.grad.add_(twin.grad)
            elif twin.grad is not None:
                parameter.grad = twin.grad
            twin.grad = None
