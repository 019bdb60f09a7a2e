"""One rank's DeepSpeed engine: the whole model data-parallel, or one stage of it.

What DeepSpeed gives and this workbook needs otherwise is settled here: bounds as a partition method, the
config that its engine gets, the model's state under torchvision's names, and a look at each instruction
before the engine executes it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from pipetutor.core.accumulate import accumulate_in_place
from pipetutor.core.config import dtype_of
from pipetutor.core.layers import join_layers, layer_names
from pipetutor.core.recompute import StageLayers
from pipetutor.schedule.orders import PARTNERS


def say(line: str) -> None:
    """Print on the job's first rank alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)


class PipelineModule(deepspeed.pipe.PipelineModule):
    """DeepSpeed's ``PipelineModule``, which also takes bounds such as ``0,16,22``, and lets other stages' layers go.

    DeepSpeed keeps the list that it was given, so each rank would hold the weights of the whole model. Its own
    activation checkpointing would have running statistics take in each micro-batch twice; ``StageLayers`` has none
    of that.

    Args:
        recompute: see ``StageLayers``.
        about: the arguments of DeepSpeed's ``PipelineModule``.
    """

    _layer_specs: list[Any]

    def __init__(self, *, recompute: bool = False, **about: Any):
        super().__init__(**about)
        # In a tuple, which torch does not look into: the layers have their names in this module already.
        self._stage = (StageLayers(self.forward_funcs, recompute),)

    def forward(self, forward_input: torch.Tensor) -> torch.Tensor:
        """Compute the stage's output."""
        return self._stage[0](forward_input)

    def _build(self) -> None:
        super()._build()
        held = range(self._local_start, self._local_stop)
        self._layer_specs = [spec if index in held else None for index, spec in enumerate(self._layer_specs)]

    def _partition_layers(self, method: str = "uniform") -> None:
        if method[0].isdigit():
            self.parts = [int(bound) for bound in method.split(",")]
            self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])
        else:
            super()._partition_layers(method)


def engine_config(config: dict[str, Any], stages: int) -> dict[str, Any]:
    """Return a DeepSpeed config as the engine gets it.

    What DeepSpeed 0.19.8 would do otherwise, and what is done about it:

    - It compiles its Adam at first use, which needs a compiler, and nvcc on a GPU. torch's AdamW takes its
      place, with DeepSpeed's default decay of 0 and not torch's 0.01, and fused: one pass over the memory
      instead of ten makes it five times as fast on a CPU (34 against 170 ms for 54 million weights).
    - It clips gradients to a norm of 1 when nobody asked, and takes that norm over each stage alone: the
      losses of a pipeline would depend on its cut. Clipping is off unless the config asks for it.
    - In bf16 and fp16 it leaves buffers in fp32, and torch's batch normalisation takes no weights of another dtype
      than its running statistics. They become what the weights are.
    - ``wall_clock_breakdown`` ends its pipeline engine ("timer has already been started"). It is left out.
    - It prints steps in its own form. They are printed by ``pipetutor.train``, in one form for both modes.
    """
    config = {"gradient_clipping": 0.0} | config
    config["steps_per_print"] = None
    if stages > 1 and config["gradient_clipping"]:
        say("gradient_clipping: DeepSpeed clips each stage by its own norm, so the losses depend on the cut")
    optimizer = dict(config.get("optimizer", {}))
    if optimizer.get("type", "").lower() in ("adam", "adamw"):
        params = {"torch_adam": True, "weight_decay": 0.0} | optimizer.get("params", {})
        optimizer["params"] = ({"fused": True} | params) if params["torch_adam"] else params
        config["optimizer"] = optimizer
    if (dtype := dtype_of(config)) != "fp32":
        config["data_types"] = {"buffer_dtype": dtype} | config.get("data_types", {})
    if stages and config.pop("wall_clock_breakdown", False):
        say("wall_clock_breakdown is left out: DeepSpeed's pipeline engine does not support it")
    return config


def _initialize(net: nn.Module, config: dict[str, Any], stages: int) -> Any:
    engine, *_ = deepspeed.initialize(
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        config=engine_config(config, stages),
    )
    if engine.dp_world_size == 1 and not engine.zero_optimization():
        # To add them up over one replica, it would copy all gradients into one tensor and back.
        setattr(engine, "pipeline_enable_backward_allreduce" if stages else "enable_backward_allreduce", False)
    return engine


def data_parallel(model: nn.Module, config: dict[str, Any]) -> Any:
    """Give the whole model to DeepSpeed's data-parallel engine.

    Args:
        model: a torchvision model.
        config: a whole DeepSpeed config, from ``preflight.read_config``.
    """
    return _initialize(model, config, stages=0)


def pipeline(model: nn.Module, stages: int, part: str, config: dict[str, Any], recompute: bool = False) -> Any:
    """Give this rank's stage of the model to DeepSpeed's pipeline engine.

    Args:
        model: a torchvision model that ``join_layers`` can flatten; the rank keeps its own layers of it.
        stages: pipeline stages P; the ranks beyond one pipeline become replicas of it.
        part: where to cut: a method of DeepSpeed, or bounds such as ``0,16,22``.
        config: a whole DeepSpeed config, from ``preflight.read_config``.
        recompute: keep the input of the stage alone for each micro-batch, and compute the rest once more in its
            backward pass (activation checkpointing; Chen et al., arXiv:1604.06174).
    """
    layers = join_layers(model)
    if dtype_of(config) == "fp32" and not config.get("zero_optimization", {}).get("stage"):
        accumulate_in_place(layers)  # the others take each gradient from autograd, into a buffer of their own
    net = PipelineModule(
        layers=layers,
        loss_fn=nn.CrossEntropyLoss(),
        num_stages=stages,
        partition_method=part,
        activation_checkpoint_interval=0,
        recompute=recompute,
    )
    net.layer_names = layer_names(model, layers)
    return _initialize(net, config, stages)


def is_pipeline(engine: Any) -> bool:
    """Say whether the engine holds a stage and runs a whole train batch itself, DeepSpeed's or torch's."""
    return hasattr(engine, "train_batch")


def release_inputs(engine: Any) -> None:
    """Let the last micro-batches of a step go, which DeepSpeed's engine keeps until the next step overwrites them."""
    if isinstance(engine, PipelineEngine):
        engine.pipe_buffers["inputs"] = [None] * len(engine.pipe_buffers["inputs"])


def replica_of(engine: Any) -> int:
    """Return which data-parallel copy this rank belongs to, from 0 to ``engine.dp_world_size`` - 1."""
    if isinstance(engine, PipelineEngine):
        return engine.grid.get_data_parallel_rank()
    return 0 if is_pipeline(engine) else dist.get_rank()


def model_state(engine: Any) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that this rank holds, by the names of torchvision's ``state_dict``.

    The tensors are the engine's own. Over the stages of a pipeline the names are all of the model's, each once.
    """
    if not is_pipeline(engine):
        return dict(engine.module.state_dict(keep_vars=True))
    net = engine.module
    names = net.layer_names[net.parts[engine.stage_id] : net.parts[engine.stage_id + 1]]
    state: dict[str, torch.Tensor] = {}
    for name, layer in zip(names, net.forward_funcs, strict=True):
        state |= layer.state_dict(prefix=f"{name}.", keep_vars=True)
    return state


class Instruction(NamedTuple):
    """What an engine is about to do.

    Attributes:
        name: DeepSpeed's name, such as ``ForwardPass``; ``AggregateLoss`` for the exchange of the loss that
            follows the last instruction of a step.
        micro_batch: counted from 0 in each step; None for what concerns the whole step.
        peers: the ranks that it cannot end without.
        stage: of the model, counted from 0.
    """

    name: str
    micro_batch: int | None = None
    peers: Sequence[int] = ()
    stage: int = 0


Before = Callable[[Instruction], None]
After = Callable[[], None]


def observe(engine: Any, before: Before, after: After) -> None:
    """Have something called ahead of everything that an engine executes, and behind it.

    A pipeline's engine has instructions, in training and evaluation; what a data-parallel engine does is given
    their names. It reduces gradients within its backward pass, so ``before`` may be called twice in a row.

    Args:
        engine: from ``pipeline`` or ``data_parallel``; changed in place.
        before: gets the instruction.
        after: called once it is executed.
    """
    if isinstance(engine, PipelineEngine):
        _observe_pipeline(engine, before, after)
    elif is_pipeline(engine):
        engine.observe(before, after)
    else:
        _observe_data_parallel(engine, before, after)


def _observe_data_parallel(engine: Any, before: Before, after: After) -> None:
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]

    def observed(name: str, execute: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            last = engine.is_gradient_accumulation_boundary()  # the one micro-batch after which ranks meet
            if last or name not in ("ReduceGrads", "OptimizerStep"):
                number = engine.micro_steps % engine.gradient_accumulation_steps()
                before(Instruction(name, number, others if name == "ReduceGrads" else []))
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
        setattr(engine, method, observed(name, getattr(engine, method)))


def _observe_pipeline(engine: Any, before: Before, after: After) -> None:
    # An instruction names a buffer; the micro-batch in it follows from the order. 1F1B keeps micro-batches in
    # order: the n-th ForwardPass of a step is that of micro-batch n, and so on for each kind.
    grid, stage, last = engine.grid, engine.stage_id, engine.num_stages - 1
    me = dist.get_rank()
    others = [rank for rank in grid.dp_group if rank != me]
    done: Counter[str] = Counter()

    def observed(name: str, execute: Callable[..., None]) -> Callable[..., None]:
        peers = others if name == "ReduceGrads" else []
        if name in PARTNERS and 0 <= (neighbour := stage + PARTNERS[name][1]) <= last:
            peers = [grid.stage_to_global(neighbour)]

        def run(self: Any, **kwargs: int) -> None:
            before(Instruction(name, done[name] if "buffer_id" in kwargs else None, peers, stage))
            done[name] += 1
            execute(self, **kwargs)
            after()

        return run

    instructions = engine._INSTRUCTION_MAP.items()
    engine._INSTRUCTION_MAP = {kind: observed(kind.__name__, execute) for kind, execute in instructions}
    exec_schedule, aggregate = engine._exec_schedule, engine._aggregate_total_loss

    def counted_schedule(schedule: Any) -> None:
        done.clear()
        exec_schedule(schedule)

    def observed_aggregate() -> torch.Tensor:
        peers = others if stage == last else [grid.stage_to_global(last)]
        before(Instruction("AggregateLoss", peers=peers, stage=stage))
        loss = aggregate()
        after()
        return loss

    engine._exec_schedule, engine._aggregate_total_loss = counted_schedule, observed_aggregate
