"""Any schedule run for real: one rank of a pipeline over ``torch.distributed.pipelining``.

DeepSpeed's engine runs 1F1B alone. Here the order of computations comes from ``schedule.orders``, the stream
that the simulator and the figures read, and torch's pipeline runtime executes it: it adds the sends and receives,
and moves the tensors. Model, cut, data, loss and optimizer are those of ``core.deepspeed_engines``, and so are
the losses.

The runtime is private in torch 2.15 (``_PipelineScheduleRuntime``), and this is the one module that touches it.
Sends and receives run in the background, on gloo's own thread; a rank waits for a message only where it needs it.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as runtime

from pipetutor.core.accumulate import accumulate_in_place
from pipetutor.core.batch import batch_arithmetic
from pipetutor.core.clipping import clip_gradients
from pipetutor.core.crossing import crossing
from pipetutor.core.deepspeed_engines import optimizer_config
from pipetutor.core.engine import After, Batches, Before, Kept, others, own_device
from pipetutor.core.model import Model
from pipetutor.core.recompute import StageLayers
from pipetutor.core.tied import Tied, TiedSums
from pipetutor.schedule.orders import Instruction
from pipetutor.schedule.rules import placement

__all__ = ["TorchPipeline", "build_optimizer"]

COMPUTE = {
    "ForwardPass": runtime.FORWARD,
    "BackwardPass": runtime.FULL_BACKWARD,
    "BackwardInput": runtime.BACKWARD_INPUT,
    "BackwardWeight": runtime.BACKWARD_WEIGHT,
}


def build_optimizer(config: dict[str, Any], parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer that DeepSpeed builds from the same config in ``core.deepspeed_engines``.

    Args:
        config: a whole DeepSpeed config.
        parameters: of this rank.

    Raises:
        ValueError: it is not torch's Adam, AdamW or SGD.
    """
    optimizer = optimizer_config(config)
    kind, params = optimizer["type"].lower(), dict(optimizer.get("params", {}))
    if kind == "sgd":
        return torch.optim.SGD(parameters, **params)
    if kind not in ("adam", "adamw") or not params.pop("torch_adam"):
        raise ValueError(f"a pipeline of torch trains with torch's Adam, AdamW or SGD, not with {optimizer}")
    decoupled = params.pop("adam_w_mode", True) or kind == "adamw"
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(parameters, **params)


class _Watch:
    """Tells an observer, once there is one, that an instruction begins and that it has ended."""

    def __init__(self) -> None:
        self.before: Before = lambda *_: None
        self.after: After = lambda: None

    @contextmanager
    def __call__(
        self, name: str, stage: int, micro_batch: int | None = None, peers: Sequence[int] = ()
    ) -> Iterator[None]:
        self.before(Instruction(name, stage, micro_batch), peers)
        yield
        self.after()


class _Source:
    """The micro-batches of a step, in whatever order stages come to them; a rank may hold the first and the last."""

    def __init__(self, watch: _Watch, device: torch.device, shared: bool):
        self._watch, self._device, self._shared = watch, device, shared
        self._loaded: dict[int, list[torch.Tensor]] = {}
        self._data: Batches = iter(())
        self._count = 0

    def begin(self, data: Batches) -> None:
        """Read the next step's micro-batches from here."""
        self._data, self._count = data, 0

    def part(self, index: int, stage: int, number: int) -> torch.Tensor:
        """Return the images (0) or the labels (1) of a micro-batch; a stage asks for each once."""
        if number >= self._count:
            with self._watch("LoadMicroBatch", stage, number):
                for loaded in range(self._count, number + 1):  # those before it are read for later
                    self._loaded[loaded] = [part.to(self._device) for part in next(self._data)]
                self._count = number + 1
        parts = self._loaded[number]
        found, parts[index] = parts[index], torch.empty(0)
        if not self._shared or index == 1:  # the last stage comes to it later than the first
            del self._loaded[number]
        return found


class _Stage(PipelineStage):
    """A stage that reads its micro-batches when it comes to them, and whose computations can be observed."""

    def __init__(
        self,
        source: _Source,
        watch: _Watch,
        micro_batches: int,
        loss_fn: Callable[..., torch.Tensor],
        *args: Any,
    ):
        super().__init__(*args)
        self._source, self._watch, self._micro_batches, self._loss_fn = source, watch, micro_batches, loss_fn

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> torch.Tensor:
        """Compute the stage's output; on the last stage the loss, as a part of the mean over micro-batches."""
        stage, number = self.stage_index, fwd_chunk_id
        if self.is_first:
            args = (self._source.part(0, stage, number),)
        labels = self._source.part(1, stage, number) if self.is_last else None
        with self._watch("ForwardPass", stage, number):
            output = super().forward_one_chunk(number, args, kwargs, save_forward_output)
            if labels is None:
                return output
            return self._loss_fn(output, labels) / self._micro_batches

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Compute gradients: of weights and input, or of the input alone."""
        with self._watch("BackwardPass" if full_backward else "BackwardInput", self.stage_index, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Compute the gradients of weights that ``BackwardInput`` left out."""
        with self._watch("BackwardWeight", self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


class _Receives(dict[tuple[int, int], list[dist.Work]]):
    """Messages under way, by stage and micro-batch: the runtime takes one out to wait for it."""

    def __init__(self, wait: Callable[[int, int, list[dist.Work]], None]):
        super().__init__()
        self._wait = wait

    def pop(self, key: tuple[int, int]) -> list[dist.Work]:  # type: ignore[override]
        """Wait for a message; nothing is left to wait for."""
        self._wait(*key, super().pop(key))
        return []


class _Runtime(runtime._PipelineScheduleRuntime):
    """torch's runtime, with the loss of each micro-batch under its number.

    torch keeps losses in the order in which they come. Where micro-batches come to the last stage in another order,
    it takes a wrong one for a backward pass: without a word, if there are so many already.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._losses: dict[int, torch.Tensor] = {}

    def _maybe_compute_loss(self, stage: _Stage, output: torch.Tensor, _: Any, number: int, __: Any = None) -> None:
        if stage.is_last:
            self._losses[number] = output  # which is the loss already

    def _maybe_get_loss(self, stage: _Stage, number: int) -> torch.Tensor | None:
        return self._losses[number] if stage.is_last else None

    def _update_losses(self, _: Any, losses: list[torch.Tensor]) -> None:
        losses[:] = self._losses.values()
        self._losses.clear()


class TorchPipeline:
    """One rank of a pipeline; see ``pipetutor.core.engine.Engine``.

    A rank holds the stages that its stream runs. All ranks are one pipeline: there are no replicas.

    Args:
        model: this rank's layers of it are built.
        streams: the schedule, a compute stream for each rank.
        bounds: of all stages of the model.
        config: a whole DeepSpeed config; Adam, AdamW or SGD.
        recompute: keep only what enters a stage, and compute the rest once more in the backward pass.
        inputs: of a micro-batch, on ``meta``. Told beforehand, the shapes of what the stages send need not be found
            by running the whole model once more ahead of the first step.

    Raises:
        ValueError: the optimizer does not fit, or the numbers of stages, ranks and micro-batches do not.

    >>> images, streams = torch.empty(8, 3, 224, 224, device="meta"), build("gpipe", 2, 32)
    >>> engine = TorchPipeline(model, streams, [0, 16, 22], read_config(None), images)  # doctest: +SKIP
    >>> loss = engine.train_batch(micro_batches)  # doctest: +SKIP
    """

    replica = 0
    blocking = False
    scheduler = None

    def __init__(
        self,
        model: Model,
        streams: Sequence[Sequence[Instruction]],
        bounds: Sequence[int],
        config: dict[str, Any],
        inputs: torch.Tensor,
        recompute: bool = False,
    ):
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._last = len(bounds) - 2
        self._holders = placement(streams)
        if len(streams) != self._ranks or len(self._holders) != self._last + 1:
            raise ValueError(
                f"the schedule is for {len(self._holders)} stages on {len(streams)} ranks, and there are "
                f"{self._last + 1} stages and {self._ranks} ranks"
            )
        self.is_first = self._rank == self._holders[0]
        self.device = own_device()
        self.batch = batch_arithmetic(config, replicas=1)
        self._watch = _Watch()
        self._source = _Source(self._watch, self.device, shared=self._holders[0] == self._holders[-1])
        if not any(i.name == "BackwardWeight" for i in streams[self._rank]):  # autograd is asked for weights alone
            accumulate_in_place(model.layers)
        # The output is no view, whatever lies behind a cut, and contiguous: see StageLayers.
        passed = [
            x.clone(memory_format=torch.contiguous_format).requires_grad_(x.is_floating_point())
            for x in crossing(model, inputs)
        ]
        self._model, self.loss_fn = model, model.loss_fn
        mine = [stage for stage, holder in enumerate(self._holders) if holder == self._rank]
        self._spans = {stage: (bounds[stage], bounds[stage + 1]) for stage in mine}
        self._stages: dict[int, Any] = {}
        for stage, (low, high) in self._spans.items():
            layers = model.layers[low:high]
            module = StageLayers(layers, recompute).to(self.device)
            about = (module, stage, self._last + 1, self.device, passed[low], passed[high])
            told = (self._source, self._watch, self.batch.accumulation, model.loss_fn)
            self._stages[stage] = _Stage(*told, *about)
        self._tied = self._tie(bounds)
        self._sums = TiedSums([layer for low, high in self._spans.values() for layer in model.layers[low:high]])
        state = self.state().values()
        self.optimizer = build_optimizer(config, [p for p in state if isinstance(p, nn.Parameter)])
        self._clip = config.get("gradient_clipping", 0.0)
        self._sending: dict[runtime._Action, tuple[list[dist.P2POp], list[dist.Work]]] = {}
        self._runtime = self._prepare(streams)

    def _tie(self, bounds: Sequence[int]) -> list[tuple[nn.Module, dist.ProcessGroup]]:
        """Return the modules of which other ranks have copies, each with the group of those that have one."""
        holders: dict[str, set[int]] = {}
        modules: dict[str, nn.Module] = {}
        for index, layer in enumerate(self._model.layers):
            if isinstance(layer, Tied):
                holders.setdefault(layer.key, set()).add(self._holders[bisect.bisect(bounds, index) - 1])
                modules[layer.key] = layer.module
        found = []
        for key, ranks in holders.items():
            group = dist.new_group(sorted(ranks)) if len(ranks) > 1 else None  # every rank takes part in making one
            if isinstance(group, dist.ProcessGroup) and self._rank in ranks:
                found.append((modules[key], group))
                for parameter in modules[key].parameters():
                    # As in DeepSpeed's engine: what is counted once is not counted here.
                    parameter.ds_pipe_replicated = self._rank != min(ranks)  # type: ignore[attr-defined]
        return found

    def _reduce_tied_gradients(self) -> None:
        """Give all copies of a tied module the sum of their gradients."""
        self._sums.add()
        peers = {rank for _, group in self._tied for rank in dist.get_process_group_ranks(group)} - {self._rank}
        with self._watch("ReduceTiedGrads", self._rank, None, sorted(peers)):
            for module, group in self._tied:
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad, group=group)

    def _prepare(self, streams: Sequence[Sequence[Instruction]]) -> Any:
        orders: dict[int, list[runtime._Action | None]] = {
            rank: [runtime._Action(i.stage, COMPUTE[i.name], i.micro_batch) for i in stream if i.name in COMPUTE]
            for rank, stream in enumerate(streams)
        }
        stages, never = list(self._stages.values()), lambda *_: None
        executor = _Runtime(stages, self.batch.accumulation, loss_fn=never, scale_grads=False)
        executor._prepare_schedule_with_comms(orders)
        executor.fwd_recv_ops = _Receives(partial(self._wait, "RecvActivation", -1))
        executor.bwd_recv_ops = _Receives(partial(self._wait, "RecvGrad", 1))
        sends = {runtime.SEND_F: self._send, runtime.SEND_B: self._send}
        waits = {runtime.WAIT_SEND_F: self._wait_for_send, runtime.WAIT_SEND_B: self._wait_for_send}
        executor._comp_type_to_function_map |= sends | waits
        return executor

    def _wait(self, name: str, towards: int, stage: int, number: int | None, works: Sequence[dist.Work]) -> None:
        with self._watch(name, stage, number, [self._holders[stage + towards]]):
            for work in works:
                work.wait()

    def _send(self, action: runtime._Action, _: Any) -> None:
        stage, number = self._stages[action.stage_index], action.microbatch_index
        forward = action.computation_type == runtime.SEND_F
        ops = (stage.get_fwd_send_ops if forward else stage.get_bwd_send_ops)(number)
        wait = runtime.WAIT_SEND_F if forward else runtime.WAIT_SEND_B
        self._sending[action._replace(computation_type=wait)] = ops, runtime._batch_p2p(ops)

    def _wait_for_send(self, action: runtime._Action, _: Any) -> None:
        stage, kind, number, _ = action
        forward = kind == runtime.WAIT_SEND_F
        _, works = self._sending.pop(action)
        self._wait(*(("SendActivation", 1) if forward else ("SendGrad", -1)), stage, number, works)
        if forward:
            self._stages[stage].release_fwd_send_outputs(number)

    def observe(self, before: Before, after: After) -> None:
        """Have something called ahead of each instruction, and behind it; one ends before the next begins.

        A rank waits for a message where it needs it, and for what it has sent when its schedule says so: those are
        the Recv and Send instructions. The transfer itself goes on in the background.
        """
        self._watch.before, self._watch.after = before, after

    def train_batch(self, data_iter: Batches) -> torch.Tensor:
        """Train one step.

        Args:
            data_iter: yields [images, labels] of a micro-batch; read on the ranks of the first and the last stage.

        Returns:
            The mean loss over the micro-batches, on every rank.
        """
        self._source.begin(data_iter)
        losses: list[torch.Tensor] = []
        unused = [None] * self.batch.accumulation  # a stage reads its labels itself
        self._runtime.step(target_mbs=unused, losses=losses, return_outputs=False)
        self._reduce_tied_gradients()
        with self._watch("OptimizerStep", self._rank, None, others() if self._clip else ()):
            if self._clip:
                (trained,) = self.optimizer.param_groups
                clip_gradients(trained["params"], self._clip, self.device, dist.group.WORLD)
            self.optimizer.step()
            self.optimizer.zero_grad()
        source = self._holders[-1]
        with self._watch("AggregateLoss", self._rank, None, others() if self._rank == source else [source]):
            loss = torch.stack(losses).detach().sum() if losses else torch.zeros((), device=self.device)
            dist.broadcast(loss, source)
        return loss

    def feed(self, micro_batches: Batches) -> Batches:
        """Return them as they are: to load one is an instruction of its own."""
        return micro_batches

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of this rank's layers."""
        state: dict[str, torch.Tensor] = {}
        for span in self._spans.values():
            state |= self._model.state(*span)
        return state

    def logits(self, micro_batches: Batches, count: int) -> list[torch.Tensor]:
        """Refuse: preflight lets no run of this engine evaluate."""
        raise NotImplementedError("torch's pipeline trains; DeepSpeed's evaluates")

    def kept(self) -> Iterator[Kept]:
        """Refuse: preflight lets no run of this engine save."""
        raise NotImplementedError("torch's pipeline keeps nothing; DeepSpeed's saves")

    def load(self, kept: Iterable[Kept], step: int) -> None:
        """Refuse: preflight lets no run of this engine resume."""
        raise NotImplementedError("torch's pipeline starts anew; DeepSpeed's resumes")
