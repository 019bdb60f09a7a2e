"""A schedule, executed: the one page that shows how a pipeline runs whatever order it is given.

    rank 0                            rank 1
    x = inputs[m]
    y = stage(x)     --- y.data --->  x = received, a leaf that wants a gradient
    keep x, y: in flight              loss = loss_fn(stage(x))
                                      loss.backward()
    y.backward(g)    <--- x.grad ---  g = x.grad, no longer in flight

Only the order of these two halves differs from schedule to schedule, and it is data: a stream of
``pipetutor.schedule.orders`` for each rank. torch alone; ``core.torch_engine`` trains whole models.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipetutor.schedule.orders import Instruction

__all__ = ["play"]


def play(
    streams: Sequence[Sequence[Instruction]],
    modules: Mapping[int, nn.Module],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shapes: Sequence[Sequence[int]],
) -> float:
    """Compute the gradients of one step; to step the optimizer is left to the caller.

    A receive waits, a send does not. So ranks can only wait for each other in a circle if their streams do, and
    ``schedule.rules.check`` finds that beforehand. What is sent must stay as it is until it has arrived:

        F0 F1 .  B0 .  B1    B0 gets the answer to what F0 sent, which has arrived then
        .  F0 B0 F1 B1 .     what B0 sends back has no answer: it is waited for at the end

    Args:
        streams: the compute streams of all ranks. The rank whose stream runs a stage holds it.
        modules: the stages of this rank, by their numbers.
        inputs: of each micro-batch, read by stage 0.
        targets: of each micro-batch, read by the last stage.
        loss_fn: takes the last stage's output and targets; its mean over micro-batches is what is differentiated.
        shapes: of what enters each stage. A receiver must have the memory before the message comes: here it is
            told, as where all blocks are alike; an engine for any model sends the shape ahead, once.

    Returns:
        The mean loss on the rank of the last stage, 0 on others.

    >>> play(build("1f1b", 2, 4), {0: stage}, inputs, targets, F.mse_loss, [(8, 16)] * 2)  # doctest: +SKIP
    """
    rank, count = dist.get_rank(), len(inputs)
    holder = {i.stage: who for who, stream in enumerate(streams) for i in stream if i.micro_batch is not None}
    last = len(holder) - 1
    in_flight: dict[tuple[int, int], tuple[Any, ...]] = {}  # (stage, micro-batch): what its backward pass needs
    here: dict[int, torch.Tensor] = {}  # messages between two stages of this rank
    sent_back: list[dist.Work | None] = []
    total = 0.0

    def tag(kind: str, sender: int, number: int) -> int:
        """Return a number for each message: with several stages on a rank, two may be under way at once."""
        return (("output", "gradient").index(kind) * len(holder) + sender) * count + number

    def send(tensor: torch.Tensor, stage: int, tag: int) -> dist.Work | None:
        if holder[stage] == rank:
            here[tag] = tensor
            return None
        return dist.isend(tensor.contiguous(), holder[stage], tag=tag)

    def receive(shape: Sequence[int], stage: int, tag: int) -> torch.Tensor:
        if holder[stage] == rank:
            return here.pop(tag)
        tensor = torch.empty(tuple(shape))
        dist.recv(tensor, holder[stage], tag=tag)
        return tensor

    for name, stage, number in streams[rank]:
        if number is None:  # ReduceGrads or OptimizerStep
            continue
        module, key = modules[stage], (stage, number)
        if name == "ForwardPass":
            x, sending = inputs[number], None
            if stage > 0:
                x = receive(shapes[stage], stage - 1, tag("output", stage - 1, number)).requires_grad_()
            y = module(x)
            if stage < last:
                sending = send(y.detach(), stage + 1, tag("output", stage, number))
            else:
                y = loss_fn(y, targets[number]) / count
                total += y.item()
            in_flight[key] = x, y, sending
        elif name in ("BackwardPass", "BackwardInput"):
            x, y, sending = in_flight.pop(key)
            gradient = receive(y.shape, stage + 1, tag("gradient", stage + 1, number)) if stage < last else None
            if sending:
                sending.wait()
            if name == "BackwardPass":
                y.backward(gradient)
            else:
                in_flight[key] = x, y, gradient
                if stage > 0:
                    y.backward(gradient, retain_graph=True, inputs=[x])
            if stage > 0:
                sent_back.append(send(x.grad, stage - 1, tag("gradient", stage, number)))
        else:  # BackwardWeight: the way back once more. torch's own runtime keeps what the first half has found.
            x, y, gradient = in_flight.pop(key)
            y.backward(gradient, inputs=list(module.parameters()))
    for work in sent_back:
        if work:
            work.wait()
    return total
