"""The ranks that ``pipetutor.costs.table`` measures with: whole micro-batches, and a clock read between two layers.

A layer timed by itself finds its inputs in the cache and its memory mapped; in a run it does not. So whole
micro-batches are run, loaded, forward and backward, and a clock is read wherever one layer ends and the next
begins. As many processes do so at once as the pipeline will have ranks, a part of a micro-batch after one
another: they compete for memory as its ranks will, which are never all at the same layer.
"""

import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from pipetutor.core import records
from pipetutor.core.accumulate import accumulate_in_place
from pipetutor.core.crossing import check_model
from pipetutor.core.model import build_model
from pipetutor.costs.measuring import MICRO_BATCHES, STEPS
from pipetutor.costs.messages import copies, means, sums, transfers, wire
from pipetutor.costs.table import LayerCost, LayerCosts
from pipetutor.data import fetch, loader
from pipetutor.processes.forks import forked, meet
from pipetutor.processes.job import ROWS, do_job

__all__: list[str] = []

REPEATS = 3
SEED = 1138
PATIENCE_SECONDS = 600

Samples = dict[str, Any]  # what was measured -> its values, one for each time


def run_micro_batch(
    layers: Sequence[nn.Module],
    images: torch.Tensor,
    labels: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[list[float], list[float], float]:
    """Run one micro-batch forward and backward, uncut, and read the clock between layers.

    On the way back autograd calls a hook ahead of what a layer recorded last. By then it is done with the layers
    behind, their parameters' gradients added up: it takes what was recorded last first, and adds at once.

        forward    | copy | layer 0 | layer 1 ... loss |
        backward          | loss ... layer 1 | layer 0 |
                                             ^ the hook of layer 0

    Args:
        layers: the flat list.
        images: the micro-batch, as loaded.
        labels: of the images.
        loss: takes the last layer's output and the labels.

    Returns:
        Seconds of each layer's forward and backward, the loss in those of the last, and seconds of the copy.
    """
    begin = time.perf_counter()
    x = images.clone()
    ends = [time.perf_counter()]
    reached: dict[int, float] = {}

    def note(index: int, _: Any) -> None:
        reached[index] = time.perf_counter()

    for index, layer in enumerate(layers):
        x = layer(x)
        if x.grad_fn is not None and index < len(layers) - 1:
            x.grad_fn.register_prehook(functools.partial(note, index))
        ends.append(time.perf_counter())
    error = loss(x, labels)
    ends[-1] = reached[len(layers) - 1] = time.perf_counter()
    error.backward()
    end = time.perf_counter()
    backward = [0.0] * len(layers)
    for index, reach in sorted(reached.items()):
        # A layer that returns its input, as dropout without a probability, shares its neighbour's hook.
        backward[index], end = max(0.0, end - reach), min(end, reach)
    return [late - early for early, late in itertools.pairwise(ends)], backward, ends[0] - begin


def look_at_memory(layers: Sequence[nn.Module], images: torch.Tensor) -> list[dict[str, Any]]:
    """Return ``parameters``, ``output_bytes``, ``kept`` and ``keeps_output`` of each layer; see ``LayerCost``."""
    owned = {p.untyped_storage().data_ptr() for layer in layers for p in (*layer.parameters(), *layer.buffers())}
    numbers: dict[int, int] = {}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[numbers.setdefault(storage.data_ptr(), len(numbers))] = storage.nbytes()
        return tensor.detach()  # keeps the storage, so that no other gets its address, but not the graph

    found = []
    x = images.clone()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in layers:
            kept.clear()
            x = layer(x)
            found.append(
                {
                    "parameters": sum(p.numel() for p in layer.parameters() if p.requires_grad),
                    "output_bytes": x.nbytes,
                    "kept": tuple(kept.items()),
                    "keeps_output": x.untyped_storage().data_ptr() in numbers,
                }
            )
    return found


def weight_shares(layers: Sequence[nn.Module], images: torch.Tensor) -> list[float]:
    """Return which share of each layer's backward is for its parameters, their gradients added up.

    The rest is for its input. It is 1 for layer 0 and 0 for a layer without parameters: each needs one of the two.
    """

    def seconds(layer: nn.Module, x: torch.Tensor) -> float:
        output = layer(x.clone())  # a copy, since a layer may work in place
        gradient = torch.ones_like(output)
        begin = time.perf_counter()
        output.backward(gradient)
        return time.perf_counter() - begin

    shares = []
    x = images
    for index, layer in enumerate(layers):
        parameters = [p for p in layer.parameters() if p.requires_grad]
        if parameters and index:
            weights = seconds(layer, x)
            for parameter in parameters:
                parameter.requires_grad_(False)
            inputs = seconds(layer, x.requires_grad_())
            for parameter in parameters:
                parameter.requires_grad_()
            shares.append(weights / (weights + inputs))
        else:
            shares.append(float(bool(parameters)))
        with torch.no_grad():
            x = layer(x.clone()).detach()
    return shares


def _rank(
    rank: int, ranks: int, model: str, dataset: str, micro_batch: int, dropout: float | None, directory: Path
) -> Samples:
    """Measure in one process, while the others do the same."""
    meet(rank, ranks, directory / "store")
    built = build_model(model, SEED, dropout=dropout)
    layers, loss = built.layers, built.loss_fn
    accumulate_in_place(layers)
    parameters = [p for p in built.whole.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
    trainset = loader.as_stored(loader.load(dataset, True, -1, fetch.DATA_DIR))

    def batches(source: Any) -> Iterator[list[torch.Tensor]]:
        order = loader.EpochSampler(source, 1, 0, SEED, loader.Position())
        one_pass = loader.Loader(source, order, micro_batch, _CPU)
        return itertools.chain.from_iterable(itertools.repeat(one_pass))

    _CPU = torch.device("cpu")
    images_of, labels_of = batches(trainset), batches(loader.Labels(trainset))
    images = next(images_of)[0]
    memory = look_at_memory(layers, images)
    samples: Samples = defaultdict(list, memory=memory, input_bytes=images.nbytes, threads=torch.get_num_threads())
    seconds = 0.0
    for step in range(-1, STEPS):  # the step before the first warms up
        dist.barrier()
        time.sleep(seconds * rank / ranks)
        for number in range(MICRO_BATCHES if step >= 0 else 2):
            begin = time.perf_counter()
            images = next(images_of)[0].clone()
            middle = time.perf_counter()
            labels = next(labels_of)[1]
            loaded = time.perf_counter()
            forward, backward, copy = run_micro_batch(layers, images, labels, loss)
            seconds = time.perf_counter() - begin
            if step >= 0:
                samples["load_images"].append(middle - begin)
                samples["load_labels"].append(loaded - middle)
                samples["forward"].append(forward)
                samples["later" if number else "first"].append(backward)
                samples["copy"].append(copy / images.nbytes)
                if rank == 0:
                    records.append(directory / ROWS, {"seconds": seconds})
        begin = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 0:
            samples["optimizer"].append((time.perf_counter() - begin) / count)
    samples["share"] = [weight_shares(layers, images) for _ in range(REPEATS)]
    sizes = sorted({4096, *(layer["output_bytes"] for layer in memory)})
    samples["sums"], samples["copies"] = sums(rank, ranks), copies()
    samples["transfers"] = transfers(rank, sizes) if ranks > 1 else []
    return dict(samples)


def work(directory: Path, model: str, dataset: str, micro_batch: int, ranks: int, dropout: float | None) -> None:
    """Fork the measuring ranks, and write what they found; run by ``costs.measuring`` in a process of its own.

    Raises:
        ValueError: model and data do not fit each other or a pipeline.
    """
    outline, trainset = build_model(model, held=()), loader.load(dataset, True, -1, fetch.DATA_DIR)
    labels = loader.some_labels(trainset)
    check_model(outline, loader.example(trainset, len(labels))[0], labels)
    about = outline.about()
    asked = (ranks, model, dataset, micro_batch, dropout, directory)
    works = [functools.partial(_rank, rank, *asked) for rank in range(ranks)]
    found = forked(works, directory / "logs" / "costs.log", PATIENCE_SECONDS)

    def median(name: str) -> Any:
        return np.median([value for samples in found for value in samples[name]], axis=0)

    later, share = median("later"), median("share")
    saving = np.clip(later - median("first"), -share * later, share * later)
    times = zip(median("forward").tolist(), later.tolist(), share.tolist(), saving.tolist(), strict=True)
    layers = [
        LayerCost(layer.kind, forward, (1 - weight) * backward, weight * backward, saved, **memory, tied=layer.tied)
        for layer, (forward, backward, weight, saved), memory in zip(about, times, found[0]["memory"], strict=True)
    ]
    latency, bandwidth = wire(found[0]["transfers"]) if found[0]["transfers"] else (0.0, float("inf"))
    costs = LayerCosts(
        model,
        micro_batch,
        ranks,
        found[0]["threads"],
        tuple(layers),
        found[0]["input_bytes"],
        latency=latency,
        bandwidth=bandwidth,
        reduce=means(found[0]["sums"], found[0]["copies"]),
        directory=directory,
        **{name: float(median(name)) for name in ("load_images", "load_labels", "copy", "optimizer")},
    )
    costs.save()


def _work(directory: Path, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        work(directory, **asked)
    except ValueError as error:
        yield {"refusal": str(error)}


if __name__ == "__main__":
    do_job(_work)
