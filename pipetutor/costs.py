"""What each layer of a model costs on this machine, measured as a pipeline's ranks would run it.

    python -m pipetutor.costs --model alexnet --micro-batch 8 --ranks 2

A layer timed by itself finds its inputs in the cache and its memory mapped; in a run it does not. So whole
micro-batches are run, loaded, forward and backward, and a clock is read wherever one layer ends and the next
begins. As many processes do so at once as the pipeline will have ranks, a part of a micro-batch after one
another: they compete for memory as its ranks will, which are never all at the same layer.

Only the measuring processes load torch; what a notebook calls does not.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from pipetutor import fetch, machine, records
from pipetutor.config import read_config
from pipetutor.launch import RunFailed, watch
from pipetutor.partition import Layer, bounds_for, catalog
from pipetutor.preflight import preflight

if TYPE_CHECKING:
    import torch
    from torch import nn

STEPS, MICRO_BATCHES, REPEATS = 4, 4, 3
SEED = 1138
COPIES = 5  # of the parameters, at most, in one rank: themselves, gradients (sum and new), Adam's two moments
PATIENCE_SECONDS = 600
FILE = "costs.json"


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs for one micro-batch.

    Attributes:
        kind: its class name.
        forward: seconds; the loss is part of the last layer, and the copy that DeepSpeed takes of a stage's
            input of none.
        backward_input: seconds for the gradient of its input; 0 where nobody needs it, as for images.
        backward_weight: seconds for the gradients of its parameters, added to those of earlier micro-batches.
        first_saving: seconds that ``backward_weight`` takes less in the first micro-batch of a step, which adds
            to nothing.
        parameters: trainable ones; each is 4 bytes.
        output_bytes: the message, when the model is cut behind this layer.
        kept: (number, bytes) of each storage that its backward needs, parameters aside. Two layers that keep the
            same storage, as a layer's output and the next one's input, give it the same number.
        keeps_output: whether its output is such a storage, of this layer or of one before.
    """

    kind: str
    forward: float
    backward_input: float
    backward_weight: float
    first_saving: float
    parameters: int
    output_bytes: int
    kept: tuple[tuple[int, int], ...]
    keeps_output: bool

    @property
    def backward(self) -> float:
        """Seconds of an ordinary backward."""
        return self.backward_input + self.backward_weight


@dataclass(frozen=True)
class LayerCosts:
    """What a model costs, layer by layer; see ``measure``.

    Attributes:
        model: its name.
        micro_batch: images in a micro-batch.
        ranks: processes that measured at once.
        threads: of each of them.
        layers: the costs of each layer.
        input_bytes: of a micro-batch of images.
        load_images: seconds to load a micro-batch of images, on the first stage.
        load_labels: seconds to load one of labels, on the last stage.
        copy: seconds a byte, for the copy that DeepSpeed takes of each input of a stage.
        latency: seconds that the shortest message takes.
        bandwidth: bytes a second of a long one; infinite where one rank measured alone.
        optimizer: seconds a parameter, for a step of fused AdamW and the release of the gradients.
        directory: where ``costs.json`` holds the same.
    """

    model: str
    micro_batch: int
    ranks: int
    threads: int
    layers: tuple[LayerCost, ...] = field(repr=False)
    input_bytes: int
    load_images: float
    load_labels: float
    copy: float
    latency: float
    bandwidth: float
    optimizer: float
    directory: Path

    def for_bounds(self, bounds: Sequence[int], micro_batches: int | None = None) -> dict[str, Any]:
        """Add the layers up to the stages of a pipeline without replicas.

        Args:
            bounds: P + 1 layer indices, such as ``run.parts``.
            micro_batches: M, over which the cheaper first backward of a step is averaged in; without it, every
                backward counts as a later one.

        Returns:
            The fields of ``simulate.Costs``. Lists with an entry a stage: ``forward``, ``backward_input``,
            ``backward_weight`` and ``load``, seconds a micro-batch; ``optimizer`` and ``all_reduce``, seconds a
            step; ``activation_bytes``, what a micro-batch holds from its forward to its backward: what autograd
            saves, and the input and output that DeepSpeed keeps. ``message_bytes`` has an entry a boundary, and
            ``latency`` (seconds) and ``bandwidth`` (bytes a second) are numbers.

        Raises:
            ValueError: the bounds do not fit the model, or ``micro_batches`` is no whole number of at least 1.
        """
        kinds = [Layer(layer.kind, layer.parameters) for layer in self.layers]
        bounds = bounds_for(kinds, len(bounds) - 1, ",".join(map(str, bounds)))
        if micro_batches is not None and (not isinstance(micro_batches, int) or micro_batches < 1):
            raise ValueError(f"micro_batches is {micro_batches!r}, but must be a whole number of at least 1: 8, say")
        stages = [self.layers[low:high] for low, high in itertools.pairwise(bounds)]
        inputs = [self.input_bytes, *(stage[-1].output_bytes for stage in stages[:-1])]
        share = 1 / micro_batches if micro_batches else 0.0
        load = [0.0] * len(stages)
        load[-1] = self.load_labels
        load[0] = self.load_images  # the first stage loads labels with them, also where it is the last one
        parameters = [sum(layer.parameters for layer in stage) for stage in stages]
        return {
            "forward": [
                sum(layer.forward for layer in stage) + self.copy * received
                for stage, received in zip(stages, inputs, strict=True)
            ],
            "backward_input": [sum(layer.backward_input for layer in stage) for stage in stages],
            "backward_weight": [
                sum(layer.backward_weight - share * layer.first_saving for layer in stage) for stage in stages
            ],
            "activation_bytes": [
                received
                + sum(dict(k for layer in stage for k in layer.kept).values())
                + (0 if stage[-1].keeps_output else stage[-1].output_bytes)
                for stage, received in zip(stages, inputs, strict=True)
            ],
            "message_bytes": inputs[1:],
            "latency": self.latency,
            "bandwidth": self.bandwidth,
            "load": load,
            "optimizer": [self.optimizer * count for count in parameters],
            "all_reduce": [0.0] * len(stages),
        }

    def __str__(self) -> str:
        """Return the table: times in milliseconds, sizes in megabytes of a million bytes."""
        lines = [f"{'layer':>5} {'kind':18} {'forward':>8} {'backward':>9} {'weights':>8} {'output':>8} {'kept':>8}"]
        seen: set[int] = set()
        for index, layer in enumerate(self.layers):
            kept = {number: size for number, size in layer.kept if number not in seen}
            seen |= set(kept)
            sizes = [4 * layer.parameters, layer.output_bytes, sum(kept.values())]
            lines.append(
                f"{index:5} {layer.kind:18} {1e3 * layer.forward:8.2f} {1e3 * layer.backward:9.2f} "
                + " ".join(f"{size / 1e6:8.2f}" for size in sizes)
            )
        return "\n".join(lines)

    @classmethod
    def load(cls, directory: str | Path) -> "LayerCosts":
        """Read costs back.

        Raises:
            ValueError: the directory holds none.
        """
        try:
            content = json.loads((Path(directory) / FILE).read_text())
        except FileNotFoundError:
            raise ValueError(f"{directory} holds no costs: {FILE} is missing; measure() writes one") from None
        layers = [layer | {"kept": tuple(map(tuple, layer["kept"]))} for layer in content.pop("layers")]
        return cls(**content, layers=tuple(LayerCost(**layer) for layer in layers), directory=Path(directory))


def measure(
    model: str = "alexnet",
    micro_batch: int = 8,
    ranks: int = 2,
    *,
    dropout: float | None = None,
    runs_dir: str | Path = "runs",
) -> LayerCosts:
    """Measure what each layer costs on this machine's CPU in fp32, in processes of their own.

    The costs hold for pipelines of as many ranks as measured; nothing is left running.

    Args:
        model: ``alexnet`` or any model of ``pipetutor.partition.catalog()``.
        micro_batch: images in a micro-batch.
        ranks: processes that measure at once: the ranks that the pipeline will have.
        dropout: probability for every dropout layer; None keeps the model's own, 0 turns dropout off.
        runs_dir: where the directory with ``costs.json`` is made.

    Raises:
        ValueError: something asked for cannot work; nothing was started.
        RunFailed: a measuring process failed.

    >>> costs = measure(micro_batch=8, ranks=2)  # doctest: +SKIP
    >>> costs.for_bounds([0, 16, 22])["forward"]  # doctest: +SKIP
    [0.057, 0.023]
    """
    for name, value in {"micro_batch": micro_batch, "ranks": ranks}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, but must be a whole number of at least 1: 2, say")
    preflight(
        ranks=ranks,
        stages=ranks,
        steps=1,
        model=model,
        dataset="synthetic",
        partition="parameters",
        config=read_config({"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": 1}),
        backend="gloo",
        gpus=0,
        dropout=dropout,
    )
    needed = COPIES * 4 * sum(layer.parameters for layer in catalog()[model])
    free = psutil.virtual_memory().available
    if ranks * needed > free:
        raise ValueError(
            f"{ranks} ranks that each hold all of {model} take {ranks * needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} are free: use {max(1, free // needed)} ranks or a smaller model"
        )
    fetch.prepare("synthetic", fetch.DATA_DIR)
    directory = records.create(Path(runs_dir), "costs")
    (directory / "logs").mkdir()
    env = dict(os.environ) | {"LOCAL_SIZE": str(ranks)}
    machine.prepare_rank(env, ["--backend=gloo"])
    names = ("OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "DS_ACCELERATOR")
    arguments = str(directory), model, micro_batch, ranks, dropout
    work = f"from pipetutor.costs import _work; _work(*{arguments!r})"
    command = ["env", "CUDA_VISIBLE_DEVICES=", *(f"{name}={env[name]}" for name in names), sys.executable, "-c", work]
    rows = directory / "rows.jsonl"
    report = watch(command, directory, 0, float("inf"), rows, STEPS * MICRO_BATCHES, "micro-batches", _brief)
    if report["code"] != 0:
        log = (directory / "logs" / "launcher.log").read_text(errors="replace")
        raise RunFailed(f"the measurement ended with status {report['code']}:\n{log[-2000:]}")
    return LayerCosts.load(directory)


def _brief(row: dict[str, Any]) -> str:
    return f"{1e3 * row['seconds']:.0f} ms a micro-batch"


Samples = dict[str, Any]  # what was measured -> its values, one for each time


def run_micro_batch(
    layers: Sequence["nn.Module"], images: "torch.Tensor", labels: "torch.Tensor", loss: "nn.Module"
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


def look_at_memory(layers: Sequence["nn.Module"], images: "torch.Tensor") -> list[dict[str, Any]]:
    """Return ``parameters``, ``output_bytes``, ``kept`` and ``keeps_output`` of each layer; see ``LayerCost``."""
    from torch.autograd.graph import saved_tensors_hooks

    owned = {p.untyped_storage().data_ptr() for layer in layers for p in (*layer.parameters(), *layer.buffers())}
    numbers: dict[int, int] = {}
    kept: dict[int, int] = {}

    def pack(tensor: "torch.Tensor") -> "torch.Tensor":
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


def weight_shares(layers: Sequence["nn.Module"], images: "torch.Tensor") -> list[float]:
    """Return which share of each layer's backward is for its parameters, their gradients added up.

    The rest is for its input. It is 1 for layer 0 and 0 for a layer without parameters: each needs one of the two.
    """
    import torch

    def seconds(layer: "nn.Module", x: "torch.Tensor") -> float:
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


def _transfers(rank: int, sizes: Sequence[int]) -> list[tuple[int, float]]:
    """Send each size to and fro between ranks 0 and 1, as activation and gradient; return (bytes, seconds) a way."""
    import torch
    import torch.distributed as dist

    found = []
    for size in sizes:
        message, times = torch.zeros(size, dtype=torch.uint8), []
        for _ in range(5 * REPEATS):
            dist.barrier()
            begin = time.perf_counter()
            if rank == 0:
                dist.send(message, 1)
                dist.recv(message, 1)
            elif rank == 1:
                dist.recv(message, 0)
                message.clone()  # as DeepSpeed takes one of each activation
                dist.send(message, 0)
            times.append((time.perf_counter() - begin) / 2)
        found.append((size, statistics.median(times)))
    return found


def _rank(rank: int, ranks: int, model: str, micro_batch: int, dropout: float | None, directory: Path) -> Samples:
    """Measure in one process, while the others do the same."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from pipetutor import data
    from pipetutor.layers import build, join_layers

    meeting = dist.FileStore(str(directory / "store"), ranks)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks)
    torch.manual_seed(SEED)
    layers, loss = join_layers(build(model, dropout=dropout)), nn.CrossEntropyLoss()
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
    trainset = data.load("synthetic", True, -1, fetch.DATA_DIR)

    def batches(source: Any) -> Iterator[list[torch.Tensor]]:
        loader = data.loader(source, data.EpochSampler(source, 1, 0, SEED, data.Position()), micro_batch, _CPU)
        return itertools.chain.from_iterable(itertools.repeat(loader))

    _CPU = torch.device("cpu")
    images_of, labels_of = batches(trainset), batches(data.Labels(trainset))
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
                    records.append(directory / "rows.jsonl", {"seconds": seconds})
        begin = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 0:
            samples["optimizer"].append((time.perf_counter() - begin) / count)
    samples["share"] = [weight_shares(layers, images) for _ in range(REPEATS)]
    sizes = sorted({4096, *(layer["output_bytes"] for layer in memory)})
    samples["transfers"] = _transfers(rank, sizes) if ranks > 1 else []
    return dict(samples)


def _work(directory: str, model: str, micro_batch: int, ranks: int, dropout: float | None) -> None:
    """Fork the measuring ranks, and write what they found; run by ``measure`` in a process of its own."""
    import torchvision  # noqa: F401 (loaded once, here, and not once in every fork)

    from pipetutor.forks import forked

    path = Path(directory)
    works = [functools.partial(_rank, rank, ranks, model, micro_batch, dropout, path) for rank in range(ranks)]
    found = forked(works, path / "logs" / "costs.log", PATIENCE_SECONDS)

    def median(name: str) -> Any:
        return np.median([value for samples in found for value in samples[name]], axis=0)

    kinds = [layer.kind for layer in catalog()[model]]
    later, share = median("later"), median("share")
    saving = np.clip(later - median("first"), 0, share * later)
    times = zip(median("forward").tolist(), later.tolist(), share.tolist(), saving.tolist(), strict=True)
    layers = [
        LayerCost(kind, forward, (1 - weight) * backward, weight * backward, saved, **memory)
        for kind, (forward, backward, weight, saved), memory in zip(kinds, times, found[0]["memory"], strict=True)
    ]
    latency, bandwidth = 0.0, float("inf")
    if found[0]["transfers"]:
        sizes, ways = np.array(found[0]["transfers"]).T
        slope, latency = np.polyfit(sizes, ways, 1, w=1 / ways)  # each size counts by its relative error
        bandwidth = 1 / slope
    costs = LayerCosts(
        model,
        micro_batch,
        ranks,
        found[0]["threads"],
        tuple(layers),
        found[0]["input_bytes"],
        latency=float(latency),
        bandwidth=float(bandwidth),
        directory=path,
        **{name: float(median(name)) for name in ("load_images", "load_labels", "copy", "optimizer")},
    )
    content = dataclasses.asdict(costs)
    del content["directory"]
    records.write_json(path / FILE, content)
    records.update(path, status="finished")


def main() -> None:
    """Run ``measure`` from the command line; status 1 if it fails, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="pipetutor.costs", description="what does each layer cost here?")
    parser.add_argument("--model", default="alexnet", help="default %(default)s")
    parser.add_argument("--micro-batch", type=int, default=8, help="default %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="default %(default)s")
    parser.add_argument("--dropout", type=float, help="for every dropout layer; 0 turns dropout off")
    parser.add_argument("--runs-dir", default="runs", help="default %(default)s")
    args = parser.parse_args()
    try:
        costs = measure(args.model, args.micro_batch, args.ranks, dropout=args.dropout, runs_dir=args.runs_dir)
    except (ValueError, RunFailed) as error:
        print(f"pipetutor: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    print(costs)
    print(f"written to {costs.directory / FILE}")


if __name__ == "__main__":
    main()
