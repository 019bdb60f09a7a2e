"""DeepSpeed's two engines, as ``pipetutor.core.engine`` wants one: data-parallel, and a pipeline's stage.

What DeepSpeed gives and this workbook needs otherwise is settled here: bounds as a partition method, the
config that its engine gets, the model's state under torchvision's names, and a look at each instruction
before the engine executes it.
"""

import importlib
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import TiedLayerSpec
from deepspeed.runtime import compiler
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from torch import nn

from pipetutor.core.accumulate import accumulate_in_place
from pipetutor.core.batch import batch_arithmetic
from pipetutor.core.clipping import clip_gradients
from pipetutor.core.config import REDUCE_BUCKET, dtype_of
from pipetutor.core.engine import After, Batches, Before, Kept, others, say
from pipetutor.core.model import Model
from pipetutor.core.observer import Peers
from pipetutor.core.pieces import NUMBERS, piece_of
from pipetutor.core.recompute import StageLayers
from pipetutor.core.tied import Tied, TiedSums
from pipetutor.schedule.orders import PARTNERS, Instruction

__all__ = ["DataParallel", "Pipeline", "PipelineModule"]


class _Built(TiedLayerSpec):
    """A tied layer that is built already, as DeepSpeed wants to hear of one."""

    def __init__(self, layer: Tied):
        names = [name for name, _ in layer.module.named_parameters()]
        super().__init__(layer.key, type(layer.module), tied_weight_attr=names)
        self._module = layer.module

    def build(self, log: bool = False) -> nn.Module:
        return self._module


class PipelineModule(deepspeed.pipe.PipelineModule):
    """DeepSpeed's ``PipelineModule``, which also takes bounds such as ``0,16,22``.

    Its own activation checkpointing would have running statistics take in each micro-batch twice; ``StageLayers`` has
    none of that.

    Args:
        layers: of the model; those of other stages may be without memory.
        recompute: see ``StageLayers``.
        about: the other arguments of DeepSpeed's ``PipelineModule``.
    """

    def __init__(self, *, layers: Sequence[nn.Module], recompute: bool = False, **about: Any):
        specs = [_Built(layer) if isinstance(layer, Tied) else layer for layer in layers]
        super().__init__(layers=specs, **about)
        # In a tuple, which torch does not look into: the layers have their names in this module already.
        self._stages = tuple(StageLayers(layers[low:high], recompute) for low, high in self.spans)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Which layers of the model this rank holds, stage by stage."""
        return [(self._local_start, self._local_stop)]

    def forward(self, forward_input: torch.Tensor) -> torch.Tensor:
        """Compute the stage's output."""
        return self._stages[0](forward_input)

    @torch.no_grad()  # else torch warns that a broadcast is nothing to go backward through
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()

    def _partition_layers(self, method: str = "uniform") -> None:
        if method[0].isdigit():
            self.parts = [int(bound) for bound in method.split(",")]
            self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])
        else:
            super()._partition_layers(method)


def optimizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer of a config as engines get it.

    DeepSpeed would compile its own Adam at first use, which needs a compiler, and nvcc on a GPU. torch's AdamW takes
    its place, with DeepSpeed's default decay of 0 and not torch's 0.01, and fused: one pass over the memory instead
    of ten makes it five times as fast on a CPU (34 against 170 ms for 54 million weights).
    """
    optimizer = config["optimizer"]
    if optimizer["type"] not in ("Adam", "AdamW"):
        return optimizer
    params = {"torch_adam": True, "weight_decay": 0.0} | optimizer.get("params", {})
    return optimizer | {"params": ({"fused": True} | params) if params["torch_adam"] else params}


def engine_config(config: dict[str, Any], stages: int) -> dict[str, Any]:
    """Return a DeepSpeed config as the engine gets it.

    What DeepSpeed 0.19.8 would do otherwise, and what is done about it:

    - It takes another Adam: see ``optimizer_config``.
    - It clips gradients to a norm of 1 when nobody asked. Clipping is off unless the config asks for it.
    - In bf16 and fp16 it leaves buffers in fp32, and torch's batch normalisation takes no weights of another dtype
      than its running statistics. They become what the weights are.
    - ZeRO reduces gradients through a buffer of 500 million numbers: 2 GB on a GPU, and on a CPU a second copy of all
      gradients. 5 million do, 20 MB: the message is long enough, and what is larger is reduced where it is.
    - ``wall_clock_breakdown`` ends its pipeline engine ("timer has already been started"). It is left out.
    - It prints steps in its own form. They are printed by ``pipetutor.train``, in one form for both modes.
    """
    config = {"gradient_clipping": 0.0} | config
    config["steps_per_print"] = None
    config["optimizer"] = optimizer_config(config)
    if (dtype := dtype_of(config)) != "fp32":
        config["data_types"] = {"buffer_dtype": dtype} | config.get("data_types", {})
    if "zero_optimization" in config:
        config["zero_optimization"] = {"reduce_bucket_size": REDUCE_BUCKET} | config["zero_optimization"]
    if stages and config.pop("wall_clock_breakdown", False):
        say("wall_clock_breakdown is left out: DeepSpeed's pipeline engine does not support it")
    return config


def _load_muon() -> None:
    """Load DeepSpeed's Muon without torch's compiler: ZeRO asks whether the optimizer is one, as bf16 does.

    DeepSpeed compiles it as it loads. That takes every rank two seconds of processor time or more, and 130 MB.
    """
    compile, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile


class _DeepSpeed(ABC):
    """What both have in common.

    Attributes:
        deepspeed: DeepSpeed's own engine.
    """

    def __init__(self, net: nn.Module, config: dict[str, Any], stages: int):
        _load_muon()
        self.deepspeed, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=net,
            model_parameters=[p for p in net.parameters() if p.requires_grad],
            config=engine_config(config, stages),
        )
        self.device: torch.device = self.deepspeed.device
        self.batch = batch_arithmetic(config, self.deepspeed.dp_world_size)
        if self.batch.replicas == 1 and not self.deepspeed.zero_optimization():
            # To add them up over one replica, it would copy all gradients into one tensor and back.
            name = "pipeline_enable_backward_allreduce" if stages else "enable_backward_allreduce"
            setattr(self.deepspeed, name, False)
        # DeepSpeed's own optimizer, that of ZeRO or of 16 bits, takes a norm over all ranks and shares weights out.
        self._steps_together = not isinstance(self.optimizer, torch.optim.Optimizer)

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors that this rank holds."""

    def kept(self) -> Iterator[Kept]:
        """Put together what the optimizer keeps in pieces, one tensor after another."""
        states = self.optimizer.state
        for number, (name, tensor) in enumerate(self.state().items()):
            piece = piece_of(self.optimizer, tensor)
            state = {part: value for part, value in states.get(piece.trained, {}).items() if value is not None}
            parts = {part: piece.whole(value, number) for part, value in state.items()}
            exact = tensor.dtype == piece.trained.dtype  # as the model has it, which is whole already
            weight = tensor.detach() if exact else piece.whole(piece.trained.detach(), number)
            if piece.keeper(number):
                yield Kept(name, weight.float() if weight.is_floating_point() else weight, parts)

    def load(self, kept: Iterable[Kept], step: int) -> None:
        """Fill in weights and optimizer; each rank reads for itself."""
        state, fused = self.state(), self.optimizer.param_groups[0].get("fused")
        for name, weight, parts in kept:
            piece = piece_of(self.optimizer, state[name])
            piece.fill_weight(weight)
            for part, value in parts.items():
                # torch keeps an optimizer's count of steps on the CPU, unless its kernel is fused.
                value = value if part in NUMBERS and not fused else value.to(self.device)
                piece.fill_state(self.optimizer.state[piece.trained], part, value)
        self.deepspeed.global_steps = step

    def _share_buffers(self, replicas: Sequence[int], group: Any) -> None:
        """Take over the buffers, as running statistics, of the first of the ranks that hold the same layers."""
        if self.batch.replicas > 1:
            for buffer in self.deepspeed.module.buffers():
                dist.broadcast(buffer, src=min(replicas), group=group)


class DataParallel(_DeepSpeed):
    """The whole model on each rank; see ``pipetutor.core.engine.Engine``.

    Args:
        model: the whole of it is built.
        config: a whole DeepSpeed config.
    """

    is_first = True
    blocking = False

    def __init__(self, model: Model, config: dict[str, Any]):
        super().__init__(model.whole, config, stages=0)
        self.loss_fn = model.loss_fn
        self.replica = dist.get_rank()
        self._before: Before = lambda *_: None
        self._after: After = lambda: None

    def _micro_batch(self) -> int:
        return self.deepspeed.micro_steps % self.batch.accumulation

    def observe(self, before: Before, after: After) -> None:
        """Give what DeepSpeed's methods do the names of a pipeline's instructions.

        It reduces gradients within its backward pass, so ``before`` may be called twice in a row.
        """
        self._before, self._after = before, after

        def observed(name: str, execute: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                last = self.deepspeed.is_gradient_accumulation_boundary()  # after it alone do ranks meet
                if last or name not in ("ReduceGrads", "OptimizerStep"):
                    together = name == "ReduceGrads" or (name == "OptimizerStep" and self._steps_together)
                    peers = others() if together else ()
                    before(Instruction(name, 0, self._micro_batch()), peers)
                result = execute(*args, **kwargs)
                after()
                return result

            return run

        methods = {
            "forward": "ForwardPass",
            "backward": "BackwardPass",
            "allreduce_gradients": "ReduceGrads",
            "step": "OptimizerStep",
        }
        for method, name in methods.items():
            setattr(self.deepspeed, method, observed(name, getattr(self.deepspeed, method)))

    def feed(self, micro_batches: Batches) -> Batches:
        """Have each load observed."""
        return (self._load(micro_batches) for _ in itertools.count())

    def _load(self, micro_batches: Batches) -> list[torch.Tensor]:
        self._before(Instruction("LoadMicroBatch", 0, self._micro_batch()), ())
        found = next(micro_batches)
        self._after()
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """Return the model's ``state_dict``."""
        return dict(self.deepspeed.module.state_dict(keep_vars=True))

    def logits(self, micro_batches: Batches, count: int) -> list[torch.Tensor]:
        """Compute forward alone; every rank returns logits."""
        self._share_buffers(range(dist.get_world_size()), None)
        self.deepspeed.eval()
        found = []
        for number in range(count):
            images, _ = next(micro_batches)
            self._before(Instruction("ForwardPass", 0, number), ())
            found.append(self.deepspeed.module(images))
        self.deepspeed.train()
        return found


class Pipeline(_DeepSpeed):
    """A stage of the model on each rank; the ranks beyond one pipeline are replicas of it.

    Args:
        model: this rank's layers of it are built.
        stages: pipeline stages P.
        part: where to cut: a method of DeepSpeed, or bounds such as ``0,16,22``.
        config: a whole DeepSpeed config.
        recompute: keep the input of the stage alone for each micro-batch, and compute the rest once more in its
            backward pass (activation checkpointing; Chen et al., arXiv:1604.06174).
    """

    blocking = True
    module: type[PipelineModule] = PipelineModule

    def __init__(self, model: Model, stages: int, part: str, config: dict[str, Any], recompute: bool = False):
        self._model, self.loss_fn = model, model.loss_fn
        in_place = dtype_of(config) == "fp32" and not config.get("zero_optimization", {}).get("stage")
        if in_place:
            accumulate_in_place(model.layers)  # others take each gradient into a buffer of their own
        net = self.module(
            layers=model.layers,
            loss_fn=model.loss_fn,
            num_stages=stages,
            partition_method=part,
            activation_checkpoint_interval=0,
            recompute=recompute,
        )
        super().__init__(net, config, stages)
        self.deepspeed.clip_fp32_gradients = self._clip
        if in_place:
            self._sum_apart(TiedSums([layer for low, high in net.spans for layer in model.layers[low:high]]))
        self.replica = self.deepspeed.grid.get_data_parallel_rank()
        self.is_first = self.deepspeed.is_first_stage()

    def train_batch(self, data_iter: Batches) -> torch.Tensor:
        """Train one step, and return the mean loss over its micro-batches and all replicas, on every rank."""
        loss = self.deepspeed.train_batch(data_iter=data_iter)
        # It would keep the last micro-batches until those of the next step take their places.
        self.deepspeed.pipe_buffers["inputs"] = [None] * len(self.deepspeed.pipe_buffers["inputs"])
        return loss

    def _sum_apart(self, sums: TiedSums) -> None:
        """Have the gradients of tied places that this rank holds added up when ranks that hold one each do so."""

        def reduce(engine: Any, **about: Any) -> None:
            sums.add()
            of_deepspeed(engine, **about)

        known = self.deepspeed._INSTRUCTION_MAP
        of_deepspeed = known[ReduceTiedGrads]
        self.deepspeed._INSTRUCTION_MAP = known | {ReduceTiedGrads: reduce}

    def _clip(self) -> None:
        """Clip by the norm of the whole model; DeepSpeed would take that of the first stage for all of them."""
        longest, group = self.deepspeed.gradient_clipping(), self.deepspeed.grid.get_model_parallel_group()
        clip_gradients(self.deepspeed.module.parameters(), longest, self.device, group)

    def _step_peers(self) -> set[int]:
        """Return the ranks that an OptimizerStep cannot end without: those it takes the norm of gradients with."""
        grid, ranks = self.deepspeed.grid, {dist.get_rank()}
        if self._steps_together or self.deepspeed.gradient_clipping():
            ranks |= set(dist.get_process_group_ranks(grid.get_model_parallel_group()))
        if self._steps_together:
            ranks |= set(grid.dp_group)
        return ranks - {dist.get_rank()}

    def _instruction(self, name: str, number: int, about: Mapping[str, int]) -> Instruction:
        """Say what DeepSpeed executes: its n-th instruction of a name in this step, with these arguments.

        An instruction names a buffer; the micro-batch in it follows from the order. 1F1B keeps micro-batches in
        order: the n-th ForwardPass of a step is that of micro-batch n, and so on for each kind.
        """
        return Instruction(name, self.deepspeed.stage_id, number if "buffer_id" in about else None)

    def _holder(self, stage: int) -> int:
        """Return which of the pipeline's ranks holds a stage of the model."""
        return stage

    def _peers(self, instruction: Instruction) -> Peers:
        """Return the ranks that an instruction cannot end without."""
        engine, name = self.deepspeed, instruction.name
        if name in PARTNERS:
            neighbour = instruction.stage + PARTNERS[name][1]
            return (engine.grid.stage_to_global(self._holder(neighbour)),)
        replicas = tuple(rank for rank in engine.grid.dp_group if rank != dist.get_rank())
        copies = {rank for comm in engine.module.tied_comms.values() for rank in comm["ranks"]} - {dist.get_rank()}
        source = engine._loss_stage_global_rank()
        return {
            "ReduceGrads": replicas,
            "ReduceTiedGrads": tuple(sorted(copies)),
            "OptimizerStep": tuple(sorted(self._step_peers())),
            "AggregateLoss": replicas if dist.get_rank() == source else (source,),
        }.get(name, ())

    def observe(self, before: Before, after: After) -> None:
        """Look at each of its instructions.

        ``AggregateLoss`` is the exchange of the loss that follows the last instruction of a step.
        """
        engine = self.deepspeed
        done: Counter[str] = Counter()

        def observed(name: str, execute: Callable[..., None]) -> Callable[..., None]:
            def run(engine: Any, **about: int) -> None:
                instruction = self._instruction(name, done[name], about)
                before(instruction, self._peers(instruction))
                done[name] += 1
                execute(engine, **about)
                after()

            return run

        instructions = engine._INSTRUCTION_MAP.items()
        engine._INSTRUCTION_MAP = {kind: observed(kind.__name__, execute) for kind, execute in instructions}
        exec_schedule, aggregate = engine._exec_schedule, engine._aggregate_total_loss

        def counted_schedule(schedule: Any) -> None:
            done.clear()
            exec_schedule(schedule)

        def observed_aggregate() -> torch.Tensor:
            instruction = self._instruction("AggregateLoss", 0, {})
            before(instruction, self._peers(instruction))
            loss = aggregate()
            after()
            return loss

        engine._exec_schedule, engine._aggregate_total_loss = counted_schedule, observed_aggregate

    def feed(self, micro_batches: Batches) -> Batches:
        """Return them as they are: to load one is an instruction of its own."""
        return micro_batches

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of this rank's layers."""
        state: dict[str, torch.Tensor] = {}
        for span in self.deepspeed.module.spans:
            state |= self._model.state(*span)
        return state

    def logits(self, micro_batches: Batches, count: int) -> list[torch.Tensor]:
        """Run DeepSpeed's inference schedule."""
        engine = self.deepspeed
        self._share_buffers(engine.grid.dp_group, engine.mpu.get_data_parallel_group())
        # With the loss left out, an output takes its place: all of them are kept, and one is added to a sum.
        engine.total_loss = None
        found = engine.eval_batch(micro_batches, compute_loss=False, reduce_output=None, num_micro_batches=count)
        engine.total_loss = None
        return found or []
