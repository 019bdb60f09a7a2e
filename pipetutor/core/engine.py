"""What the loop, evaluation, checkpoints, traces and the certificate need of an engine.

Three classes have it: ``DataParallel`` and ``Pipeline`` of ``core.deepspeed_engines``, and ``TorchPipeline`` of
``core.torch_engine``. How a step is trained, the loop is told beside it: a pipeline's ``train_batch``, or what
``train_base`` writes out. A micro-batch is a list of two tensors, inputs and labels.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipetutor.core.batch import Batch
from pipetutor.core.observer import Peers
from pipetutor.schedule.orders import Instruction

__all__ = ["Batches", "Engine", "Kept", "own_device", "say"]

Batches = Iterator[list[torch.Tensor]]
Before = Callable[[Instruction, Peers], None]
After = Callable[[], None]


class Kept(NamedTuple):
    """What a checkpoint keeps of one tensor of the model, all of it whole and none of it in 16 bits.

    Attributes:
        name: in torchvision's ``state_dict``.
        weight: the parameter, or the buffer.
        parts: the optimizer's state of it: ``exp_avg``, ``step`` and so on.
    """

    name: str
    weight: torch.Tensor
    parts: dict[str, torch.Tensor]


class Engine(Protocol):
    """One rank's engine: the whole model data-parallel, or some of its stages.

    Attributes:
        device: where it computes.
        batch: the batch arithmetic, with the number of replicas.
        replica: which data-parallel copy of the model this rank belongs to, from 0 on.
        is_first: whether it holds the model's first layer, which takes images.
        blocking: whether it sends and receives with calls that return once the message is there.
        optimizer: torch's or DeepSpeed's.
        scheduler: of the learning rate; None without one.
        loss_fn: of the model; takes what its last layer gives, and labels.
    """

    device: torch.device
    batch: Batch
    replica: int
    is_first: bool
    blocking: bool
    optimizer: Any
    scheduler: Any
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def observe(self, before: Before, after: After) -> None:
        """Have something called ahead of everything that the engine executes, and behind it.

        One instruction may be begun from within another, which it ends: ``before`` may be called twice in a row.

        Args:
            before: gets the instruction, and the ranks that it cannot end without.
            after: called once it is executed.
        """

    def feed(self, micro_batches: Batches) -> Batches:
        """Return what the engine is to read in training: these micro-batches, with each load an instruction."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers that this rank holds, by the names of torchvision's ``state_dict``.

        The tensors are the engine's own. Over the stages of a pipeline the names are all of the model's, each once.
        """

    def logits(self, micro_batches: Batches, count: int) -> list[torch.Tensor]:
        """Compute forward alone, in evaluation mode, with the buffers of replica 0.

        Args:
            micro_batches: to read.
            count: of micro-batches.

        Returns:
            The logits of each micro-batch, on a rank that holds the model's last layer; none on any other.
        """

    def kept(self) -> Iterator[Kept]:
        """Return what a checkpoint is to keep of this rank's tensors; every rank reads all of it at the same time.

        Of what several ranks hold, one of them or all return it.
        """

    def load(self, kept: Iterable[Kept], step: int) -> None:
        """Go on from a checkpoint.

        Args:
            kept: of all tensors of this rank's ``state``, with whatever number of stages and replicas it was saved.
            step: after which it stands.
        """


def say(line: str) -> None:
    """Print on the job's first rank alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)


def own_device() -> torch.device:
    """Return the device of this rank."""
    return torch.device(get_accelerator().current_device_name())


def others() -> tuple[int, ...]:
    """Return all ranks of the job but this one."""
    return tuple(rank for rank in range(dist.get_world_size()) if rank != dist.get_rank())
