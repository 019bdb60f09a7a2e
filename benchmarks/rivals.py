"""What only the bench runs: the reference example, torch's own pipeline, and a plain PyTorch loop.

    RANK=0 WORLD_SIZE=2 ... python -m benchmarks.rivals reference DIRECTORY STEPS CUT

Each is what its users would write, and no more. All start from the same weights, see the same images in the same
order and update with the same SGD, so their losses must agree. How ranks are started is in ``benchmarks.contest``.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils.data import DataLoader, Dataset

from benchmarks.contest import SEED
from pipetutor.core import records
from pipetutor.core.engine import own_device
from pipetutor.core.layers import build, join_layers
from pipetutor.core.torch_engine import build_optimizer
from pipetutor.data import loader
from pipetutor.data.fetch import DATA_DIR
from pipetutor.system.uncompiled import torchvision

Step = Callable[[], torch.Tensor]  # trains one step and returns its mean loss


@dataclass(frozen=True)
class Task:
    """What one rank of a rival is to train.

    Attributes:
        steps: train batches.
        train_batch: images in each.
        micro_batch: images in a micro-batch.
        config: DeepSpeed's.
        cut: the bounds of torch's pipeline.
    """

    steps: int
    train_batch: int
    micro_batch: int
    config: dict[str, Any]
    cut: str

    @property
    def micro_batches(self) -> int:
        """M, micro-batches a step."""
        return self.train_batch // self.micro_batch


def _trainset() -> Any:
    return loader.load("synthetic", True, dist.get_rank(), DATA_DIR)


def _batches(task: Task, dataset: Dataset[Any]) -> Iterator[list[torch.Tensor]]:
    found = loader.micro_batches(dataset, task.micro_batch, 1, 0, SEED, own_device())
    return ([part.to(own_device()) for part in batch] for batch in found)


class InOrder(Dataset[Any]):
    """The training set in the order of ``EpochSampler``, for the reference's sampler, which does not shuffle."""

    def __init__(self, trainset: Any, task: Task):
        sampler = loader.EpochSampler(trainset, 1, 0, SEED, loader.Position())
        full = len(trainset) // task.micro_batch * task.micro_batch
        passes = itertools.chain.from_iterable(list(sampler)[:full] for _ in itertools.count())
        # A step more than is trained: its loaders are to work ahead in the last step as in every other.
        self._order = list(itertools.islice(passes, (task.steps + 1) * task.train_batch))
        self._trainset = trainset

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        return self._trainset[self._order[index]]


def reference_engine(task: Task) -> Any:
    """Do what ``train_pipe`` of DeepSpeedExamples' training/pipeline_parallelism/train.py does.

    What is not the reference's: gloo and no ``torch.cuda.set_device`` where there is no GPU for every rank; SGD (see
    ``benchmarks.contest``), DeepSpeed's default clipping off, dropout 0 and the order of images, so that losses can
    be compared.
    """
    torch.manual_seed(SEED)
    deepspeed.runtime.utils.set_random_seed(SEED)
    net = torchvision.models.AlexNet(num_classes=10, dropout=0.0)
    layers = [*net.features, net.avgpool, lambda x: torch.flatten(x, 1), *net.classifier]
    net = PipelineModule(
        layers=layers,
        loss_fn=nn.CrossEntropyLoss(),
        num_stages=dist.get_world_size(),
        partition_method="parameters",
        activation_checkpoint_interval=0,
    )
    engine, *_ = deepspeed.initialize(
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        training_data=InOrder(_trainset(), task),
        config=task.config | {"gradient_clipping": 0.0},
    )
    return engine


def reference(task: Task) -> Step:
    """Return the step of the reference example."""
    return reference_engine(task).train_batch


def torch_1f1b(task: Task) -> Step:
    """Return the step of ``torch.distributed.pipelining`` over gloo or NCCL, with our cut.

    A step of torch takes a whole batch, so the first stage loads all of it first; the last one loads labels alone.
    """
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    torch.manual_seed(SEED)
    bounds = [int(bound) for bound in task.cut.split(",")]
    layers = join_layers(build("alexnet", dropout=0))[bounds[rank] : bounds[rank + 1]]
    if rank and isinstance(layers[0], nn.ReLU):
        layers[0].inplace = False  # what was received gets a gradient
    module = nn.Sequential(*layers).to(own_device())
    stage = PipelineStage(module, rank, last + 1, own_device())
    schedule = Schedule1F1B(stage, task.micro_batches, loss_fn=nn.functional.cross_entropy)
    optimizer = build_optimizer(task.config, list(module.parameters()))
    batches = _batches(task, loader.Labels(_trainset()) if rank else _trainset())

    def step() -> torch.Tensor:
        losses: list[torch.Tensor] = []
        if rank in (0, last):
            loaded = list(itertools.islice(batches, task.micro_batches))
        images = [(images,) for images, _ in loaded] if rank == 0 else None
        labels = [labels for _, labels in loaded] if rank == last else None
        schedule.step(arg_mbs=images, target_mbs=labels, losses=losses, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        loss = torch.stack(losses).detach().mean() if rank == last else torch.zeros((), device=own_device())
        dist.broadcast(loss, last)
        return loss

    return step


def plain(task: Task) -> Step:
    """Return the step of one process without any pipeline; started several times, none knows of the others."""
    torch.manual_seed(SEED)
    model = build("alexnet", dropout=0).to(own_device())
    optimizer = build_optimizer(task.config, list(model.parameters()))
    batches = _batches(task, _trainset())

    def step() -> torch.Tensor:
        total = torch.zeros((), device=own_device())
        for images, labels in itertools.islice(batches, task.micro_batches):
            loss = nn.functional.cross_entropy(model(images), labels)
            (loss / task.micro_batches).backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total / task.micro_batches

    return step


def _loading(task: Task, *sources: Iterator[Any]) -> Step:
    def step() -> torch.Tensor:
        for _ in range(task.micro_batches):
            for source in sources:
                next(source)
        return torch.zeros(())

    return step


def load_reference(task: Task) -> Step:
    """Return a step that only loads, as both ends of the reference's pipeline do: each transforms every image."""
    dataset = InOrder(_trainset(), task)
    loaders = [DataLoader(dataset, batch_size=task.micro_batch) for _ in range(2)]
    return _loading(task, *map(iter, loaders))


def load(task: Task) -> Step:
    """Return a step that only loads, as ours do: images on the first stage, labels on the last one."""
    pixels = loader.Pixels(_trainset())
    return _loading(task, _batches(task, pixels), _batches(task, loader.Labels(pixels)))


RIVALS: dict[str, Callable[[Task], Step]] = {
    "reference": reference,
    "torch_default": torch_1f1b,
    "torch": torch_1f1b,
    "plain": plain,
    "limit": plain,
    "load_reference": load_reference,
    "load": load,
}


def join() -> None:
    """Join the other ranks, which were started as DeepSpeed's launcher starts them."""
    rank = os.environ["LOCAL_RANK"] = os.environ["RANK"]
    # As in pipetutor.train: DeepSpeed would compile a shared-memory all-reduce here.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    cuda = deepspeed.get_accelerator().device_name() == "cuda"
    if cuda:
        torch.cuda.set_device(int(rank))
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo")


def run(rival: str, directory: Path, steps: int, cut: str) -> None:
    """Train one rank, and write steps.jsonl as ``pipetutor.train`` does.

    Args:
        rival: a name of ``RIVALS``.
        directory: of the run; holds config.json.
        steps: train batches.
        cut: see ``Task``.
    """
    config = json.loads((directory / "config.json").read_text())
    task = Task(steps, config["train_batch_size"], config["train_micro_batch_size_per_gpu"], config, cut)
    writer = records.StepWriter(directory if dist.get_rank() == 0 else None, task.train_batch)
    step = RIVALS[rival](task)
    for number in range(1, steps + 1):
        if rival == "limit":
            dist.barrier()  # each step runs while the others run theirs
        begin = time.perf_counter()
        loss = float(step())
        seconds = torch.tensor(time.perf_counter() - begin, device=own_device())
        if rival == "limit":
            dist.all_reduce(seconds)
            seconds /= dist.get_world_size()
        writer.write(number, loss, float(seconds))
    dist.barrier()
    dist.destroy_process_group()  # its threads, still there when the process ends, can end it with SIGABRT


if __name__ == "__main__":
    join()
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
