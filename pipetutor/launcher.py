"""What a cell runs: check, start the ranks, show progress, record, and leave nothing behind."""

import shlex
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
from pipetutor.processes.launchers import deepspeed, on_hosts, on_this_machine
from pipetutor.processes.watch import RunFailed, watch
from pipetutor.system import disk
from pipetutor.system.gpus import gpus
from pipetutor.system.links import parse_links
from pipetutor.system.namespaces import check_hosts

__all__ = ["RunFailed", "launch"]


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
    hosts = options.hosts if options.hosts > 1 else 0
    links = parse_links(options.hosts, options.link)
    about = describe(options.model, options.dataset, options.data_dir)
    plan = preflight(options, World(ranks, ranks, gpus(ranks), hosts), about)
    if links:
        check_hosts(links.values())
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
    words = replace(told, run_dir=_short(directory)).words()
    try:
        (directory / "logs").mkdir()
        records.write_json(directory / "config.json", plan.config)
        if hosts:
            processes = on_hosts(words, ranks, hosts, Path(_short(directory)))
            typed = "\n".join(shlex.join(process.command) for process in processes)
        else:
            processes = on_this_machine(words, ranks, directory)
            typed = shlex.join([*deepspeed(ranks), *replace(told, run_dir=_short(again)).words()])
        records.update(directory, command=typed, **plan.record())
    except OSError as error:
        raise ValueError(disk.cannot(f"write the run to {directory}", error, "give another runs_dir")) from None
    explained = explain(plan.config, options.stages, options.replicas, options.schedule, options.chunks)
    for line in filter(None, [explained, plan.notice, table, typed]):
        print(line)
    lines, total = directory / records.STEPS, options.steps - plan.done
    report = watch(processes, directory, options.deadline, lines, total, "steps", _brief, links)
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
