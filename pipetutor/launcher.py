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
from pipetutor.core.partition import catalog
from pipetutor.core.records import Run
from pipetutor.data import fetch
from pipetutor.options import PROFILE, Options, takes_options
from pipetutor.preflight import World, preflight
from pipetutor.processes.describe import describe
from pipetutor.processes.diagnosis import diagnose
from pipetutor.processes.entry import briefly
from pipetutor.processes.environment import free_port, rank_environment
from pipetutor.processes.supervise import Process
from pipetutor.processes.watch import RunFailed, watch
from pipetutor.system import disk, machine
from pipetutor.system.gpus import gpus

__all__ = ["RunFailed", "launch"]

HOSTS = Path("/job/hostfile")


@briefly
@takes_options
def launch(options: Options) -> Run:  # noqa: D417 (its arguments are the options)
    """Train in processes of their own, watch them, and return the record.

    The ranks are started as DeepSpeed's launcher starts them. A ``deepspeed`` command is printed that does the same
    work in a terminal, and records it in a directory of its own beside this run's (``…-again``). Whatever ends the
    call, an interrupt or the death of the kernel, no process stays.

    Args:
        {options}

    Returns:
        The finished run.

    Raises:
        ValueError: something asked for cannot work; nothing was started.
        RunFailed: a rank failed, or no step was completed within the deadline; its ``directory`` holds what is left.

    >>> run = launch(stages=2, steps=20)  # doctest: +SKIP
    >>> run.losses[-1], run.samples_per_second  # doctest: +SKIP
    """
    ranks = max(options.stages, 1) * options.replicas
    plan = preflight(
        options, World(ranks, ranks, gpus(ranks)), describe(options.model, options.dataset, options.data_dir)
    )
    if options.weights is not None and options.model in catalog():  # of others the ranks see to it
        from pipetutor.weights import check_weights  # torch: loaded only by who brings weights

        check_weights(options.model, options.weights)
    fetch.prepare(options.dataset, options.data_dir)
    table = ""
    if options.partition == PROFILE:
        from pipetutor.costs import profile  # numpy: loaded only by who asks for it

        plan, table = profile.cut(plan, ranks)
    directory = records.create(Path(options.runs_dir), f"p{options.stages}r{options.replicas}")
    told = replace(options, config=_short(directory / "config.json"), dtype=None, backend=plan.backend)
    again = directory.with_name(f"{directory.name}-again")
    typed = shlex.join([*_deepspeed(ranks), *replace(told, run_dir=_short(again)).words()])
    try:
        (directory / "logs").mkdir()
        records.write_json(directory / "config.json", plan.config)
        records.update(directory, command=typed, **plan.record())
    except OSError as error:
        raise ValueError(disk.cannot(f"write the run to {directory}", error, "give another runs_dir")) from None
    explained = explain(plan.config, options.stages, options.replicas, options.schedule, options.chunks)
    for line in filter(None, [explained, plan.notice, table, typed]):
        print(line)
    words = replace(told, run_dir=_short(directory)).words()
    train = [*machine.PYTHON, "-u", "-m", "pipetutor.train", *words]
    port = free_port()
    processes = [
        Process(train, rank_environment(rank, ranks, port), records.log_path(directory, rank).name)
        for rank in range(ranks)
    ]
    lines, total = directory / records.STEPS, options.steps - plan.done
    report = watch(processes, directory, options.deadline, lines, total, "steps", _brief)
    if report["code"] != 0:
        raise RunFailed(diagnose(directory, report), directory)
    run = Run.load(directory)
    if lost := records.lost_in(directory):
        print(lost)
    if run.evaluations:
        print(records.marks(run.evaluations[-1]))
    return run


def _brief(step: dict[str, Any]) -> str:
    return f"loss {records.number(step['loss']):.3f}, {step['images_per_second']:.1f} examples/s"


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
