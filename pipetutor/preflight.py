"""Everything that can be known to be wrong before a process starts.

``launch`` and every rank call the same ``preflight``, so a cell and a terminal refuse the same things with
the same words. No torch: it answers in milliseconds, unless a run on the CPU asks for numbers of 16 bits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipetutor.core import checkpoint
from pipetutor.core.batch import Batch, batch_arithmetic
from pipetutor.core.config import OBJECTS, dtype_of, half_precision
from pipetutor.core.partition import METHODS, PROFILE, bounds_for, catalog, check_stages
from pipetutor.processes.faults import Fault
from pipetutor.schedule.orders import SCHEDULES, idle_share
from pipetutor.system import machine
from pipetutor.system.gpus import Gpus
from pipetutor.system.kinds import KINDS, Kind, check
from pipetutor.system.network import check_network

DATASET_SIZES = {"synthetic": 2_000, "cifar10": 50_000}
BACKENDS = ("gloo", "nccl")
ENGINES = ("deepspeed", "torch")
TRANSFORMS = ("batched", "pil")
SLOW = (
    "this processor has no instructions for numbers of 16 bits, and a step can take two to twenty times as long as "
    "in fp32; dtype='fp32' (--dtype fp32) is the way round"
)
OPTIONS: dict[str, Any] = {  # of every run, and their kinds; see pipetutor.system.kinds
    "ranks": "count",
    "stages": "whole",
    "steps": "count",
    "dataset": tuple(DATASET_SIZES),
    "partition": Kind(f"a string: {METHODS}", KINDS["text"].fits),
    "backend": (None, *BACKENDS),
    "dropout": "share?",
    "seed": "seed",
    "eval_every": "count?",
    "save_every": "count?",
    "resume": "path?",
    "weights": "path?",
    "fault": "text?",
    "transforms": TRANSFORMS,
    "engine": ENGINES,
    "schedule": tuple(SCHEDULES),
    "chunks": "count",
    "recompute": "switch",
}


@dataclass(frozen=True)
class Plan:
    """What a run will be, once nothing is wrong with it.

    Attributes:
        stages: pipeline stages P; 0 for the data-parallel baseline.
        batch: the batch arithmetic.
        bounds: partition bounds, P x chunks + 1 layer indices; empty for the baseline, and for ``profile`` until
            ``pipetutor.costs.profile.cut`` has chosen them.
        layers: class name of each layer; empty for the baseline.
        backend: ``nccl`` or ``gloo``.
        engine: ``deepspeed`` or ``torch``.
        schedule: a name of ``schedules.SCHEDULES``.
        chunks: stages of the model on each rank.
        done: steps that the checkpoint holds from which the run resumes; 0 without one.
        notice: what was decided for the user and why; empty when nothing was.
    """

    stages: int
    batch: Batch
    bounds: list[int]
    layers: list[str]
    backend: str
    engine: str
    schedule: str
    chunks: int
    done: int
    notice: str

    def record(self) -> dict[str, Any]:
        """Return the plan as the fields of run.json."""
        return {
            "stages": self.stages,
            "replicas": self.batch.replicas,
            "train_batch": self.batch.train,
            "micro_batch": self.batch.micro,
            "micro_batches": self.batch.accumulation,
            "parts": self.bounds,
            "layers": self.layers,
            "backend": self.backend,
            "engine": self.engine,
            "schedule": self.schedule,
            "chunks": self.chunks,
            "done": self.done,
        }


def preflight(
    *,
    ranks: int,
    stages: int,
    steps: int,
    model: str,
    dataset: str,
    partition: str,
    config: dict[str, Any],
    backend: str | None,
    gpus: Gpus,
    local_ranks: int | None = None,
    dropout: float | None = None,
    seed: int = 0,
    eval_every: int | None = None,
    save_every: int | None = None,
    resume: str | Path | None = None,
    weights: str | Path | None = None,
    fault: str | None = None,
    transforms: str = "batched",
    engine: str = "deepspeed",
    schedule: str = "1f1b",
    chunks: int = 1,
    recompute: bool = False,
) -> Plan:
    """Check a whole run and say what it will be.

    Args:
        ranks: processes of the job.
        stages: pipeline stages P; 0 for the data-parallel baseline.
        steps: train batches to run.
        model: a model of ``partition.catalog()``.
        dataset: ``cifar10`` or ``synthetic``.
        partition: see ``partition.bounds_for``; ``profile`` is checked, and left to ``pipetutor.costs.profile.cut``.
        config: a whole DeepSpeed config, from ``read_config``.
        backend: ``nccl``, ``gloo`` or None: nccl where CUDA can serve every rank, else gloo.
        gpus: the CUDA devices that ranks on this host can use.
        local_ranks: ranks on this host; all of them where it is not given.
        dropout: probability for every dropout layer, or None for the model's own.
        seed: of weights and data order.
        eval_every: steps between evaluations, or None for no evaluation.
        save_every: steps between checkpoints, or None for no checkpoint.
        resume: a checkpoint, or a run directory, to go on from.
        weights: a ``state_dict`` file to start from.
        fault: a fault to inject; see ``pipetutor.processes.faults``.
        transforms: ``batched`` or ``pil``.
        engine: ``deepspeed`` or ``torch``.
        schedule: a name of ``schedules.SCHEDULES``.
        chunks: stages of the model on each rank.
        recompute: whether stages recompute their activations.

    Raises:
        ValueError: what was given, what is needed, and a value that would work.
    """
    given = locals()
    for name, kind in OPTIONS.items():
        check(name, given[name], kind)
    check("model", model, sorted(catalog()))
    layers = catalog()[model]
    if chunks > 1 and schedule != "interleaved_1f1b":
        raise ValueError(
            f"chunks is {chunks}, but {schedule} gives each rank one stage: schedule='interleaved_1f1b' takes more"
        )
    if stages:
        check_stages(layers, stages * chunks)
    elif partition != "parameters":
        raise ValueError(
            f"partition {partition} says where to cut a pipeline, and stages is 0: leave it out, or use 1 or more"
        )
    if stages and ranks % stages:
        raise ValueError(_other_numbers(ranks, stages))
    profiled = partition == PROFILE
    bounds = bounds_for(layers, stages * chunks, partition) if stages and not profiled else []
    zero_stage = config.get("zero_optimization", {}).get("stage", 0)
    if stages and zero_stage >= 2:
        raise ValueError(
            f"zero_optimization stage {zero_stage} cannot be combined with {stages} pipeline stages: ZeRO 2 and 3 "
            "scatter each micro-batch's gradients, and a pipeline accumulates them whole until the step ends; "
            "use stage 1 or 0"
        )
    batch = batch_arithmetic(config, ranks // stages if stages else ranks)
    if batch.micro * batch.replicas > DATASET_SIZES[dataset]:
        raise ValueError(
            f"one micro-batch on every replica takes {batch.micro} x {batch.replicas} = "
            f"{batch.micro * batch.replicas} images, but {dataset} has {DATASET_SIZES[dataset]}: use a micro-batch "
            f"of at most {DATASET_SIZES[dataset] // batch.replicas}"
        )
    if "optimizer" not in config:
        raise ValueError(f"the config has no optimizer, and nothing would be learned: add {OBJECTS['optimizer']}")
    _check_optimizer_can_be_split(config, zero_stage)
    local_ranks = local_ranks or ranks
    why = f" to use ({gpus.why})" if gpus.why else ""
    if backend == "nccl" and gpus.count < local_ranks:
        raise ValueError(
            f"nccl needs one GPU for each of the {local_ranks} ranks, and this machine has {gpus.count}{why}: "
            + (f"use at most {gpus.count} ranks, or " if gpus.count else "")
            + "leave the backend out (or --backend gloo) to run on the CPU"
        )
    chosen = backend or ("nccl" if gpus.count >= local_ranks else "gloo")
    check_network(chosen)
    half = half_precision(config)
    if half == "fp16" and chosen == "gloo":
        raise ValueError(
            "fp16 needs a GPU for each rank, and this run is on the CPU: use fp32 (dtype='fp32') or bf16"
        )
    if profiled:
        _check_is_measured(chosen, half)
    done = 0
    if resume is not None or save_every is not None:
        _check_optimizer_can_be_saved(config, zero_stage)
    if weights is not None and resume is not None:
        raise ValueError(f"weights {weights} and checkpoint {resume}: a checkpoint has weights, so give one of them")
    if resume is not None:
        manifest = checkpoint.verify(resume)
        checkpoint.check_fits(manifest, checkpoint.identity(model, dataset, seed, config), steps)
        done = manifest["step"]
        if done == steps and eval_every is None:
            raise ValueError(
                f"nothing is left to do: the checkpoint stands after step {done}, and steps is {steps}, counted from "
                f"the first run's start; give it at least {done + 1}, or evaluate the checkpoint (eval_every=1, "
                "--eval-every 1)"
            )
    if chosen == "gloo" and not half and local_ranks == ranks and done < steps:
        _check_memory(model, sum(layer.parameters for layer in layers), config, zero_stage, batch.replicas)
    if fault is not None:
        Fault.parse(fault).check(ranks, stages, steps, done)
    if engine == "deepspeed" and schedule != "1f1b":
        raise ValueError(f"DeepSpeed's engine runs 1f1b, not {schedule}: engine='torch' (--engine torch) runs it")
    if config.get("pipeline", {}).get("activation_checkpoint_interval"):
        raise ValueError(
            "pipeline.activation_checkpoint_interval: with DeepSpeed's own recomputing, running statistics take in "
            "each micro-batch twice; leave it out, and recompute with recompute=True (--recompute)"
        )
    if recompute and not stages:
        raise ValueError("recompute is for the stages of a pipeline, and stages is 0: leave it out, or use 1 or more")
    if recompute and schedule == "zero_bubble":
        raise ValueError("zero_bubble cannot recompute: it would compute a stage once more for each weight; use 1f1b")
    if engine == "torch":
        others = {"eval_every": eval_every, "save_every": save_every, "resume": resume}
        _check_torch_runs(stages, batch, config, others)
        idle_share(schedule, stages, batch.accumulation, chunks)
    notices = []
    if backend is None and gpus.count < local_ranks and (gpus.count or gpus.why):
        notices = [
            f"{gpus.count} GPU(s){why} cannot serve {local_ranks} ranks, nccl wants one each: running on the CPU "
            "with gloo"
        ]
    if half and chosen == "gloo" and not machine.bf16_is_native():  # asked last: it loads torch
        notices.append(f"{half}: {SLOW}")
    return Plan(
        stages=stages,
        batch=batch,
        bounds=bounds,
        layers=[layer.kind for layer in layers] if stages else [],
        backend=chosen,
        engine=engine,
        schedule=schedule,
        chunks=chunks,
        done=done,
        notice="\n".join(notices),
    )


def _other_numbers(ranks: int, stages: int) -> str:
    """Say which numbers of ranks, and of stages, would do."""
    less = [stages * (ranks // stages)] if ranks > stages else []
    more = " or ".join(map(str, [*less, stages * (ranks // stages + 1)]))
    fitting = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
    return (
        f"{ranks} rank{'s' if ranks > 1 else ''} cannot be divided into {stages} stages: start {more} ranks "
        f"(deepspeed --num_gpus N), or use another number of stages (-p): {fitting}"
    )


def _check_is_measured(backend: str, half: str) -> None:
    """Refuse to cut by the times of another device or number format than the run's."""
    if backend == "nccl":
        raise ValueError(
            "partition 'profile' measures layers on the CPU, and this run computes on GPUs, where they take other "
            "times: use parameters, bounds of your own, or the CPU (--backend gloo)"
        )
    if half:
        raise ValueError(f"partition 'profile' measures fp32, and the config enables {half}: give up one of them")


def _check_optimizer_can_be_split(config: dict[str, Any], zero_stage: int) -> None:
    kind = config["optimizer"]["type"]
    if zero_stage and kind not in ("Adam", "AdamW", "Adagrad") and not config.get("zero_allow_untested_optimizer"):
        raise ValueError(
            f"zero_optimization stage {zero_stage} splits Adam, AdamW and Adagrad, not {kind}: use one of them, or "
            'stage 0, or add "zero_allow_untested_optimizer": true'
        )


def _check_optimizer_can_be_saved(config: dict[str, Any], zero_stage: int) -> None:
    if (name := dtype_of(config)) != "fp32":
        raise ValueError(f"{name} cannot be saved or resumed: its optimizer keeps copies without names; use fp32")
    if zero_stage:
        raise ValueError(
            f"zero_optimization stage {zero_stage} cannot be saved or resumed: it splits each optimizer tensor over "
            "replicas; use stage 0"
        )


def _check_memory(model: str, parameters: int, config: dict[str, Any], zero_stage: int, replicas: int) -> None:
    """Refuse what surely does not fit: a step holds weights, gradients and the optimizer's moments, all at once."""
    kind = config["optimizer"]["type"]
    moments = {"Adam": 2, "AdamW": 2, "Adagrad": 1}.get(kind, 0)
    shared = (1 + moments) if zero_stage else 0  # ZeRO splits them over the replicas
    needed = 4 * parameters * (shared + replicas * (2 + moments - shared))
    there = machine.memory().total + psutil.swap_memory().total
    if needed > there:
        copies = f" in {replicas} replicas" if replicas > 1 else ""
        raise ValueError(
            f"{model} and {kind}{copies} take {needed / 2**30:.1f} GiB, weights, gradients and moments alone, and "
            f"this machine, or the container on it, has {there / 2**30:.1f} GiB: give it more, or use "
            + ("fewer replicas" if replicas > 1 else "a smaller model")
        )


def _check_torch_runs(stages: int, batch: Batch, config: dict[str, Any], others: dict[str, Any]) -> None:
    if not stages:
        raise ValueError(
            "engine 'torch' runs pipelines: give it at least 1 stage, or engine='deepspeed' for the baseline"
        )
    if batch.replicas > 1:
        raise ValueError(f"engine 'torch' runs 1 replica, not {batch.replicas}: engine='deepspeed' runs more")
    known = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer"}
    for name in (*config, *(name for name, value in others.items() if value is not None)):
        if name not in known:
            raise ValueError(f"engine 'torch' does not know {name}: leave it out, or use engine='deepspeed'")
    kind, params = config["optimizer"]["type"], config["optimizer"].get("params", {})
    if kind not in ("Adam", "AdamW", "SGD") or not params.get("torch_adam", True):
        raise ValueError(f"engine 'torch' trains with torch's Adam, AdamW or SGD, not with {kind!r} and {params}")
