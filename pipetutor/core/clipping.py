"""Gradients clipped by the norm of all of them: over the stages of a pipeline, with a tied weight counted once.

    rank 0   |g₀|², |g₁|²        ── sum ──┐
                                          ├──►  norm = √(sum over ranks)  ──►  each rank:  g ·= min(1, max / norm)
    rank 1   |g₂|², |tied copy|² ── sum ──┘
                    not counted: rank 0 has it

A rank that took the norm of its own stage would shorten it by another factor than its neighbours do theirs: the
direction of the step, and so the losses, would depend on the cut.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["clip_gradients"]


def clip_gradients(parameters: Iterable[nn.Parameter], longest: float, device: torch.device, group: Any) -> None:
    """Shorten the gradients of this rank as ``torch.nn.utils.clip_grad_norm_`` does with those of all ranks at once.

    Args:
        parameters: of this rank. One with ``ds_pipe_replicated``, as DeepSpeed marks the copy of a tied weight, is
            counted by another rank, and clipped here like all others.
        longest: the norm that is not exceeded.
        device: of this rank.
        group: the ranks whose parameters make one model; every one of them calls this.
    """
    trained = [p for p in parameters if p.grad is not None]
    counted = [p.grad for p in trained if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)]
    # In fp64 the sum is, but for the rarest roundings, the same for every cut.
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in counted:
        total += torch.linalg.vector_norm(gradient).double().square()
    dist.all_reduce(total, group=group)
    nn.utils.clip_grads_with_norm_(trained, longest, total.sqrt().float())
