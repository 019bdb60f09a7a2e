"""Runs that others have published, beside what the planner predicts for them: with the error as it is.

Narayanan et al., *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM*, arXiv:2104.04473,
table 1: GPT models on up to 384 DGX A100, with activations recomputed, the interleaved schedule and messages in T
parts. Sequences have 2048 tokens, the vocabulary 51200. FLOP/s are those of eq. 3, which counts what is recomputed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipetutor.planner.cluster import Cluster
from pipetutor.planner.decoder import Decoder
from pipetutor.planner.layout import Choice, Layout
from pipetutor.planner.search import search
from pipetutor.planner.transformers import Transformer

__all__ = ["MEGATRON", "Prediction", "Published", "efficiency", "predict", "table"]


class Published(NamedTuple):
    """A row of the table: T, P, GPUs, global batch, and teraFLOP/s of each GPU."""

    model: str
    tensor: int
    stages: int
    devices: int
    batch: int
    teraflops: float


MEGATRON = (
    Published("megatron-1.7b", 1, 1, 32, 512, 137),
    Published("megatron-3.6b", 2, 1, 64, 512, 138),
    Published("megatron-7.5b", 4, 1, 128, 512, 142),
    Published("megatron-18b", 8, 1, 256, 1024, 135),
    Published("megatron-39b", 8, 2, 512, 1536, 138),
    Published("megatron-76b", 8, 4, 1024, 1792, 140),
    Published("megatron-145b", 8, 8, 1536, 2304, 148),
    Published("megatron-310b", 8, 16, 1920, 2160, 155),
    Published("megatron-530b", 8, 35, 2520, 2520, 163),
    Published("megatron-1t", 8, 64, 3072, 3072, 163),
)


class Prediction(NamedTuple):
    """A published run, the choice that is taken for it, and the teraFLOP/s of each GPU that are predicted."""

    run: Published
    choice: Choice
    teraflops: float

    @property
    def error(self) -> float:
        """Share by which the prediction is above what was published; negative: below."""
        return self.teraflops / self.run.teraflops - 1


@dataclass(frozen=True)
class _Run(Decoder):
    """A published run: the table leaves open the size of a micro-batch, and the chunks."""

    stages: int

    def layouts(self) -> Iterator[Layout]:
        for layout in super().layouts():
            if (layout.stages, layout.recompute, layout.zero_stage) == (self.stages, True, 0):
                yield layout


def predict(run: Published, share: float) -> Prediction:
    """Predict a published run, with its own T, P and D.

    Args:
        run: a row of the table.
        share: of the data sheet's FLOP/s that matrix products reach.
    """
    cluster = replace(Cluster.parse("dgx-a100"), hosts=run.devices // 8, efficiency=share)
    model, schedules = Transformer.parse(run.model), ("1f1b", "interleaved_1f1b")
    problem = _Run(model, cluster, run.batch, run.tensor, schedules, run.stages)
    (choice,) = search(problem, 1, ("stages",)).choices
    done = model.step_flops(run.batch, recompute=True)
    return Prediction(run, choice, done / choice.seconds / run.devices / 1e12)


def efficiency(run: Published) -> float:
    """Return the share of the data sheet's FLOP/s with which a run of a single stage is predicted as published."""
    whole = predict(run, 1.0)
    computed = whole.choice.parts["compute"] + whole.choice.parts["recompute"]
    rest = whole.choice.seconds - computed
    return computed / (whole.choice.seconds * whole.teraflops / run.teraflops - rest)


def table(predictions: list[Prediction]) -> str:
    """Return published and predicted teraFLOP/s, a line for each run."""
    lines = [
        f"{'model':14} {'T':>2} {'P':>3} {'D':>3} {'b':>2} {'v':>2} {'published':>9} {'predicted':>9} {'error':>6}"
    ]
    for one in predictions:
        run, layout = one.run, one.choice.layout
        lines.append(
            f"{run.model:14} {run.tensor:2} {run.stages:3} {layout.replicas:3} {layout.micro_batch:2} "
            f"{layout.chunks:2} {run.teraflops:9.0f} {one.teraflops:9.0f} {one.error:+6.0%}"
        )
    return "\n".join(lines)
