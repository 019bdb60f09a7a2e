"""Accuracy and mean loss over exactly the whole test set, at any number of stages and replicas.

A pipeline moves full micro-batches, and every replica must move as many as any other. What the test set
lacks to fill them is padded with its last image, and the padding is left out of the count:

    5 images, micro-batch 2, 2 replicas      replica 0:  [0 2] [4 .]
                                             replica 1:  [1 3] [. .]      . padding
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from pipetutor.core.engine import Instruction, is_pipeline, replica_of
from pipetutor.data import loader


def share(size: int, micro_batch: int, replicas: int, replica: int) -> torch.Tensor:
    """Return the images that one replica evaluates.

    Args:
        size: images in the test set.
        micro_batch: images in a micro-batch.
        replicas: data-parallel copies R.
        replica: which of them.

    Returns:
        Indices of shape (micro-batches, micro_batch); those of ``size`` and above are padding.

    >>> share(5, 2, replicas=2, replica=0).tolist()
    [[0, 2], [4, 6]]
    """
    count = -(-size // (micro_batch * replicas))
    return (torch.arange(count * micro_batch) * replicas + replica).view(count, micro_batch)


@torch.no_grad()
def evaluate(
    engine: Any, testset: Dataset[Any], before: Callable[[Instruction], None], dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Evaluate the model that the ranks hold; every rank calls this, and every rank gets the result.

    Normalisation layers use the running statistics of replica 0, which are those that a checkpoint keeps.

    Args:
        engine: a DeepSpeed engine, data-parallel or pipeline.
        testset: (image, label) pairs, with all the labels in ``targets``.
        before: called ahead of every instruction; see ``pipetutor.core.engine.observe``, which does so for pipelines.
        dtype: in which the engine takes images.

    Returns:
        ``correct`` and ``images``, counts; ``accuracy``, their ratio; ``loss``, the mean cross-entropy.
    """
    labels = torch.tensor(testset.targets)  # type: ignore[attr-defined]
    micro_batch = engine.train_micro_batch_size_per_gpu()
    indices = share(len(labels), micro_batch, engine.dp_world_size, replica_of(engine))
    real, padded = indices < len(labels), indices.clamp(max=len(labels) - 1)
    _share_statistics(engine)
    if is_pipeline(engine):
        logits = _through_stages(engine, testset, padded, dtype)
    else:
        engine.eval()
        logits = []
        for number, (images, _) in enumerate(
            loader.Loader(testset, padded.flatten().tolist(), micro_batch, engine.device, dtype)
        ):
            before(Instruction("ForwardPass", number))
            logits.append(engine.module(images))
        engine.train()
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    if logits:
        found = torch.cat(logits).double()[real.flatten()]
        wanted = labels[padded][real].to(found.device)
        loss = torch.nn.functional.cross_entropy(found, wanted, reduction="sum")
        sums = torch.stack([(found.argmax(1) == wanted).sum(), torch.tensor(len(wanted)).to(loss), loss]).double()
    before(Instruction("AggregateLoss", peers=[r for r in range(dist.get_world_size()) if r != dist.get_rank()]))
    dist.all_reduce(sums)
    correct, images, loss = sums.tolist()
    return {"correct": int(correct), "images": int(images), "accuracy": correct / images, "loss": loss / images}


def _through_stages(
    engine: Any, testset: Dataset[Any], indices: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Run DeepSpeed's inference schedule; return the logits of each micro-batch on the last stage, else none."""
    source = testset if engine.is_first_stage() else loader.Labels(testset)
    batches = iter(loader.Loader(source, indices.flatten().tolist(), indices.shape[1], engine.device, dtype))
    # With the loss left out, an output takes the place of a loss: all of them are kept, and one is added to a sum.
    engine.total_loss = None
    logits = engine.eval_batch(batches, compute_loss=False, reduce_output=None, num_micro_batches=len(indices))
    engine.total_loss = None
    return logits or []


def _share_statistics(engine: Any) -> None:
    if engine.dp_world_size > 1:
        ranks = engine.grid.dp_group if is_pipeline(engine) else range(dist.get_world_size())
        group = engine.mpu.get_data_parallel_group() if is_pipeline(engine) else None
        for buffer in engine.module.buffers():
            dist.broadcast(buffer, src=min(ranks), group=group)
