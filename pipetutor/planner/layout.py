"""A layout, which is what one chooses; where its ranks lie; and a choice, which is a layout that has been judged."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipetutor.planner.cluster import Cluster
from pipetutor.schedule.orders import Instruction, build
from pipetutor.system.kinds import counted

__all__ = ["PARTS", "SCHEDULES", "Choice", "Layout", "Placement"]

# What a step is made of, for the mean of the ranks: useful work, forward passes once more, all-reduces within layers,
# waiting, messages between stages, the mean of gradients over the replicas, the optimizer.
PARTS = ("compute", "recompute", "tensor", "bubble", "waiting", "messages", "all-reduce", "optimizer")
# Those of ``pipetutor.schedule.orders`` for which the planner knows how much is in flight, and a lower bound.
SCHEDULES = ("naive", "gpipe", "1f1b", "interleaved_1f1b", "zero_bubble")


@dataclass(frozen=True)
class Layout:
    """How a model lies on a cluster, and how its step is played.

    Attributes:
        stages: ranks P of a pipeline.
        replicas: copies D of it.
        tensor: devices T that share each layer of a rank.
        micro_batch: examples b.
        micro_batches: M, of each replica and step.
        schedule: one of ``SCHEDULES``.
        chunks: stages of the model on each rank.
        recompute: whether forward passes are computed once more to go backward.
        zero_stage: with 1, each replica steps a share of the weights.
    """

    stages: int
    replicas: int
    tensor: int
    micro_batch: int
    micro_batches: int
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: bool = False
    zero_stage: int = 0

    @property
    def in_flight(self) -> Iterator[int]:
        """Micro-batches that each rank keeps at most, where it has one stage of the model.

        As ``pipetutor.schedule.orders`` says: one where each goes all the way, all of them in GPipe, P - r on rank
        r of 1F1B, and P on each rank of a zero-bubble schedule.
        """
        ahead = {"naive": lambda rank: 1, "gpipe": lambda rank: self.micro_batches}
        ahead |= {"1f1b": lambda rank: self.stages - rank, "zero_bubble": lambda rank: self.stages}
        return (min(ahead[self.schedule](rank), self.micro_batches) for rank in range(self.stages))

    def streams(self) -> Iterator[list[Instruction]]:
        """Return the schedule's compute streams."""
        yield from build(self.schedule, self.stages, self.micro_batches, self.chunks)

    def __str__(self) -> str:
        order = self.schedule + (f" of {self.chunks} chunks" if self.chunks > 1 else "")
        tensor = f" x {self.tensor} (tensor)" if self.tensor > 1 else ""
        rest = [f"{counted(self.micro_batches, 'micro-batch')} of {self.micro_batch}", order]
        rest += ["recomputing"] * self.recompute + [f"ZeRO-{self.zero_stage}"] * bool(self.zero_stage)
        grid = f"{counted(self.stages, 'stage')} x {counted(self.replicas, 'replica')}{tensor}"
        return ", ".join([grid, *rest])


@dataclass(frozen=True)
class Placement:
    """Where ranks lie, as DeepSpeed numbers them: the replicas of a stage side by side, hosts filled one by one.

        2 stages x 3 replicas on hosts of 2 devices:   stage 0      stage 1
                                                       0 1 | 2   0 | 1 2
                                                       host 0  host 1  host 2

    The T devices that share a rank's layers come first of all, on one host.

    Attributes:
        stages: P.
        replicas: D.
        places: ranks of a host: its devices, divided by T.

    >>> [Placement(2, 3, 2).host(stage, replica) for stage in range(2) for replica in range(3)]
    [0, 0, 1, 1, 2, 2]
    """

    stages: int
    replicas: int
    places: int

    @classmethod
    def of(cls, layout: Layout, cluster: Cluster) -> "Placement":
        """Place a layout on a cluster, whose devices T divides."""
        return cls(layout.stages, layout.replicas, cluster.devices // layout.tensor)

    def host(self, stage: int, replica: int) -> int:
        """Return the host of a rank."""
        return (stage * self.replicas + replica) // self.places

    def crossings(self, replica: int) -> tuple[bool, ...]:
        """Say for each rank of a replica whether the next one, of the last the first, is on another host."""
        hosts = [self.host(stage, replica) for stage in range(self.stages)]
        return tuple(here != there for here, there in zip(hosts, [*hosts[1:], hosts[0]], strict=True))

    @cached_property
    def kinds(self) -> list[tuple[bool, ...]]:
        """The crossings of the replicas, each kind once: replicas alike in them take the same time."""
        if self.replicas >= self.places or self.places % self.replicas == 0:
            return [self.crossings(0)]
        return list(dict.fromkeys(map(self.crossings, range(self.replicas))))

    def ring_crosses(self, stage: int) -> bool:
        """Whether the replicas of a stage lie on more than one host, so that their ring crosses the link between."""
        return self.host(stage, 0) != self.host(stage, self.replicas - 1)


@dataclass(frozen=True)
class Choice:
    """A layout that the simulator has played.

    Attributes:
        layout: of the ranks and their step.
        bounds: of the stages of the model: layer indices, as in ``launch``.
        seconds: of a step.
        parts: seconds of ``PARTS``, which add up to the step.
        sent: bytes that a rank sends in a step, at most.
        memory: bytes that a rank needs, at most.
        flops: FLOP/s of each device, recomputing not counted; None where costs were measured.
        model: its name.
    """

    layout: Layout
    bounds: tuple[int, ...]
    seconds: float
    parts: dict[str, float]
    sent: float
    memory: float
    flops: float | None
    model: str

    @property
    def idle(self) -> float:
        """Share of the step that ranks wait, on average: in the bubble, or for uneven stages and late messages."""
        return (self.parts["bubble"] + self.parts["waiting"]) / self.seconds

    @property
    def examples_per_second(self) -> float:
        """Examples that the cluster trains on in a second."""
        return self.layout.replicas * self.layout.micro_batch * self.layout.micro_batches / self.seconds

    def options(self) -> dict[str, Any]:
        """Return what ``launch`` is to be given for this choice, the config among it.

        >>> launch(**plan(costs, "hosts=1,devices=2,memory=4GB", 64).best.options())  # doctest: +SKIP
        """
        layout = self.layout
        config: dict[str, Any] = {
            "train_batch_size": layout.micro_batch * layout.micro_batches * layout.replicas,
            "train_micro_batch_size_per_gpu": layout.micro_batch,
        }
        if layout.zero_stage:
            config["zero_optimization"] = {"stage": layout.zero_stage}
        return {
            "stages": layout.stages,
            "replicas": layout.replicas,
            "model": self.model,
            "partition": ",".join(map(str, self.bounds)),
            "recompute": layout.recompute,
            "config": config,
        }
