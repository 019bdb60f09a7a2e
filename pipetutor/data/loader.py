"""The data sets as torch sees them, and the order in which ranks read them.

The order depends on the seed, the epoch and the number of replicas alone, never on the number of stages:
the data-parallel baseline and every pipeline train on the same images in the same sequence.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from pipetutor.data.fetch import DATA_DIR, FILES, prepare
from pipetutor.data.text import Sums
from pipetutor.system.named import Named
from pipetutor.system.uncompiled import torchvision

__all__ = [
    "EpochSampler",
    "Labels",
    "Loader",
    "Pixels",
    "Position",
    "Synthetic",
    "as_stored",
    "check_same",
    "cifar_trainset",
    "enlarge",
    "example",
    "load",
    "micro_batches",
    "some_labels",
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
TRANSFORM = torchvision.transforms.Compose(
    [
        torchvision.transforms.Resize(256),
        torchvision.transforms.CenterCrop(224),
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(MEAN, STD),
    ]
)


class Synthetic(torchvision.datasets.CIFAR10):
    """The drawn data set of ``pipetutor.data.synthetic``, read by CIFAR-10's own code."""

    base_folder = FILES["synthetic"].folder
    train_list = [["data_batch_1", FILES["synthetic"].md5["data_batch_1"]]]  # noqa: RUF012 (torchvision's form)
    test_list = [["test_batch", FILES["synthetic"].md5["test_batch"]]]  # noqa: RUF012
    meta = {  # noqa: RUF012
        "filename": "batches.meta",
        "key": "label_names",
        "md5": FILES["synthetic"].md5["batches.meta"],
    }


IMAGES = {"cifar10": torchvision.datasets.CIFAR10, "synthetic": Synthetic}


def load(dataset: str, train: bool, local_rank: int, data_dir: str | Path) -> Dataset[Any]:
    """Open a data set; inside a job, the first rank of each host fetches while the others wait.

    Hosts that share a file system wait for one another at a lock file, so one fetch serves all of them.

    Args:
        dataset: ``cifar10``, ``synthetic``, ``sums``, or a function of one's own, as ``module:function``, which takes
            ``train``.
        train: the training set, or else the test set.
        local_rank: this process's number on its host; -1 outside a job.
        data_dir: where the data is or will be.

    Returns:
        (input, label) pairs. Of images, the input is a float tensor (3, 224, 224), normalised as ImageNet is; of
        sums, both are tokens, see ``pipetutor.data.text``.

    Raises:
        pipetutor.data.fetch.DataError: the data cannot be had; see ``prepare``.
        ValueError: a function of one's own is not there, fails, or returns no data set.
    """
    named = Named.parse(dataset)
    found = None
    if local_rank <= 0:
        prepare(dataset, data_dir)
        found = _own(named, train) if named.is_own else None
    if dist.is_initialized():
        dist.barrier()
    if named.is_own:
        return _own(named, train) if found is None else found
    if dataset == "sums":
        return Sums(data_dir, train)
    return IMAGES[dataset](data_dir, train=train, transform=TRANSFORM)


def _own(named: Named, train: bool) -> Dataset[Any]:
    """Open a data set of one's own."""
    found = named.call(train)
    what = f"{named.text} returns a {type(found).__name__} for train={train}"
    try:
        size = len(found)
        pair = found[0] if size else None
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{what}, and must return a data set with a length, whose items have numbers and are (input, label) "
            f"pairs: a TensorDataset, say ({error})"
        ) from None
    if not size:
        raise ValueError(f"{what} that is empty")
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        many = f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
        raise ValueError(f"{what} whose items are no (input, label) pairs, but each a {type(pair).__name__}{many}")
    try:
        parts = default_collate([pair])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{what} whose items no micro-batch can be made of: {error}") from None
    for name, part in zip(("input", "label"), parts, strict=True):
        if not isinstance(part, torch.Tensor):
            raise ValueError(f"{what} whose {name} is a {type(part).__name__}, and must be one tensor or a number")
    return found


def example(dataset: Dataset[Any], micro_batch: int) -> list[torch.Tensor]:
    """Return inputs and labels of a micro-batch without memory, on the device ``meta``."""
    inputs, labels = default_collate([dataset[0]])
    return [torch.empty(micro_batch, *part.shape[1:], dtype=part.dtype, device="meta") for part in (inputs, labels)]


def cifar_trainset(local_rank: int, dl_path: str = DATA_DIR) -> Dataset[Any]:
    """Open CIFAR-10's training set, fetching it once where it is missing; see ``load``.

    >>> len(cifar_trainset(local_rank=-1))  # doctest: +SKIP
    50000
    """
    return load("cifar10", True, local_rank, dl_path)


class Position(NamedTuple):
    """How far the replicas together have read: what a checkpoint keeps, whatever their number.

    Attributes:
        epoch: passes completed.
        images: images read in this pass, by all replicas together.
    """

    epoch: int = 0
    images: int = 0

    def after(self, micro_batches: int, size: int, micro_batch: int, replicas: int) -> "Position":
        """Return the position once each replica has read so many micro-batches more.

        >>> Position().after(7, size=25, micro_batch=4, replicas=1)  # 6 full micro-batches a pass
        Position(epoch=1, images=4)
        """
        epoch, images = self
        while micro_batches:
            left = (size - images) // replicas // micro_batch
            taken = min(left, micro_batches)
            micro_batches -= taken
            epoch, images = (epoch + 1, 0) if taken == left else (epoch, images + taken * micro_batch * replicas)
        return Position(epoch, images)


class EpochSampler(DistributedSampler[int]):
    """Shuffles anew for every pass, of itself: nobody has to call ``set_epoch``.

    Each replica reads every R-th image of one common permutation, so R replicas together take the same
    images in a step as one replica would, until a pass ends: what does not fill all replicas is dropped.
    A first pass that begins in the middle gives what is left of it.
    """

    def __init__(self, dataset: Dataset[Any], replicas: int, replica: int, seed: int, start: Position):
        super().__init__(dataset, 1, 0, shuffle=True, seed=seed)
        self._replicas, self._replica, self._skip = replicas, replica, start.images
        self.set_epoch(start.epoch)

    def __iter__(self) -> Iterator[int]:
        left = list(super().__iter__())[self._skip :]
        self._skip = 0
        self.set_epoch(self.epoch + 1)
        return iter(left[self._replica : len(left) // self._replicas * self._replicas : self._replicas])


class Pixels(Dataset[Any]):
    """The images of a data set as they are stored, 8 bits a channel, which ``enlarge`` makes a network's input of."""

    def __init__(self, dataset: Dataset[Any]):
        self._images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)  # type: ignore[attr-defined]
        self.targets = dataset.targets  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._images[index], self.targets[index]


def some_labels(dataset: Dataset[Any]) -> torch.Tensor:
    """Return the labels of some examples, spread over a data set."""
    labels = Labels(dataset)
    places = torch.linspace(0, len(labels) - 1, min(64, len(labels))).long().tolist()
    return default_collate([labels[place][0] for place in places])


def check_same(dataset: Dataset[Any], name: str) -> None:
    """Raise ValueError unless all ranks have the same data set, by its size and some labels; all of them call this.

    The first stage reads inputs of its own, and the last one labels: if they do not belong together, nothing fails.
    """
    mine = len(dataset), some_labels(dataset).tolist()  # type: ignore[arg-type]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if any(other != found[0] for other in found):
        sizes = sorted({size for size, _ in found})
        what = f"{sizes[0]} to {sizes[-1]} examples" if len(sizes) > 1 else "other labels"
        raise ValueError(
            f"{name} has {what} on each rank: whatever it draws needs a seed, so that each call gives the same"
        )


def as_stored(dataset: Dataset[Any]) -> Dataset[Any]:
    """Return images as they are stored, for a ``Loader`` to prepare a micro-batch at a time; other data as it is."""
    return Pixels(dataset) if isinstance(dataset, torchvision.datasets.CIFAR10) else dataset


def enlarge(images: torch.Tensor) -> torch.Tensor:
    """Do to a whole micro-batch at once what ``TRANSFORM`` does to each image, on its device, to the last bit.

    Pillow enlarges sideways, rounds to whole numbers, and does the same downwards. Each new pixel is a mixture of two
    old ones in sixteenths: such sums are exact in fp32 (and their factors in TF32), whichever kernel adds them up, in
    whichever order. torchvision's own resizing of 8-bit tensors rounds in one place or two, as the processor's
    instructions allow.

    Args:
        images: (N, 3, 32, 32), 8-bit.

    Returns:
        (N, 3, 224, 224), fp32.
    """
    each = torch.eye(32, device=images.device)[None]
    shares = interpolate(each, size=256, mode="linear")[0, :, 16:240]  # of each old pixel in the middle 224 new ones
    wide = (images.float() @ shares).add_(0.5).floor_()
    large = (shares.T @ wide).add_(0.5).floor_()
    # All three are tensors of the device: CUDA does not divide by a number, but multiplies by what is nearly 1 / 255.
    most, mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in ([255.0], MEAN, STD))
    return large.div_(most).sub_(mean).div_(std)


class Labels(Dataset[Any]):
    """The labels of a data set, each in the input's place as well: all that a stage other than the first needs."""

    def __init__(self, dataset: Dataset[Any]):
        self._dataset = dataset
        # A data set of one's own may call something else by this name.
        ours = isinstance(dataset, torchvision.datasets.CIFAR10 | Pixels | Sums)
        self._targets = dataset.targets if ours else None  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        label = self._dataset[index][1] if self._targets is None else self._targets[index]
        return label, label


class Loader:
    """Full micro-batches, as a network takes them: on its device and in its dtype.

    torch's own random numbers are left alone. Workers load ahead for a GPU only; on a CPU they would take its cores.

    Args:
        dataset: (input, label) pairs.
        sampler: the order of their indices.
        micro_batch: examples in each micro-batch.
        device: where they are needed.
        dtype: of inputs that are no whole numbers.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Any,
        micro_batch: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        cuda = device.type == "cuda"
        self._device, self._dtype, self._pixels = device, dtype, isinstance(dataset, Pixels)
        self._batches = DataLoader(
            dataset,
            batch_size=micro_batch,
            sampler=sampler,
            drop_last=True,
            num_workers=2 if cuda else 0,
            persistent_workers=cuda,
            pin_memory=cuda,
            generator=torch.Generator(),  # else each pass draws from the generator that dropout draws from
        )

    def _ready(self, batch: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs, labels = (part.to(self._device, non_blocking=True) for part in batch)
        if self._pixels:
            inputs = enlarge(inputs)
        return [inputs.to(self._dtype) if inputs.is_floating_point() else inputs, labels]

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        return map(self._ready, self._batches)  # no generator, which would hold on to the last micro-batch


def micro_batches(
    dataset: Dataset[Any],
    micro_batch: int,
    replicas: int,
    replica: int,
    seed: int,
    device: torch.device,
    start: Position = Position(),  # noqa: B008 (it cannot change)
    dtype: torch.dtype = torch.float32,
) -> Iterator[list[torch.Tensor]]:
    """Return an endless iterator of micro-batches, all of them full.

    The ragged last micro-batch of a pass is dropped: a pipeline agrees on the shape of its activations
    once, and a smaller one ends it.

    Args:
        dataset: (input, label) pairs.
        micro_batch: examples in each.
        replicas: data-parallel copies R.
        replica: which of them this is.
        seed: of the order.
        device: where training happens.
        start: where to begin; at the first pass's first example where it is not given.
        dtype: of inputs that are no whole numbers.

    Returns:
        Yields [inputs, labels], such as of images (micro_batch, 3, 224, 224) and (micro_batch).
    """
    from deepspeed.utils import RepeatingLoader  # here, so that a notebook can look at data without DeepSpeed

    sampler = EpochSampler(dataset, replicas, replica, seed, start)
    return RepeatingLoader(Loader(dataset, sampler, micro_batch, device, dtype))
