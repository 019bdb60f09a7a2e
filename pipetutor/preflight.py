"""Everything that can be known to be wrong before a process starts.

``launch`` and every rank call the same ``preflight``, so a cell and a terminal refuse the same things with
the same words. No torch: it answers in milliseconds, unless a run on the CPU asks for numbers of 16 bits.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pipetutor.core import checkpoint
from pipetutor.core.batch import Batch, batch_arithmetic
from pipetutor.core.config import OBJECTS, dtype_of, half_precision, read_config
from pipetutor.core.description import Description
from pipetutor.core.partition import Layer, bounds_for, check_stages, parameters_of
from pipetutor.core.plan import Plan
from pipetutor.options import PROFILE, Options
from pipetutor.processes.faults import Fault
from pipetutor.schedule.formulas import idle_share
from pipetutor.schedule.orders import LOOPED, SCHEDULES, stages_a_rank
from pipetutor.schedule.rules import ScheduleError, form_of
from pipetutor.schedule.rules import check as check_schedule
from pipetutor.schedule.text import csv, streams_of
from pipetutor.system import machine
from pipetutor.system.gpus import Gpus
from pipetutor.system.kinds import check, closest, counted
from pipetutor.system.network import check_network

__all__ = ["World", "preflight"]

SLOW = (
    "this processor has no instructions for numbers of 16 bits, and a step can take two to twenty times as long as "
    "in fp32; dtype='fp32' (--dtype fp32) is the way round"
)
DEEPSPEED = "engine='deepspeed' (--engine deepspeed)"


@dataclass(frozen=True)
class World:
    """Where a run is to take place.

    Attributes:
        ranks: processes of the job.
        local_ranks: those of them that are on this host.
        gpus: the CUDA devices that they can use.
        hosts: that were made for this run on this machine; 0 where none were.
    """

    ranks: int
    local_ranks: int
    gpus: Gpus
    hosts: int = 0


def preflight(options: Options, world: World, about: Description) -> Plan:
    """Check a whole run and say what it will be.

    Args:
        options: what is asked for.
        world: where.
        about: its model and data.

    Returns:
        The plan; with ``partition="profile"`` its bounds are left to ``pipetutor.costs.profile.cut``.

    Raises:
        ValueError: what was given, what is needed, and a value that would work.

    >>> from pipetutor.processes.describe import describe
    >>> preflight(Options(stages=2), World(2, 2, Gpus(0)), describe("alexnet", "synthetic")).bounds
    [0, 19, 22]
    """
    check("ranks", world.ranks, "count")
    config = read_config(options.config, options.dtype)
    layers = about.layers
    _check_stages(options, layers, world.ranks)
    batch = _batch(options, config, world.ranks, about.data.train)
    options, played = _schedule(options, batch)
    _check_hosts(options, world)
    _check_optimizer(options, config)
    backend, notices = _backend(options, config, world)
    done = _resume(options, config)
    if backend == "gloo" and not half_precision(config) and world.local_ranks == world.ranks and done < options.steps:
        _check_memory(options.model, layers, config, batch.replicas)
    if options.fault is not None:
        Fault.parse(options.fault).check(world.ranks, options.stages, options.steps, done, world.hosts)
    notices += played
    if (half := half_precision(config)) and backend == "gloo" and not machine.bf16_is_native():  # it loads torch
        notices.append(f"{half}: {SLOW}")
    plan = Plan(
        options=options,
        config=config,
        batch=batch,
        bounds=[],
        layers=tuple(layers),
        data=about.data,
        backend=backend,
        done=done,
        notice="\n".join(notices),
    )
    _check_engine(plan)
    return replace(plan, bounds=_bounds(plan)) if options.stages else plan


def _check_stages(options: Options, layers: Sequence[Layer], ranks: int) -> None:
    """Refuse numbers of stages, chunks and ranks that do not go together."""
    stages, chunks = options.stages, options.chunks
    if not stages and (options.schedule != "1f1b" or chunks > 1):
        raise ValueError(
            "stages is 0, and the baseline has no schedule and no chunks: leave them out (schedule, chunks), or use "
            "1 stage or more"
        )
    named = options.schedule if isinstance(options.schedule, str) and options.schedule in SCHEDULES else ""
    if chunks > 1 and named not in LOOPED:
        alone = counted(stages_a_rank(named), "stage") if named else ""
        gives = f"{named} gives each rank {alone}" if named else "your own schedule says itself what a rank has"
        raise ValueError(
            f"chunks is {chunks}, but {gives}: schedule='interleaved_1f1b' (--schedule interleaved_1f1b) takes more"
        )
    if not stages and options.partition != "parameters":
        raise ValueError(
            f"partition {options.partition} says where to cut a pipeline, and stages is 0: leave it out, or use 1 or "
            "more"
        )
    if stages:
        check_stages(layers, stages * (stages_a_rank(named, chunks) if named else 1))
    if stages and ranks % stages:
        raise ValueError(_other_numbers(ranks, stages))


def _schedule(options: Options, batch: Batch) -> tuple[Options, list[str]]:
    """Check a schedule of one's own; return the options with it as a text, and what playing it says."""
    schedule = options.schedule
    if isinstance(schedule, str) and schedule in SCHEDULES:
        return options, []
    if isinstance(schedule, Path) or (isinstance(schedule, str) and _is_path(schedule)):
        schedule = _read_schedule(Path(schedule))
    try:
        streams = streams_of(schedule, options.stages, batch.accumulation)
        check_schedule(streams)
    except ScheduleError as error:
        raise ValueError(f"schedule: {error}") from None
    form = form_of(streams)
    if len(streams) != options.stages:
        raise ValueError(
            f"the schedule is for {counted(len(streams), 'rank')}, and stages is {options.stages}: write a row a "
            f"rank, or give stages={len(streams)} (-p {len(streams)})"
        )
    if form.micro_batches != batch.accumulation:
        raise ValueError(
            f"the schedule has {counted(form.micro_batches, 'micro-batch')}, and a train batch of {batch.train} in "
            f"micro-batches of {batch.micro} has {batch.accumulation}: change the schedule, or the config, with "
            f"train_batch_size {batch.micro * form.micro_batches}, say"
        )
    from pipetutor.schedule import simulate, timeline  # numpy: loaded only by who brings a schedule

    played = simulate.simulate(streams, simulate.Costs.equal(form.stages))
    held = [peak.micro_batches for peak in timeline.peak_live(played)]
    notice = (
        f"your schedule: {counted(form.stages, 'stage')} of equal work idle {played.bubble:.1%} of each step, if a "
        f"backward pass is two forward passes long; at most {counted(max(held), 'micro-batch')} in flight on a rank"
    )
    return replace(options, schedule=csv(streams)), [notice]


def _is_path(schedule: str) -> bool:
    """Tell a path from passes: it may hold blanks and commas, too, but then the file is there."""
    return not re.search(r"[\s,]", schedule) or os.path.isfile(schedule)


def _read_schedule(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        if path.suffix:
            raise ValueError(f"schedule: there is no file {path}; give one that is there, or a text") from None
        close = closest(str(path), list(SCHEDULES), 0.4) or next(iter(SCHEDULES))
        raise ValueError(
            f"unknown schedule {str(path)!r}, and no file: try {close!r} (there is {', '.join(SCHEDULES)}), or write "
            "one of your own, such as 'F0 F1 B0 B1 / F0 B0 F1 B1'"
        ) from None
    except (OSError, ValueError) as error:  # of bytes that are no text, and of a name that is none
        raise ValueError(
            f"schedule {path} cannot be read ({error}): give a text file, with a row for each rank"
        ) from None


def _bounds(plan: Plan) -> list[int]:
    """Return the cut, or none where it is to be measured."""
    stages, partition = len(plan.placement), plan.options.partition
    check_stages(plan.layers, stages)
    return [] if partition == PROFILE else bounds_for(plan.layers, stages, partition)


def _check_hosts(options: Options, world: World) -> None:
    if options.link is not None and not world.hosts:
        raise ValueError(f"link {options.link}: it is between hosts, and there is 1: give hosts=2, say")
    if world.hosts and world.ranks % world.hosts:
        fitting = ", ".join(str(number) for number in range(2, world.ranks + 1) if world.ranks % number == 0)
        raise ValueError(
            f"{world.hosts} hosts cannot share {counted(world.ranks, 'rank')} evenly: use "
            + (f"{fitting} hosts, or " if fitting else "")
            + ("more stages or replicas" if options.stages else "more replicas")
        )


def _other_numbers(ranks: int, stages: int) -> str:
    """Say which numbers of ranks, and of stages, would do."""
    less = [stages * (ranks // stages)] if ranks > stages else []
    more = " or ".join(map(str, [*less, stages * (ranks // stages + 1)]))
    fitting = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
    return (
        f"{counted(ranks, 'rank')} cannot be divided into {counted(stages, 'stage')}: start {more} ranks "
        f"(deepspeed --num_gpus N), or use another number of stages (-p): {fitting}"
    )


def _batch(options: Options, config: dict[str, Any], ranks: int, examples: int) -> Batch:
    batch = batch_arithmetic(config, ranks // options.stages if options.stages else ranks)
    least = batch.micro * batch.replicas
    if least > examples:
        raise ValueError(
            f"one micro-batch on every replica takes {batch.micro} x {batch.replicas} = {least} examples, but "
            f"{options.dataset} has {examples}: use a micro-batch of at most {examples // batch.replicas}"
        )
    return batch


def _zero_stage(config: dict[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def _check_optimizer(options: Options, config: dict[str, Any]) -> None:
    """Refuse an optimizer that is not there, or that cannot be split or saved as asked."""
    zero_stage = _zero_stage(config)
    if options.stages and zero_stage >= 2:
        raise ValueError(
            f"zero_optimization stage {zero_stage} cannot be combined with {options.stages} pipeline stages: ZeRO 2 "
            "and 3 scatter each micro-batch's gradients, and a pipeline accumulates them whole until the step ends; "
            "use stage 1 or 0"
        )
    if "optimizer" not in config:
        raise ValueError(f"the config has no optimizer, and nothing would be learned: add {OBJECTS['optimizer']}")
    kind = config["optimizer"]["type"]
    if zero_stage and kind not in ("Adam", "AdamW", "Adagrad") and not config.get("zero_allow_untested_optimizer"):
        raise ValueError(
            f"zero_optimization stage {zero_stage} splits Adam, AdamW and Adagrad, not {kind}: use one of them, or "
            'stage 0, or add "zero_allow_untested_optimizer": true'
        )
    if options.resume is None and options.save_every is None:
        return
    if dtype_of(config) == "fp16":
        raise ValueError("fp16 cannot be saved or resumed: its loss scale would start anew; use fp32 or bf16")
    if zero_stage == 3:
        raise ValueError(
            "zero_optimization stage 3 cannot be saved or resumed: it splits the model's weights over replicas; use "
            "stage 2, 1 or 0"
        )


def _backend(options: Options, config: dict[str, Any], world: World) -> tuple[str, list[str]]:
    """Return the backend, and what is to be said of the choice."""
    gpus, ranks, half = world.gpus, world.local_ranks, half_precision(config)
    if world.hosts:
        if options.backend == "nccl":
            raise ValueError(
                f"{counted(world.hosts, 'host')} on this machine compute on its CPU, with gloo: leave the backend "
                "out, or leave hosts out and use the GPUs as one host"
            )
        gpus = Gpus(0)
    why = f" to use ({gpus.why})" if gpus.why else ""
    served = gpus.count >= ranks
    if options.backend == "nccl" and not served:
        raise ValueError(
            f"nccl needs one GPU for each of {counted(ranks, 'rank')}, and this machine has {gpus.count}{why}: "
            + (f"use at most {counted(gpus.count, 'rank')}, or " if gpus.count else "")
            + "leave the backend out (or --backend gloo) to run on the CPU"
        )
    backend = options.backend or ("nccl" if served else "gloo")
    check_network(backend)
    if half == "fp16" and backend == "gloo":
        raise ValueError(
            "fp16 needs a GPU for each rank, and this run is on the CPU: use fp32 (dtype='fp32', --dtype fp32) or "
            "bf16"
        )
    if options.memory_limit and backend == "nccl":
        raise ValueError(
            "memory_limit limits the memory of processes, and this run computes in that of GPUs: leave it out, or "
            "use the CPU (--backend gloo)"
        )
    if options.partition == PROFILE and backend == "nccl":
        raise ValueError(
            "partition 'profile' measures layers on the CPU, and this run computes on GPUs, where they take other "
            "times: use parameters, bounds of your own, or the CPU (--backend gloo)"
        )
    if options.partition == PROFILE and half:
        raise ValueError(f"partition 'profile' measures fp32, and the config enables {half}: give up one of them")
    if options.backend is None and not served and (gpus.count or gpus.why):
        return backend, [
            f"{counted(gpus.count, 'GPU')}{why} cannot serve {counted(ranks, 'rank')}, nccl wants one each: "
            "running on the CPU with gloo"
        ]
    return backend, []


def _resume(options: Options, config: dict[str, Any]) -> int:
    """Return the step after which the run begins."""
    if options.resume is None:
        return 0
    if options.weights is not None:
        raise ValueError(
            f"weights {options.weights} and checkpoint {options.resume}: a checkpoint has weights, so give one of "
            "them"
        )
    manifest = checkpoint.verify(options.resume)
    checkpoint.check_fits(manifest, checkpoint.identity(options, config), options.steps)
    done = manifest["step"]
    if done == options.steps and options.eval_every is None:
        raise ValueError(
            f"nothing is left to do: the checkpoint stands after step {done}, and steps is {options.steps}, counted "
            f"from the first run's start; give it at least {done + 1}, or evaluate the checkpoint (eval_every=1, "
            "--eval-every 1)"
        )
    return done


def _check_memory(model: str, layers: Sequence[Layer], config: dict[str, Any], replicas: int) -> None:
    """Refuse what surely does not fit: a step holds weights, gradients and the optimizer's moments, all at once."""
    kind = config["optimizer"]["type"]
    moments = {"Adam": 2, "AdamW": 2, "Adagrad": 1}.get(kind, 0)
    shared = (1 + moments) if _zero_stage(config) else 0  # ZeRO splits them over the replicas
    needed = 4 * parameters_of(layers) * (shared + replicas * (2 + moments - shared))
    there = machine.memory().total + psutil.swap_memory().total
    if needed > there:
        copies = f" in {replicas} replicas" if replicas > 1 else ""
        raise ValueError(
            f"{model} and {kind}{copies} take {needed / 2**30:.1f} GiB, weights, gradients and moments alone, and "
            f"this machine, or the container on it, has {there / 2**30:.1f} GiB: give it more, or use "
            + ("fewer replicas" if replicas > 1 else "a smaller model")
        )


def _check_engine(plan: Plan) -> None:
    """Refuse what the engine does not run."""
    options, own = plan.options, "" if plan.schedule in SCHEDULES else "a schedule of one's own"
    if options.engine == "deepspeed" and options.schedule != "1f1b":
        raise ValueError(
            f"DeepSpeed's engine runs 1f1b, not {own or plan.schedule}: engine='torch' (--engine torch) runs it"
        )
    if plan.config.get("pipeline", {}).get("activation_checkpoint_interval"):
        raise ValueError(
            "pipeline.activation_checkpoint_interval: with DeepSpeed's own recomputing, running statistics take in "
            "each micro-batch twice; leave it out, and recompute with recompute=True (--recompute)"
        )
    if options.recompute and not options.stages:
        raise ValueError("recompute is for the stages of a pipeline, and stages is 0: leave it out, or use 1 or more")
    if options.recompute and any(i.name == "BackwardWeight" for stream in plan.streams for i in stream):
        raise ValueError(
            f"{own or plan.schedule} cannot recompute: it splits backward passes, and would compute a stage anew for "
            "each half; use 1f1b"
        )
    if options.engine == "torch":
        _check_torch_runs(options, plan.batch, plan.config)
        if not own:
            idle_share(plan.schedule, options.stages, plan.batch.accumulation, options.chunks)


def _check_torch_runs(options: Options, batch: Batch, config: dict[str, Any]) -> None:
    if not options.stages:
        raise ValueError(
            f"engine 'torch' runs pipelines: give it at least 1 stage (-p 1), or {DEEPSPEED} for the baseline"
        )
    if batch.replicas > 1:
        raise ValueError(f"engine 'torch' runs 1 replica, not {batch.replicas}: {DEEPSPEED} runs more")
    batches = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    known = batches | {"optimizer", "gradient_clipping"}
    asked = [name for name in ("eval_every", "save_every", "resume") if getattr(options, name) is not None]
    for name in (*config, *asked):
        if name not in known:
            raise ValueError(f"engine 'torch' does not know {name}: leave it out, or use {DEEPSPEED}")
    kind, params = config["optimizer"]["type"], config["optimizer"].get("params", {})
    if kind not in ("Adam", "AdamW", "SGD") or not params.get("torch_adam", True):
        raise ValueError(f"engine 'torch' trains with torch's Adam, AdamW or SGD, not with {kind!r} and {params}")
