"""What a layout of a measured model takes on the machine where it was measured, with DeepSpeed's engine."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipetutor.costs import memory, profile
from pipetutor.costs.table import LayerCosts
from pipetutor.planner.cluster import Cluster
from pipetutor.planner.layout import Layout
from pipetutor.schedule.orders import Instruction, deepspeed_1f1b
from pipetutor.schedule.simulate import Costs

__all__ = ["Measured"]


@dataclass(frozen=True)
class Measured:
    """A measured model on a cluster; see ``pipetutor.planner.search.Problem`` for what this offers.

    Attributes:
        layers: what its layers cost, and messages, and means over replicas, measured with as many ranks at once as
            a machine has; its micro-batch is the runs'.
        cluster: what it lies on: a rank on each device.
        batch: examples of the global batch B.
    """

    layers: LayerCosts
    cluster: Cluster
    batch: int

    flops = None

    @property
    def name(self) -> str:
        """What is planned."""
        return self.layers.model

    def layouts(self) -> Iterator[Layout]:
        """Yield every layout that the batch, the layers and the measured means allow, recomputing last."""
        ranks, micro_batch = self.cluster.ranks, self.layers.micro_batch
        weighted = sum(layer.parameters > 0 for layer in self.layers.layers)
        known = {1, *(replicas for replicas, *_ in self.layers.reduce)}
        for stages in range(1, min(ranks, weighted) + 1):
            replicas = ranks // stages
            if ranks % stages or self.batch % (replicas * micro_batch) or replicas not in known:
                continue
            for zero_stage in (0, 1) if replicas > 1 else (0,):
                for recompute in (False, True):
                    yield Layout(
                        *(stages, replicas, 1, micro_batch, self.batch // replicas // micro_batch),
                        recompute=recompute,
                        zero_stage=zero_stage,
                    )

    def streams(self, layout: Layout) -> Iterator[list[Instruction]]:
        """Return what each rank does; it waits for its messages."""
        for stage in range(layout.stages):
            yield list(deepspeed_1f1b(layout.stages, layout.micro_batches, stage))

    def bounds(self, layout: Layout) -> tuple[int, ...]:
        """Return the cut whose slowest stage is fastest."""
        return tuple(profile.choose(self.layers, layout.stages, layout.micro_batches, recompute=layout.recompute))

    def memory(self, layout: Layout) -> float:
        """Return the bytes that the fullest rank needs, beside those of its process."""
        rows = memory.predict(
            self.layers,
            self.bounds(layout),
            self.streams(layout),
            recompute=layout.recompute,
            replicas=layout.replicas,
            zero_stage=layout.zero_stage,
        )
        return max(row["parameters"] + row["optimizer"] + row["peak"] for row in rows)

    def costs(self, layout: Layout) -> list[Costs]:
        """Return what each stage costs; replicas are alike."""
        found = self.layers.for_bounds(
            self.bounds(layout), layout.micro_batches, replicas=layout.replicas, zero_stage=layout.zero_stage
        )
        if layout.recompute:
            again = [sum(pair) for pair in zip(found.backward_input, found.forward, strict=True)]
            found = replace(found, backward_input=again)
        return [found]

    def extra(self, layout: Layout) -> dict[str, float]:
        """Return the seconds of a step, for the mean of the ranks, that computing takes beside the useful work."""
        (costs,) = self.costs(layout)
        again = layout.micro_batches * sum(costs.forward) / layout.stages
        return {"recompute": again * layout.recompute, "tensor": 0.0}

    def sent(self, layout: Layout) -> float:
        """Return the bytes that a rank sends in a step, of the one that sends the most, where means go in rings."""
        (costs,) = self.costs(layout)
        cuts = [0.0, *costs.message_bytes, 0.0]
        rounds = (2 + layout.zero_stage) * (layout.replicas - 1) / layout.replicas
        bounds = self.bounds(layout)
        return max(
            layout.micro_batches * (cuts[stage] + cuts[stage + 1])
            + rounds * 4 * self.layers.stage(bounds[stage], bounds[stage + 1]).parameters
            for stage in range(layout.stages)
        )
