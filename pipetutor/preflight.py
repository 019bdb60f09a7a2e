"""Everything that can be known to be wrong before a process starts.

``launch`` and every rank call the same ``preflight``, so a cell and a terminal refuse the same things with
the same words. No torch: it answers in milliseconds.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipetutor import checkpoint
from pipetutor.config import OBJECTS
from pipetutor.faults import Fault
from pipetutor.partition import METHODS, bounds_for, catalog

DATASET_SIZES = {"cifar10": 50_000, "synthetic": 2_000}
BACKENDS = ("gloo", "nccl")


@dataclass(frozen=True)
class Batch:
    """The batch arithmetic: train = micro x accumulation x replicas.

    Attributes:
        train: images a step, over all replicas (DeepSpeed's ``train_batch_size``).
        micro: images a micro-batch (``train_micro_batch_size_per_gpu``).
        accumulation: micro-batches a step and replica (``gradient_accumulation_steps``); a pipeline's M.
        replicas: data-parallel copies.
    """

    train: int
    micro: int
    accumulation: int
    replicas: int

    def __str__(self) -> str:
        return (
            f"train batch {self.train} = micro-batch {self.micro} x {self.accumulation} micro-batches "
            f"x {self.replicas} replica{'s' if self.replicas > 1 else ''}"
        )


@dataclass(frozen=True)
class Plan:
    """What a run will be, once nothing is wrong with it.

    Attributes:
        stages: pipeline stages P; 0 for the data-parallel baseline.
        batch: the batch arithmetic.
        bounds: partition bounds, P + 1 layer indices; empty for the baseline.
        layers: class name of each layer; empty for the baseline.
        backend: ``nccl`` or ``gloo``.
        done: steps that the checkpoint holds from which the run resumes; 0 without one.
        notice: what was decided for the user and why; empty when nothing was.
    """

    stages: int
    batch: Batch
    bounds: list[int]
    layers: list[str]
    backend: str
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
            "done": self.done,
        }


def _natural(name: str, value: Any, least: int, example: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}: {example}, say")
    return value


def batch_arithmetic(config: dict[str, Any], replicas: int) -> Batch:
    """Solve train = micro x accumulation x replicas for what the config leaves out, as DeepSpeed does.

    Raises:
        ValueError: a value is not a positive whole number, or the product does not hold; the message gives
            the nearest triple that does.

    >>> print(batch_arithmetic({"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8}, 2))
    train batch 256 = micro-batch 8 x 16 micro-batches x 2 replicas
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = [None if config.get(name) is None else _natural(name, config[name], 1) for name in names]
    train, micro, accumulation = given
    if train is None and micro is None:
        raise ValueError("the config needs train_batch_size or train_micro_batch_size_per_gpu: 256 and 8, say")
    if micro is None:
        assert train is not None
        micro = max(1, train // ((accumulation or 1) * replicas))
    if accumulation is None:
        accumulation = 1 if train is None else max(1, round(train / (micro * replicas)))
    nearest = Batch(micro * accumulation * replicas, micro, accumulation, replicas)
    if train not in (None, nearest.train):
        raise ValueError(
            f"train batch {train} is not micro-batch {micro} x {given[2] or 'a whole number of'} micro-batches x "
            f"{replicas} replicas; the nearest that works: {nearest}"
        )
    return nearest


def explain(config: dict[str, Any], stages: int, replicas: int = 1) -> str:
    """Explain the batch arithmetic with a run's own numbers, as ``launch`` and the command line print it.

    Args:
        config: a whole DeepSpeed config, from ``read_config``.
        stages: pipeline stages P; 0 for the data-parallel baseline.
        replicas: data-parallel copies.

    Raises:
        ValueError: see ``batch_arithmetic``.

    >>> print(explain(read_config(None), stages=2, replicas=2))
    train batch 256 = micro-batch 8 x 16 micro-batches x 2 replicas
    gradient accumulation 16 = 256 / (8 x 2): it is the pipeline's M
    P = 2, M = 16: stages of equal work idle (P-1)/(M+P-1) = 1/17 = 5.9 % of each step
    """
    batch = batch_arithmetic(config, replicas)
    whose = "it is the pipeline's M" if stages else "gradients of so many micro-batches are added up, then one step"
    m = batch.accumulation
    lines = [str(batch), f"gradient accumulation {m} = {batch.train} / ({batch.micro} x {replicas}): {whose}"]
    if stages:
        idle, parts = stages - 1, m + stages - 1
        lines.append(
            f"P = {stages}, M = {m}: stages of equal work idle (P-1)/(M+P-1) = {idle}/{parts} = "
            f"{100 * idle / parts:.1f} % of each step"
        )
    return "\n".join(lines)


def _one_of(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4) or known[:1]
        listed = ", ".join(known) if len(known) < 12 else f"one of {len(known)}, from {known[0]} to {known[-1]}"
        raise ValueError(f"unknown {name} {value!r}: try {close[0]!r} (there is {listed})")


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
    gpus: int,
    local_ranks: int | None = None,
    dropout: float | None = None,
    seed: int = 0,
    eval_every: int | None = None,
    save_every: int | None = None,
    resume: str | Path | None = None,
    weights: str | Path | None = None,
    fault: str | None = None,
) -> Plan:
    """Check a whole run and say what it will be.

    Args:
        ranks: processes of the job.
        stages: pipeline stages P; 0 for the data-parallel baseline.
        steps: train batches to run.
        model: a model of ``partition.catalog()``.
        dataset: ``cifar10`` or ``synthetic``.
        partition: see ``partition.bounds_for``.
        config: a whole DeepSpeed config, from ``read_config``.
        backend: ``nccl``, ``gloo`` or None: nccl where CUDA can serve every rank, else gloo.
        gpus: CUDA devices of this host.
        local_ranks: ranks on this host; all of them where it is not given.
        dropout: probability for every dropout layer, or None for the model's own.
        seed: of weights and data order.
        eval_every: steps between evaluations, or None for no evaluation.
        save_every: steps between checkpoints, or None for no checkpoint.
        resume: a checkpoint, or a run directory, to go on from.
        weights: a ``state_dict`` file to start from.
        fault: a fault to inject; see ``pipetutor.faults``.

    Raises:
        ValueError: what was given, what is needed, and a value that would work.
    """
    _natural("stages", stages, 0, example=2)
    _natural("ranks", ranks, 1)
    _natural("steps", steps, 1)
    if _natural("seed", seed, 0) >= 2**32:
        raise ValueError(f"seed is {seed}, but must be below 2**32 = {2**32}: 1138, say")
    for name, value in {"eval_every": eval_every, "save_every": save_every}.items():
        if value is not None:
            _natural(name, value, 1, example=10)
    if dropout is not None and (isinstance(dropout, bool | str) or not 0 <= dropout < 1):
        raise ValueError(f"dropout is {dropout!r}, but must be a number from 0 and below 1: 0 turns it off")
    if not isinstance(partition, str):
        raise ValueError(f"partition is {partition!r}, but must be a string: {METHODS}")
    if stages and ranks % stages:
        fits = f"{ranks - ranks % stages} or " if ranks > stages else ""
        raise ValueError(
            f"{ranks} rank{'s' if ranks > 1 else ''} cannot be divided into {stages} stages: "
            f"start {fits}{ranks + stages - ranks % stages} ranks (deepspeed --num_gpus N)"
        )
    _one_of("model", model, sorted(catalog()))
    _one_of("dataset", dataset, sorted(DATASET_SIZES))
    layers = catalog()[model]
    bounds = bounds_for(layers, stages, partition) if stages else []
    zero_stage = _natural("zero_optimization stage", config.get("zero_optimization", {}).get("stage", 0), 0)
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
    if backend is not None:
        _one_of("backend", backend, list(BACKENDS))
    local_ranks = local_ranks or ranks
    if backend == "nccl" and gpus < local_ranks:
        raise ValueError(
            f"nccl needs one GPU for each of the {local_ranks} ranks, and this machine has {gpus}: "
            + ("use at most " + str(gpus) + " ranks, or " if gpus else "")
            + "leave the backend out (or --backend gloo) to run on the CPU"
        )
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
                f"the first run's start; give it at least {done + 1}, or evaluate the checkpoint (eval_every=1)"
            )
    if fault is not None:
        Fault.parse(fault).check(ranks, stages, steps)
    notice = ""
    if backend is None and 0 < gpus < local_ranks:
        notice = f"{gpus} GPU(s) cannot serve {local_ranks} ranks, nccl wants one each: running on the CPU with gloo"
    return Plan(
        stages=stages,
        batch=batch,
        bounds=bounds,
        layers=[layer.kind for layer in layers] if stages else [],
        backend=backend or ("nccl" if gpus >= local_ranks else "gloo"),
        done=done,
        notice=notice,
    )


def _check_optimizer_can_be_saved(config: dict[str, Any], zero_stage: int) -> None:
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled"):
            raise ValueError(f"{name} cannot be saved or resumed: its optimizer keeps copies without names; use fp32")
    if zero_stage:
        raise ValueError(
            f"zero_optimization stage {zero_stage} cannot be saved or resumed: it splits each optimizer tensor over "
            "replicas; use stage 0"
        )
