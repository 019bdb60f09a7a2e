"""Accuracy and mean loss over exactly the whole test set, at any number of stages and replicas.

A pipeline moves full micro-batches, and every replica must move as many as any other. What the test set
lacks to fill them is padded with its last image, and the padding is left out of the count:

    5 images, micro-batch 2, 2 replicas      replica 0:  [0 2] [4 .]
                                             replica 1:  [1 3] [. .]      . padding
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from pipetutor.core.engine import Before, Engine, others
from pipetutor.data import loader
from pipetutor.schedule.orders import Instruction

__all__ = ["share"]


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
    engine: Engine, testset: Dataset[Any], before: Before, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Evaluate the model that the ranks hold; every rank calls this, and every rank gets the result.

    Normalisation layers use the running statistics of replica 0, which are those that a checkpoint keeps.

    Args:
        engine: whose model; it tells its own observer of its instructions.
        testset: (image, label) pairs, with all the labels in ``targets``.
        before: called ahead of the exchange that follows; see ``Engine.observe``.
        dtype: in which the engine takes images.

    Returns:
        ``correct`` and ``images``, counts; ``accuracy``, their ratio; ``loss``, the mean cross-entropy.
    """
    labels = torch.tensor(testset.targets)  # type: ignore[attr-defined]
    batch = engine.batch
    indices = share(len(labels), batch.micro, batch.replicas, engine.replica)
    real, padded = indices < len(labels), indices.clamp(max=len(labels) - 1)
    source = testset if engine.is_first else loader.Labels(testset)
    batches = loader.Loader(source, padded.flatten().tolist(), batch.micro, engine.device, dtype)
    logits = engine.logits(iter(batches), len(padded))
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    if logits:
        found = torch.cat(logits).double()[real.flatten()]
        wanted = labels[padded][real].to(found.device)
        loss = torch.nn.functional.cross_entropy(found, wanted, reduction="sum")
        sums = torch.stack([(found.argmax(1) == wanted).sum(), torch.tensor(len(wanted)).to(loss), loss]).double()
    before(Instruction("AggregateLoss", 0), others())
    dist.all_reduce(sums)
    correct, images, loss = sums.tolist()
    return {"correct": int(correct), "images": int(images), "accuracy": correct / images, "loss": loss / images}
