"""The two trainers, data-parallel and pipeline, over the same data, model and loss.

After ``training/pipeline_parallelism/train.py`` of DeepSpeedExamples, whose names, flags and signatures are kept:
https://github.com/deepspeedai/DeepSpeedExamples/blob/master/training/pipeline_parallelism/train.py
What stands around a step, the same for both, is in ``pipetutor.core.loop``.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from pipetutor.core.deepspeed_engines import DataParallel, Pipeline
from pipetutor.core.engine import Batches, own_device
from pipetutor.core.limit import MemoryLimit, limited
from pipetutor.core.loop import Loop
from pipetutor.core.model import Model, build_model
from pipetutor.core.observer import Observer
from pipetutor.core.partition import bounds_for
from pipetutor.core.plan import Plan
from pipetutor.options import Options, add_options
from pipetutor.processes.faults import Fault, Injector
from pipetutor.processes.heartbeat import Heartbeat
from pipetutor.system.command import Parser
from pipetutor.tracing.record import Recorder
from pipetutor.train.joining import make_plan, with_bounds
from pipetutor.weights import load_weights

__all__ = ["get_args", "train_base", "train_pipe"]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the flags and defaults of the reference, and ours on top.

    Args:
        argv: the arguments; None takes those of the process.

    Raises:
        ValueError: a flag is unknown, or its value has the wrong type.
    """
    about = "train AlexNet, or another model, in a pipeline"
    # Both DeepSpeed and the options have --deepspeed_config: the later one takes the other's place.
    parser = Parser(prog="pipetutor.train", description=about, conflict_handler="resolve")
    return add_options(deepspeed.add_config_arguments(parser)).parse_args(argv)


def _agreed(args: argparse.Namespace) -> Plan:
    """Return the plan that all ranks have agreed on; a script of one's own that has no ``main`` makes it here."""
    return getattr(args, "plan", None) or with_bounds(make_plan(args))[0]


def _model(options: Options, held: Sequence[range] | None = None) -> Model:
    """Build the model, or the layers that a rank holds: with the same weights, whoever holds them."""
    with limited(options.memory_limit):
        model = build_model(options.model, options.seed, dropout=options.dropout, held=held)
    if options.weights:
        load_weights(model, options.weights)
    return model


def _observers(options: Options) -> list[Observer]:
    """Return who looks on; made ahead of the model, from whose memory a recorder tells what was there before."""
    rank, directory = dist.get_rank(), options.directory
    found: list[Observer] = [Heartbeat(directory, rank)]
    if options.trace and directory:
        found.append(Recorder(directory, rank, own_device()))
    if options.memory_limit:
        found.append(MemoryLimit(options.memory_limit))
    if options.fault:
        found.append(Injector(Fault.parse(options.fault), rank))
    return found


def train_base(args: argparse.Namespace) -> Any:
    """Train data-parallel: every rank holds the whole model, gradients are averaged over the ranks.

    Args:
        args: from ``get_args``.

    Returns:
        The DeepSpeed engine, trained for ``args.steps`` train batches.
    """
    plan = _agreed(args)
    observers = _observers(plan.options)
    model = _model(plan.options)
    base = DataParallel(model, plan.config)
    engine, criterion = base.deepspeed, model.loss_fn
    accumulation = engine.gradient_accumulation_steps()

    def train_batch(micro_batches: Batches) -> torch.Tensor:
        total = torch.zeros((), device=engine.device)
        for _ in range(accumulation):
            images, labels = next(micro_batches)
            loss = criterion(engine(images.to(engine.device)), labels.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        return total / (accumulation * dist.get_world_size())

    Loop(plan, base, observers).run(train_batch)
    return engine


def train_pipe(args: argparse.Namespace, part: str = "parameters") -> Any:
    """Train in ``args.pipeline_parallel_size`` stages; the ranks beyond one pipeline are replicas of it.

    Every rank builds its own stage alone, with weights that do not depend on the number of stages.

    Args:
        args: from ``get_args``.
        part: where to cut, as in ``--partition``, which the default leaves it to.

    Returns:
        The DeepSpeed pipeline engine, trained for ``args.steps`` train batches; torch's with ``--engine torch``.
    """
    plan = _agreed(args)
    options, bounds = plan.options, plan.bounds
    if part != "parameters":
        bounds = bounds_for(plan.layers, len(plan.placement), part)
    observers, rank = _observers(options), dist.get_rank()
    place = rank if options.engine == "torch" else rank // plan.batch.replicas  # among those of its pipeline
    stages = [stage for stage, holder in enumerate(plan.placement) if holder == place]
    model = _model(options, [range(bounds[stage], bounds[stage + 1]) for stage in stages])
    if options.engine == "torch":
        from pipetutor.core.torch_engine import TorchPipeline  # torch's pipelining, with the compiler that it loads

        shape, dtype = (plan.batch.micro, *plan.data.shape), getattr(torch, plan.data.dtype)
        inputs = torch.empty(shape, dtype=dtype, device="meta")
        engine = TorchPipeline(model, plan.streams, bounds, plan.config, inputs, options.recompute)
        Loop(plan, engine, observers).run(engine.train_batch)
        return engine
    pipe = Pipeline(model, options.stages, ",".join(map(str, bounds)), plan.config, options.recompute)
    Loop(plan, pipe, observers).run(pipe.train_batch)
    return pipe.deepspeed
