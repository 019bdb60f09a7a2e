"""What a cell runs: check, start the ranks, show progress, record, and leave nothing behind."""

import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipetutor.core import records
from pipetutor.core.batch import explain
from pipetutor.core.config import read_config
from pipetutor.core.partition import PROFILE
from pipetutor.core.records import Run
from pipetutor.data import fetch
from pipetutor.preflight import preflight
from pipetutor.processes.diagnosis import diagnose
from pipetutor.processes.environment import free_port, rank_environment
from pipetutor.processes.supervise import Process
from pipetutor.processes.watch import RunFailed, briefly, watch
from pipetutor.system import disk, machine
from pipetutor.system.gpus import gpus
from pipetutor.system.kinds import KINDS, check

# Options of a launch alone, and their kinds, beside those of preflight.OPTIONS.
OPTIONS = {
    "replicas": "count",
    "trace": "switch",
    "deadline": replace(KINDS["above 0"], example="300"),
    "data_dir": "path",
    "runs_dir": "path",
}
HOSTS = Path("/job/hostfile")


@briefly
def launch(
    stages: int = 2,
    replicas: int = 1,
    steps: int = 20,
    *,
    model: str = "alexnet",
    dataset: str = "synthetic",
    data_dir: str | Path = fetch.DATA_DIR,
    partition: str = "parameters",
    config: str | Path | dict[str, Any] | None = None,
    dropout: float | None = None,
    seed: int = 1138,
    backend: str | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    resume: str | Path | None = None,
    weights: str | Path | None = None,
    dtype: str | None = None,
    transforms: str = "batched",
    engine: str = "deepspeed",
    schedule: str = "1f1b",
    chunks: int = 1,
    recompute: bool = False,
    trace: bool = False,
    fault: str | None = None,
    deadline: float = 300,
    runs_dir: str | Path = "runs",
) -> Run:
    """Train in processes of their own, watch them, and return the record.

    The ranks are started as DeepSpeed's launcher starts them. A ``deepspeed`` command is printed that does the same
    work in a terminal, and records it in a directory of its own beside this run's (``…-again``). Whatever ends the
    call, an interrupt or the death of the kernel, no process stays.

    Args:
        stages: pipeline stages P; 0 trains the data-parallel baseline.
        replicas: copies of the pipeline (or of the model, with stages=0), each on its own share of a batch.
        steps: train batches to run, those before a checkpoint included.
        model: ``alexnet`` or any model of ``pipetutor.core.partition.catalog()``.
        dataset: ``synthetic`` (embedded) or ``cifar10`` (downloaded once).
        data_dir: where the data is or will be.
        partition: ``parameters``, ``uniform``, ``type:REGEX``, bounds such as ``0,16,22``, or ``profile``: the best
            cut by what each layer costs on this CPU, which is measured the first time; see ``costs.profile``.
        config: DeepSpeed config: a file's path, or a dict laid over the packaged default.
        dropout: probability for every dropout layer; None keeps the model's own, 0 turns dropout off.
        seed: of weights, dropout and data order.
        backend: ``nccl`` or ``gloo``; by default what the machine can serve.
        eval_every: evaluate on the whole test set every so many steps and at the end.
        save_every: save a checkpoint every so many steps and at the end; the newest two are kept.
        resume: a checkpoint, or a run directory, whose newest is meant; stages and replicas may differ.
        weights: a torchvision ``state_dict`` file to start from.
        dtype: ``fp32`` or ``bf16``, put above what the config says.
        transforms: ``batched``: 8-bit images are enlarged a micro-batch at a time; ``pil``: one by one.
        engine: ``deepspeed``, or ``torch`` for ``torch.distributed.pipelining``, which plays every schedule.
        schedule: in which order a rank computes: a name of ``pipetutor.schedule.orders.SCHEDULES``.
        chunks: stages of the model on each rank, for ``interleaved_1f1b``; rank r holds the stages r, r + P, ...
        recompute: activation checkpointing: a stage keeps its input alone and computes the rest once more.
        trace: time every instruction on every rank; see ``pipetutor.tracing.trace``.
        fault: a fault to inject, such as ``stall:rank=1,step=3``; see ``pipetutor.processes.faults``.
        deadline: seconds without a completed step after which the run is ended and explained.
        runs_dir: where run directories are made.

    Returns:
        The finished run.

    Raises:
        ValueError: something asked for cannot work; nothing was started.
        RunFailed: a rank failed, or no step was completed within the deadline; its ``directory`` holds what is left.

    >>> run = launch(stages=2, steps=20)  # doctest: +SKIP
    >>> run.losses[-1], run.samples_per_second  # doctest: +SKIP
    """
    given = locals()
    for name, kind in {"stages": "whole", **OPTIONS}.items():
        check(name, given[name], kind)
    whole_config = read_config(config, dtype)
    ranks = max(stages, 1) * replicas
    plan = preflight(
        ranks=ranks,
        stages=stages,
        steps=steps,
        model=model,
        dataset=dataset,
        partition=partition,
        config=whole_config,
        backend=backend,
        gpus=gpus(ranks),
        dropout=dropout,
        seed=seed,
        eval_every=eval_every,
        save_every=save_every,
        resume=resume,
        weights=weights,
        fault=fault,
        transforms=transforms,
        engine=engine,
        schedule=schedule,
        chunks=chunks,
        recompute=recompute,
    )
    if weights is not None:
        _check_weights(model, weights)
    fetch.prepare(dataset, data_dir)
    table = ""
    if stages and partition == PROFILE:
        from pipetutor.costs import profile  # numpy: loaded only by who asks for it

        plan, table = profile.cut(plan, model, ranks, dropout, recompute)
    directory = records.create(Path(runs_dir), f"p{stages}r{replicas}")
    try:
        (directory / "logs").mkdir()
        records.write_json(directory / "config.json", whole_config)
        arguments = ["-p", str(stages), "-s", str(steps), "--seed", str(seed), "--backend", plan.backend]
        arguments += ["--deepspeed_config", _short(directory / "config.json")]
        optional = {
            "--model": model if model != "alexnet" else None,
            "--dataset": dataset if dataset != "synthetic" else None,
            "--data-dir": data_dir if str(data_dir) != fetch.SHARED_DIR else None,
            "--partition": partition if partition != "parameters" else None,
            "--dropout": dropout,
            "--eval-every": eval_every,
            "--save-every": save_every,
            "--resume": resume,
            "--weights": weights,
            "--fault": fault,
            "--transforms": transforms if transforms != "batched" else None,
            "--engine": engine if engine != "deepspeed" else None,
            "--schedule": schedule if schedule != "1f1b" else None,
            "--chunks": chunks if chunks != 1 else None,
        }
        for flag, value in optional.items():
            arguments += [flag, str(value)] if value is not None else []
        arguments += ["--recompute"] * recompute + ["--trace"] * trace
        again = _short(directory.with_name(f"{directory.name}-again"))
        typed = shlex.join([*_deepspeed(ranks), *arguments, "--run-dir", again])
        records.update(directory, command=typed, model=model, config=whole_config, **plan.record())
    except OSError as error:
        raise ValueError(disk.cannot(f"write the run to {directory}", error, "give another runs_dir")) from None
    explained = explain(whole_config, stages, replicas, schedule, chunks)
    for line in filter(None, [explained, plan.notice, table, typed]):
        print(line)
    lines = directory / records.STEPS
    train = [*machine.PYTHON, "-u", "-m", "pipetutor.train", *arguments, "--run-dir", _short(directory)]
    port = free_port()
    processes = [
        Process(train, rank_environment(rank, ranks, port), records.log_path(directory, rank).name)
        for rank in range(ranks)
    ]
    report = watch(processes, directory, deadline, lines, steps - plan.done, "steps", _brief)
    if report["code"] != 0:
        raise RunFailed(diagnose(directory, report), directory)
    run = Run.load(directory)
    if lost := records.lost_in(directory):
        print(lost)
    if run.evaluations:
        last = run.evaluations[-1]
        print(f"test accuracy {last['accuracy']:.1%}: {last['correct']} of {last['images']} images")
    return run


def _brief(step: dict[str, Any]) -> str:
    return f"loss {records.number(step['loss']):.3f}, {step['images_per_second']:.1f} images/s"


def _check_weights(model: str, weights: str | Path) -> None:
    from pipetutor.core.layers import build  # torch: loaded only by who brings weights
    from pipetutor.weights import load_weights

    load_weights(build(model), weights)


def _short(path: Path) -> str:
    """Return a path as a learner would type it: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _deepspeed(ranks: int) -> list[str]:
    """Return DeepSpeed's launcher with its own options: this host, on the GPUs that CUDA_VISIBLE_DEVICES allows."""
    found = shutil.which("deepspeed")
    here = Path(sys.executable).with_name("deepspeed")
    if " " in str(here):  # the kernel cannot run a script whose first line names an interpreter with spaces
        start = [sys.executable, "-m", "deepspeed.launcher.runner"]
    else:
        start = ["deepspeed" if found and Path(found).parent == here.parent else str(here)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    resources = ["--num_gpus", str(ranks)]
    if visible is not None and gpus(ranks).count >= ranks:
        chosen = [device.strip() for device in visible.split(",")][:ranks]
        if all(map(str.isdigit, chosen)):
            resources = ["--include", "localhost:" + ",".join(chosen)]
        else:  # DeepSpeed knows no UUIDs; the ranks take what stands here
            start = ["env", f"CUDA_VISIBLE_DEVICES={visible}", *start]
    if HOSTS.is_file():  # where DeepSpeed looks for other hosts unless it is told not to
        resources += ["--hostfile", os.devnull]
    return [*start, *resources, "--master_port", str(free_port()), "--module", "pipetutor.train"]
