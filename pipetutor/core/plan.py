"""What a run will be: preflight has found nothing wrong with it; trainers, loop and engines go by it. No torch."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipetutor.core.batch import Batch
from pipetutor.core.description import Data
from pipetutor.core.partition import Layer
from pipetutor.options import Options
from pipetutor.schedule.orders import SCHEDULES, Instruction, build, placement_of
from pipetutor.schedule.rules import placement
from pipetutor.schedule.text import parse

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What a run will be.

    Attributes:
        options: what was asked for.
        config: the whole DeepSpeed config.
        batch: the batch arithmetic, with the number of replicas.
        bounds: partition bounds, a layer index for each stage and one for the end; empty for the baseline, and for
            ``profile`` until ``pipetutor.costs.profile.cut`` has chosen them.
        layers: of the model.
        data: what is known of the data set.
        backend: ``nccl`` or ``gloo``.
        done: steps that the checkpoint holds from which the run resumes; 0 without one.
        notice: what was decided for the user and why; empty when nothing was.
    """

    options: Options
    config: dict[str, Any]
    batch: Batch
    bounds: list[int]
    layers: tuple[Layer, ...]
    data: Data
    backend: str
    done: int
    notice: str

    @property
    def schedule(self) -> str:
        """The name of the schedule, or one of somebody's own as a text."""
        return str(self.options.schedule)

    @cached_property
    def streams(self) -> list[list[Instruction]]:
        """The instructions of each rank of a pipeline; none for the baseline."""
        if self.schedule not in SCHEDULES:
            return parse(self.schedule)
        stages = self.options.stages
        return build(self.schedule, stages, self.batch.accumulation, self.options.chunks) if stages else []

    @cached_property
    def placement(self) -> tuple[int, ...]:
        """The rank, of a pipeline's, that holds each stage of the model; none for the baseline."""
        if self.schedule not in SCHEDULES:
            return placement(self.streams)
        return placement_of(self.schedule, self.options.stages, self.options.chunks)

    def record(self) -> dict[str, Any]:
        """Return the plan as the fields of run.json."""
        return {
            "model": self.options.model,
            "stages": self.options.stages,
            "replicas": self.batch.replicas,
            "train_batch": self.batch.train,
            "micro_batch": self.batch.micro,
            "micro_batches": self.batch.accumulation,
            "bounds": self.bounds,
            "layers": [layer.kind for layer in self.layers] if self.options.stages else [],
            "parameters": [layer.parameters for layer in self.layers],
            "backend": self.backend,
            "engine": self.options.engine,
            "schedule": self.schedule,
            "chunks": self.options.chunks,
            "done": self.done,
            "config": self.config,
            "options": self.options.record(),
        }
