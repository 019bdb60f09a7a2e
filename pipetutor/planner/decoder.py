"""What a layout of a known transformer takes on a cluster: bounds, memory, seconds, messages, in closed forms.

Weights, gradients, activations and messages have 16 bits, Adam's step 32 (Rajbhandari et al., arXiv:1910.02054,
section 3.1), which makes for each parameter on a rank

    2 weight + 2 gradient + (4 weight + 4 + 4 moments) / (D with ZeRO-1)     bytes
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from pipetutor.planner.cluster import Cluster
from pipetutor.planner.layout import Layout, Placement
from pipetutor.planner.transformers import HALF, Transformer
from pipetutor.schedule.orders import Instruction
from pipetutor.schedule.simulate import Costs

__all__ = ["Decoder", "blocks_of"]

STATE, STEP = 12, 28  # bytes of a parameter: of the optimizer; read and written by its step


@lru_cache(maxsize=1024)
def blocks_of(blocks: int, stages: int, head: float) -> tuple[int, ...]:
    """Share equal blocks out so that the slowest stage takes the least; the last one has the head as well.

    Of cuts that are as fast, that with the most blocks on late stages is taken: early ones keep more micro-batches in
    flight.

    Args:
        blocks: L.
        stages: of the model, at most L.
        head: how many blocks the head takes as long as.

    Returns:
        Blocks of each stage, at least one but for the last, which may have the head alone.

    >>> blocks_of(24, 4, 1.5)
    (6, 6, 7, 5)
    """
    if stages == 1:
        return (blocks,)

    def slowest(last: int) -> float:
        return max(math.ceil((blocks - last) / (stages - 1)), last + head)

    last = min(reversed(range(blocks - stages + 2)), key=slowest)
    each, more = divmod(blocks - last, stages - 1)
    return (*[each] * (stages - 1 - more), *[each + 1] * more, last)


@dataclass(frozen=True)
class Decoder:
    """A known transformer on a cluster; see ``pipetutor.planner.search.Problem`` for what this offers.

    Attributes:
        model: its sizes.
        cluster: what it lies on.
        batch: examples of the global batch B.
        tensor: devices T that share each layer.
        schedules: which may be played.
    """

    model: Transformer
    cluster: Cluster
    batch: int
    tensor: int
    schedules: Sequence[str]

    @property
    def name(self) -> str:
        """What is planned."""
        return self.model.name

    @cached_property
    def flops(self) -> float:
        """FLOPs of a step on each device, recomputing not counted."""
        return self.model.step_flops(self.batch, recompute=False) / self.cluster.ranks

    def layouts(self) -> Iterator[Layout]:
        """Yield every layout that the batch and the layers allow, those that recompute behind those that do not."""
        ranks = self.cluster.ranks // self.tensor
        for stages in _divisors(ranks):
            replicas = ranks // stages
            if stages > self.model.layers or self.batch % replicas:
                continue
            for micro_batch in _divisors(self.batch // replicas):
                yield from self._orders(stages, replicas, micro_batch)

    def _orders(self, stages: int, replicas: int, micro_batch: int) -> Iterator[Layout]:
        micro_batches = self.batch // replicas // micro_batch
        for schedule in self.schedules if stages > 1 else ("1f1b",):
            # zero_bubble would compute the forward pass anew for each half of a backward pass
            again = (False,) if schedule == "zero_bubble" else (False, True)
            for chunks in self._chunks(schedule, stages, micro_batches):
                for zero_stage, recompute in itertools.product((0, 1) if replicas > 1 else (0,), again):
                    yield Layout(
                        *(stages, replicas, self.tensor, micro_batch, micro_batches),
                        *(schedule, chunks, recompute, zero_stage),
                    )

    def _chunks(self, schedule: str, stages: int, micro_batches: int) -> list[int]:
        """Return the numbers of chunks with which a schedule can be played; none where it cannot.

        As in Megatron-LM, the blocks are a multiple of the stages of the model that lie interleaved.
        """
        if schedule != "interleaved_1f1b":
            return [] if schedule == "zero_bubble" and micro_batches < stages else [1]
        fitting = [number // stages for number in _divisors(self.model.layers) if number % stages == 0]
        return [chunks for chunks in fitting if chunks > 1 and micro_batches % stages == 0]

    def streams(self, layout: Layout) -> Iterator[list[Instruction]]:
        """Return what each rank does; messages go in the background."""
        return layout.streams()

    def _blocks(self, layout: Layout) -> np.ndarray:
        """Return the blocks of each stage of the model."""
        block = (3 + layout.recompute) * (self.model.product_flops(1) + self.model.attention_flops(1))
        head = 3 * self.model.head_flops(1) / block
        return np.array(blocks_of(self.model.layers, layout.stages * layout.chunks, head))

    def bounds(self, layout: Layout) -> tuple[int, ...]:
        """Return the cut of the flat list: embedding, positions, blocks, norm, head."""
        inner = np.cumsum(self._blocks(layout))[:-1] + 2
        return (0, *map(int, inner), self.model.layers + 4)

    def _parameters(self, layout: Layout) -> np.ndarray:
        """Return the parameters of each stage of the model, all T devices together."""
        found = self._blocks(layout) * self.model.block_parameters
        if len(found) == 1:
            return np.array([self.model.parameters])
        found[0] += self.model.first_parameters
        found[-1] += self.model.last_parameters
        return found

    def memory(self, layout: Layout) -> float:
        """Return the bytes that the fullest rank needs."""
        share = layout.replicas if layout.zero_stage else 1
        each = 2 * HALF + STATE / share
        state = self._parameters(layout).reshape(-1, layout.stages).sum(axis=0) * each / layout.tensor
        block = self.model.block_bytes(layout.micro_batch, layout.tensor)
        again = block if layout.recompute else 0.0  # of the block that is computed once more
        return float((state + self.live(layout) + again).max())

    def kept(self, layout: Layout) -> np.ndarray:
        """Return the bytes that each stage of the model keeps of a micro-batch from forward to backward."""
        examples, model = layout.micro_batch, self.model
        block = model.output_bytes(examples) if layout.recompute else model.block_bytes(examples, layout.tensor)
        found = self._blocks(layout) * float(block)
        found[0] += model.first_bytes(examples)
        found[-1] += model.last_bytes(examples, layout.tensor)
        return found

    def live(self, layout: Layout) -> np.ndarray:
        """Return the bytes of activations that each rank keeps at its fullest."""
        kept = self.kept(layout)
        if layout.chunks == 1:
            return kept * list(layout.in_flight)
        stages, chunks, micro_batches = layout.stages, layout.chunks, layout.micro_batches
        number = np.arange(chunks * micro_batches)
        chunk = number // stages % chunks
        peaks = []
        for rank in range(stages):  # as interleaved_1f1b orders them: so many forwards ahead, then in turn
            ahead = min((chunks - 1) * stages + 2 * (stages - 1 - rank), len(number))
            sizes = kept[rank::stages]
            added, freed = np.cumsum(sizes[chunk]), np.cumsum(sizes[chunks - 1 - chunk])
            before = np.concatenate([np.zeros(ahead + 1), freed])[: len(number)]  # freed ahead of each forward
            peaks.append((added - before).max())
        return np.array(peaks)

    def _all_reduce(self, layout: Layout) -> float:
        """Return the seconds in which the T devices of a layer add up what it hands on."""
        if layout.tensor == 1:
            return 0.0
        return self.cluster.link(False).ring(layout.tensor, self.model.output_bytes(layout.micro_batch))

    def _gather(self, layout: Layout) -> float:
        """Return the seconds in which T devices put together the message of which each received a part."""
        if layout.tensor == 1:
            return 0.0
        size = self.model.output_bytes(layout.micro_batch) / layout.tensor
        return (layout.tensor - 1) * self.cluster.link(False).seconds(size)

    def costs(self, layout: Layout) -> list[Costs]:
        """Return what each stage of the model costs, for each kind of replica; see ``Placement.kinds``.

        A layer on T devices adds up what it hands on twice forward and twice backward, and a message is sent in T
        parts (arXiv:2104.04473, sections 2.3 and 4.1). ReduceGrads holds the mean over the replicas, that of the two
        copies of the embedding, and with ZeRO-1 the gathering of weights, as DeepSpeed's engine takes them.
        """
        model, cluster, examples = self.model, self.cluster, layout.micro_batch
        blocks, added, gathered = self._blocks(layout), self._all_reduce(layout), self._gather(layout)
        product, attention, head = (
            cluster.seconds(count / layout.tensor)
            for count in (model.product_flops(examples), model.attention_flops(examples), model.head_flops(examples))
        )
        passing = product + attention + 2 * added
        forward, weight = blocks * passing, blocks * product
        inputs = blocks * (product + 2 * attention + 2 * added + layout.recompute * passing)
        forward[0] += added
        forward[-1] += head
        inputs[-1] += head + added
        weight[-1] += head
        forward[1:] += gathered
        inputs[:-1] += gathered
        placed = Placement.of(layout, cluster)
        size = model.output_bytes(examples) / layout.tensor
        steps = self._parameters(layout) / layout.tensor
        means = self._means(layout, placed, steps)
        share = layout.replicas if layout.zero_stage else 1
        found = []
        for crosses in placed.kinds:
            reduce = means.copy()
            if layout.stages > 1:  # the copies of the embedding, on the first rank and the last
                tied = HALF * model.vocabulary * model.width / layout.tensor
                reduce[[0, -1]] += cluster.link(crosses[-1]).ring(2, tied)
            wires = {crossing: cluster.link(crossing).seconds(size) for crossing in {*crosses[: len(blocks) - 1]}}
            found.append(
                Costs(
                    *(forward.tolist(), inputs.tolist(), weight.tolist(), self.kept(layout).tolist()),
                    message_bytes=[wires[crosses[stage % layout.stages]] for stage in range(len(blocks) - 1)],
                    bandwidth=1.0,  # messages are given in seconds: links differ
                    optimizer=(steps * STEP / share / cluster.memory_bandwidth).tolist(),
                    all_reduce=reduce.tolist(),
                )
            )
        return found

    def _means(self, layout: Layout, placed: Placement, steps: np.ndarray) -> np.ndarray:
        """Return the seconds of the mean over the replicas, for each stage of the model."""
        if layout.replicas == 1:
            return np.zeros(len(steps))
        crossing = [placed.ring_crosses(stage) for stage in range(layout.stages)]
        rounds = 1.5 if layout.zero_stage else 1.0  # to gather is half of a mean
        return np.array(
            [
                rounds * self.cluster.link(crossing[stage % layout.stages]).ring(layout.replicas, HALF * count)
                for stage, count in enumerate(steps)
            ]
        )

    def extra(self, layout: Layout) -> dict[str, float]:
        """Return the seconds of a step, for the mean of the ranks, that computing takes beside the useful work."""
        model, cluster, examples = self.model, self.cluster, layout.micro_batch
        each = layout.micro_batches / layout.stages
        product = cluster.seconds((model.product_flops(examples) + model.attention_flops(examples)) / layout.tensor)
        added, cuts = self._all_reduce(layout), layout.stages * layout.chunks - 1
        times = (4 + 2 * layout.recompute) * model.layers + 2
        return {
            "recompute": each * layout.recompute * model.layers * product,
            "tensor": each * (times * added + 2 * cuts * self._gather(layout)),
        }

    def sent(self, layout: Layout) -> float:
        """Return the bytes that a device sends in a step, of the rank that sends the most."""
        tensor, parameters = layout.tensor, self._parameters(layout) / layout.tensor
        blocks, size = self._blocks(layout), float(self.model.output_bytes(layout.micro_batch))
        added = 2 * (tensor - 1) / tensor * size
        crossing = np.full(len(blocks), 2.0) * (layout.stages > 1)
        crossing[[0, -1]] -= layout.stages > 1
        passing = (size / tensor + (tensor - 1) / tensor * size) * crossing
        passing += blocks * (4 + 2 * layout.recompute) * added
        passing[0] += added
        passing[-1] += added
        rounds = (2 + layout.zero_stage) * (layout.replicas - 1) / layout.replicas
        found = layout.micro_batches * passing + rounds * HALF * parameters
        if layout.stages > 1:
            found[[0, -1]] += HALF * self.model.vocabulary * self.model.width / tensor
        return float(found.reshape(-1, layout.stages).sum(axis=0).max())


@lru_cache(maxsize=256)
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)
