"""What each layer of a model costs on a machine, and what a stage does that holds some of them. No torch."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipetutor.core import records
from pipetutor.core.partition import Layer, bounds_for, parameters_of
from pipetutor.schedule.simulate import Costs
from pipetutor.system import disk
from pipetutor.system.kinds import check, list_of, whole

__all__ = ["LayerCost", "LayerCosts", "StageCost"]

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
            to nothing; negative where it takes more, for memory that later ones find there.
        parameters: trainable ones; each is 4 bytes.
        output_bytes: the message, when the model is cut behind this layer.
        kept: (number, bytes) of each storage that its backward needs, parameters aside. Two layers that keep the
            same storage, as a layer's output and the next one's input, give it the same number.
        keeps_output: whether its output is such a storage, of this layer or of one before.
        tied: what several layers have in common that hold the same parameters.
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
    tied: str = ""

    @property
    def backward(self) -> float:
        """Seconds of an ordinary backward."""
        return self.backward_input + self.backward_weight


class StageCost(NamedTuple):
    """What a stage costs for one micro-batch: seconds, and bytes as ``LayerCosts.for_bounds`` counts them."""

    load: float
    forward: float
    backward_input: float
    backward_weight: float
    activation_bytes: int
    input_bytes: int
    output_bytes: int
    parameters: int


@dataclass(frozen=True)
class LayerCosts:
    """What a model costs, layer by layer; see ``measure``.

    Attributes:
        model: its name.
        micro_batch: examples in a micro-batch.
        ranks: processes that measured at once.
        threads: of each of them.
        layers: the costs of each layer.
        input_bytes: of a micro-batch of inputs, such as images.
        load_images: seconds to load a micro-batch of inputs, on the first stage.
        load_labels: seconds to load one of labels, on the last stage.
        copy: seconds a byte, for the copy that DeepSpeed takes of each input of a stage.
        latency: seconds that the shortest message takes.
        bandwidth: bytes a second of a long one; infinite where one rank measured alone.
        optimizer: seconds a parameter, for a step of fused AdamW and the release of the gradients.
        directory: where ``costs.json`` holds the same.
        reduce: (R, latency, bandwidth) of a mean over R ranks, as replicas take it of gradients, for each R that
            ``ranks`` can be divided into: seconds, and bytes of each rank a second.
        burst: bytes of a message that a link lets through at once, after a pause.
        buffer: bytes of a message that its sender leaves to the system, and goes on.
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
    reduce: tuple[tuple[int, float, float], ...] = ()
    burst: float = 0.0
    buffer: float = 0.0

    def for_bounds(
        self, bounds: Sequence[int], micro_batches: int | None = None, *, replicas: int = 1, zero_stage: int = 0
    ) -> Costs:
        """Add the layers up to the stages of a pipeline.

        Args:
            bounds: P + 1 layer indices, such as ``run.bounds``.
            micro_batches: M, over which the first backward of a step, which adds to nothing, is averaged in; without
                it, every backward counts as a later one.

            replicas: copies R of the pipeline, which take the mean of their gradients at the end of a step.
            zero_stage: with 1, each replica steps a share of the weights, and sends it to the others, which takes
                about half as long as a mean.

        Returns:
            What a stage costs for each micro-batch. Its activation bytes are what is held from the forward to the
            backward: what autograd saves, and the input and output that DeepSpeed keeps.

        Raises:
            ValueError: the bounds do not fit the model, or ``micro_batches`` is no whole number of at least 1; or
                reductions over so many replicas were not measured.
        """
        check("bounds", bounds, list_of(whole(0)))
        kinds = [Layer(layer.kind, layer.parameters, layer.tied) for layer in self.layers]
        bounds = bounds_for(kinds, len(bounds) - 1, ",".join(map(str, bounds)))
        check("micro_batches", micro_batches, "count?")
        check("replicas", replicas, "count")
        check("zero_stage", zero_stage, [0, 1])
        stages = [self.stage(low, high, micro_batches) for low, high in itertools.pairwise(bounds)]
        reduce = [self._reduce(4 * stage.parameters, replicas) for stage in stages]
        share = replicas if zero_stage else 1
        steps = [self.optimizer * stage.parameters / share for stage in stages]
        if zero_stage:
            steps = [step + mean / 2 for step, mean in zip(steps, reduce, strict=True)]
        return Costs(
            forward=[stage.forward for stage in stages],
            backward_input=[stage.backward_input for stage in stages],
            backward_weight=[stage.backward_weight for stage in stages],
            activation_bytes=[stage.activation_bytes for stage in stages],
            message_bytes=[stage.output_bytes for stage in stages[:-1]],
            latency=self.latency,
            bandwidth=self.bandwidth,
            burst=self.burst,
            buffer=self.buffer,
            load=[stage.load for stage in stages],
            optimizer=steps,
            all_reduce=reduce,
            tied_reduce=[self._reduce(size, 2) if size else 0.0 for size in self._tied_bytes(bounds)],
        )

    def stage(self, low: int, high: int, micro_batches: int | None = None) -> StageCost:
        """Add up the layers low ... high-1, as one stage of a pipeline.

        Args:
            low: its first layer; the stage that holds layer 0 loads images, and labels with them.
            high: the layer behind its last one; the stage that ends the model loads labels.
            micro_batches: see ``for_bounds``.
        """
        layers = self.layers[low:high]
        share = 1 / micro_batches if micro_batches else 0.0
        received = self.layers[low - 1].output_bytes if low else self.input_bytes
        kept = received + sum(dict(storage for layer in layers for storage in layer.kept).values())
        return StageCost(
            load=self.load_images if low == 0 else self.load_labels if high == len(self.layers) else 0.0,
            forward=sum(layer.forward for layer in layers) + self.copy * received,
            backward_input=sum(layer.backward_input for layer in layers),
            backward_weight=sum(layer.backward_weight - share * layer.first_saving for layer in layers),
            activation_bytes=kept + (0 if layers[-1].keeps_output else layers[-1].output_bytes),
            input_bytes=received,
            output_bytes=layers[-1].output_bytes,
            parameters=parameters_of(layers),
        )

    def _reduce(self, size: int, replicas: int) -> float:
        """Return the seconds of a mean over so many ranks, of so many bytes each."""
        known = {ranks: (latency, bandwidth) for ranks, latency, bandwidth in self.reduce}
        if replicas == 1:
            return 0.0
        if replicas not in known:
            raise ValueError(
                f"means over {replicas} ranks were not measured, but over {', '.join(map(str, known)) or 'none'}: "
                f"measure with {replicas} ranks, or a multiple of that"
            )
        latency, bandwidth = known[replicas]
        return latency + size / bandwidth

    def _tied_bytes(self, bounds: Sequence[int]) -> list[int]:
        """Return the bytes of tied parameters that each stage has a copy of, and another stage as well."""
        held = [
            {layer.tied: 4 * layer.parameters for layer in self.layers[low:high] if layer.tied}
            for low, high in itertools.pairwise(bounds)
        ]
        count = Counter(key for sizes in held for key in sizes)
        return [sum(size for key, size in sizes.items() if count[key] > 1) for sizes in held]

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

    def save(self) -> None:
        """Write them to their directory."""
        content = asdict(self)
        del content["directory"]
        records.write_json(self.directory / FILE, content)

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
        except OSError as error:
            raise ValueError(disk.cannot(f"read the costs in {directory}", error)) from None
        if content["bandwidth"] is None:  # infinite, where no rank sends: JSON has no word for it
            content["bandwidth"] = float("inf")
        content["reduce"] = tuple(
            (ranks, latency, float("inf") if bandwidth is None else bandwidth)
            for ranks, latency, bandwidth in content.get("reduce", ())
        )
        layers = [layer | {"kept": tuple(map(tuple, layer["kept"]))} for layer in content.pop("layers")]
        return cls(**content, layers=tuple(LayerCost(**layer) for layer in layers), directory=Path(directory))
