"""Where an optimizer of DeepSpeed keeps what belongs to a parameter, and how that is put together, and taken apart.

    plain, fp32     the optimizer trains the parameter itself
    16 bits         the optimizer trains a copy of it in fp32, of which the parameter is the rounding
    ZeRO, and a     all parameters of a stage lie in one row, in fp32, of which each replica trains its share:
    pipeline's
    bf16            |  weight 0  | bias 0 |      weight 1      | bias 1 |padding|
                    |<------- replica 0 ------->|<------- replica 1 ----------->|

DeepSpeed leaves a note on each parameter that says which part of it lies where in this rank's share
(``_hp_mapping``, of ``deepspeed.utils.tensor_fragment``).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Piece", "piece_of"]

NUMBERS = ("step", "mu_product")  # of an optimizer's state: one number for all entries of a tensor


@dataclass(frozen=True)
class Piece:
    """What this rank's optimizer trains of one parameter.

    Attributes:
        parameter: the model's own tensor, whole.
        trained: the tensor that the optimizer trains, under which it has its state.
        group: the replicas, which have a piece each; None where this rank has all of it.
        start: where in ``trained`` this rank's piece begins.
        first: the same in the parameter, seen as one row.
        count: entries of the piece; 0 where this rank's share of the row has nothing of the parameter.
    """

    parameter: torch.Tensor
    trained: torch.Tensor
    group: Any = None
    start: int = 0
    first: int = 0
    count: int = 0

    def keeper(self, number: int) -> bool:
        """Say whether this rank is to have parameter ``number`` of its stage put together; replicas take turns."""
        return self.group is None or dist.get_rank() == self._keeper(number)

    def _keeper(self, number: int) -> int:
        ranks = dist.get_process_group_ranks(self.group)
        return ranks[number % len(ranks)]

    def _of_trained(self, value: torch.Tensor) -> torch.Tensor:
        return value.narrow(0, self.start, self.count)

    def _of_parameter(self, value: torch.Tensor) -> torch.Tensor:
        return value.flatten().narrow(0, self.first, self.count)

    def whole(self, value: torch.Tensor, number: int) -> torch.Tensor:
        """Put together a tensor of the parameter's shape; all replicas call this.

        Args:
            value: ``trained``, or a part of its state.
            number: of the parameter; only on the rank that is its ``keeper`` is what is returned of use.
        """
        if self.group is None:
            return value
        if value.shape != self.trained.shape:
            return value.clone()  # a number that all parameters share, which a file must not
        whole = value.new_zeros(self.parameter.numel())
        self._of_parameter(whole).copy_(self._of_trained(value))
        dist.reduce(whole, self._keeper(number), group=self.group)  # each entry stands on one rank, beside zeros
        return whole.view_as(self.parameter)

    def fill_state(self, state: dict[str, torch.Tensor], part: str, value: torch.Tensor) -> None:
        """Take this rank's piece of a part of the optimizer's state.

        Args:
            state: of ``trained``.
            part: ``exp_avg``, say.
            value: that of the whole parameter.
        """
        if self.group is None or part in NUMBERS:
            state[part] = value
            return
        if part not in state:
            state[part] = torch.zeros_like(self.trained, requires_grad=False)
        self._of_trained(state[part]).copy_(self._of_parameter(value))

    def fill_weight(self, value: torch.Tensor) -> None:
        """Take this rank's piece of the weights, and the whole of them into the model."""
        self.parameter.detach().copy_(value)
        if self.group is not None:
            self._of_trained(self.trained.detach()).copy_(self._of_parameter(value))
        elif self.trained is not self.parameter:
            self.trained.detach().copy_(value)


def piece_of(optimizer: Any, tensor: torch.Tensor) -> Piece:
    """Say where the optimizer keeps what belongs to a tensor of the model.

    Args:
        optimizer: torch's, or one of DeepSpeed's around it.
        tensor: a parameter or a buffer.
    """
    if hasattr(tensor, "_hp_mapping"):
        (group,) = optimizer.param_groups
        (trained,) = group["params"]
        replicas, note = tensor._dp_group, tensor._hp_mapping  # type: ignore[attr-defined]
        if note is None:
            return Piece(tensor, trained, replicas)
        there, here = note.hp_fragment_address, note.lp_fragment_address
        return Piece(tensor, trained, replicas, there.start, here.start, here.numel)
    for parameters, copies in zip(
        getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True
    ):
        for parameter, copy in zip(parameters, copies, strict=True):
            if parameter is tensor:
                return Piece(tensor, copy)
    return Piece(tensor, tensor)
