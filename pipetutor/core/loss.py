"""The loss of every model that brings none of its own."""

import torch
from torch import nn

__all__ = ["CrossEntropy"]


class CrossEntropy(nn.CrossEntropyLoss):
    """``nn.CrossEntropyLoss`` for one label an example, as of images, or for many, as of text.

    Logits are (N, classes) with labels (N), or (N, T, classes) with labels (N, T). Labels of -100 are left out of the
    mean, which is right over several micro-batches where each has as many labels as any other.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean over all labels."""
        return super().forward(input.flatten(0, -2), target.flatten())
