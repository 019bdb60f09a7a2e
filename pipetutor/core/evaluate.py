"""Accuracy and mean loss over exactly the whole test set, at any number of stages and replicas.

A pipeline moves full micro-batches, and every replica must move as many as any other. What the test set
lacks to fill them is padded with its last image, and the padding is left out of the count:

    5 images, micro-batch 2, 2 replicas      replica 0:  [0 2] [4 .]
                                             replica 1:  [1 3] [. .]      . padding
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, default_collate

from pipetutor.core.engine import Before, Engine, others
from pipetutor.data import loader
from pipetutor.data.text import IGNORED
from pipetutor.schedule.orders import Instruction

__all__ = ["share"]

NOT_COUNTED = {"correct": None, "accuracy": None}


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
) -> dict[str, Any]:
    """Evaluate the model that the ranks hold; every rank calls this, and every rank gets the result.

    Normalisation layers use the running statistics of replica 0, which are those that a checkpoint keeps.

    Args:
        engine: whose model; it tells its own observer of its instructions.
        testset: (input, label) pairs.
        before: called ahead of the exchange that follows; see ``Engine.observe``.
        dtype: in which the engine takes inputs that are no whole numbers.

    Returns:
        ``images``, how many examples there are; ``correct``, of how many every label is the class with the highest
        logit (labels of -100 are not asked for), and ``accuracy``, the share of these: both None where labels are no
        classes; ``loss``, the mean over the examples.
    """
    batch, size = engine.batch, len(testset)  # type: ignore[arg-type]
    indices = share(size, batch.micro, batch.replicas, engine.replica)
    real, padded = indices < size, indices.clamp(max=size - 1)
    labels = loader.Labels(testset)
    source = testset if engine.is_first else labels
    batches = loader.Loader(source, padded.flatten().tolist(), batch.micro, engine.device, dtype)
    outputs = engine.logits(iter(batches), len(padded))
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    if outputs:
        found = torch.cat(outputs).double()[real.flatten()]
        wanted = default_collate([labels[index][0] for index in padded[real].tolist()]).to(found.device)
        wanted = wanted.double() if wanted.is_floating_point() else wanted
        sums[0] = len(wanted)
        sums[1] = sum(engine.loss_fn(one[None], label[None]) for one, label in zip(found, wanted, strict=True))
        if not wanted.is_floating_point() and found.dim() == wanted.dim() + 1:
            right = (found.argmax(-1) == wanted) | (wanted == IGNORED)
            sums[2:] = torch.tensor([right.view(len(wanted), -1).all(1).sum(), len(wanted)])
    before(Instruction("AggregateLoss", 0), others())
    dist.all_reduce(sums)
    images, loss, correct, classified = sums.tolist()
    counted = {"correct": int(correct), "accuracy": correct / images} if classified else NOT_COUNTED
    return counted | {"images": int(images), "loss": loss / images}
