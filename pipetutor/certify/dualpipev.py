"""DeepSpeed's DualPipeV, made an engine that the certificate can train and look into.

Of 2P stages, rank r holds r and 2P - 1 - r, and computes in the order of ``schedule.orders.dualpipev``, but with
whole backward passes (DeepSpeed 0.19.8). It is certified and not launched: its messages are collected and exchanged
in batches (``CommitP2P``), of which a trace could not tell who waits for what, and it evaluates no fewer than 2P
micro-batches.
"""

from collections.abc import Mapping

import deepspeed.pipe
import torch

from pipetutor.core.deepspeed_engines import Pipeline, PipelineModule
from pipetutor.schedule.orders import Instruction

__all__ = ["DualPipeV"]


class DualPipeVModule(deepspeed.pipe.DualPipeVModule, PipelineModule):
    """DeepSpeed's module of that name, with what ours has: bounds such as ``0,4,9,16,22``, and ``StageLayers``."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Which layers of the model this rank holds: of stage r, and of 2P - 1 - r."""
        return self.phase_bounds

    def forward(self, forward_input: torch.Tensor) -> torch.Tensor:
        """Compute the output of the stage whose turn it is."""
        return self._stages[self.active_phase](forward_input)


class DualPipeV(Pipeline):
    """A rank with two stages of the model; see ``Pipeline``, whose ``stages`` are ranks here: P of them, M >= 2P."""

    module = DualPipeVModule

    def _holder(self, stage: int) -> int:
        return min(stage, 2 * self.deepspeed.num_stages - 1 - stage)

    def _instruction(self, name: str, number: int, about: Mapping[str, int]) -> Instruction:
        """Say what DeepSpeed executes: it has a buffer for each micro-batch of one stage, then of the other."""
        rank, ranks, micro_batches = self.deepspeed.stage_id, self.deepspeed.num_stages, self.batch.accumulation
        if "buffer_id" not in about:
            return Instruction(name, rank)
        second, micro_batch = divmod(about["buffer_id"], micro_batches)
        return Instruction(name, 2 * ranks - 1 - rank if second else rank, micro_batch)
