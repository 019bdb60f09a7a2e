"""What a cell runs: check, start the ranks, show progress, record, and leave nothing behind."""

import shlex
import shutil
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
from pipetutor.processes.children import Process
from pipetutor.processes.describe import describe
from pipetutor.processes.diagnosis import diagnose
from pipetutor.processes.entry import briefly
from pipetutor.processes.launchers import by_ssh, deepspeed, on_hosts, on_this_machine
from pipetutor.processes.watch import RunFailed, watch
from pipetutor.schedule.orders import SCHEDULES
from pipetutor.system import disk
from pipetutor.system.gpus import Gpus, gpus
from pipetutor.system.hostfile import check_logins, read_hostfile
from pipetutor.system.kinds import counted
from pipetutor.system.links import parse_links
from pipetutor.system.namespaces import check_hosts

__all__ = ["RunFailed", "launch"]


@briefly
@takes_options
def launch(options: Options) -> Run:  # noqa: D417 (its arguments are the options)
    """Train in processes of their own, watch them, and return the record.

    The ranks are started as DeepSpeed's launcher starts them. A ``deepspeed`` command is printed that does the same
    work in a terminal, and records it in a directory of its own beside this run's (``…-again``). On several hosts the
    printed commands are what starts the ranks. Whatever ends the call, an interrupt or the death of the kernel, no
    process stays.

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
    links = parse_links(options.hosts, options.link)
    about = describe(options.model, options.dataset, options.data_dir)
    plan = preflight(options, _world(options, ranks), about)
    if links:
        check_hosts(links.values())
    if options.weights is not None and options.model in catalog():  # of others the ranks see to it
        from pipetutor.weights import check_weights  # torch: loaded only by who brings weights

        check_weights(options.model, options.weights)
    table, here = "", options.hostfile is None
    if here:  # else each host has its own data, and the first rank's costs are what counts
        fetch.prepare(options.dataset, options.data_dir)
    if here and options.partition == PROFILE:
        from pipetutor.costs import profile  # numpy: loaded only by who asks for it

        plan, table = profile.cut(plan, ranks)
    directory = records.create(Path(options.runs_dir), f"p{options.stages}r{options.replicas}")
    told = replace(options, config=_short(directory / "config.json"), dtype=None)
    try:
        (directory / "logs").mkdir()
        records.write_json(directory / "config.json", plan.config)
        if plan.schedule not in SCHEDULES:
            (directory / "schedule.csv").write_text(plan.schedule)
            told = replace(told, schedule=_short(directory / "schedule.csv"))
        processes, typed = _start(replace(told, backend=plan.backend if here else options.backend), ranks, directory)
        records.update(directory, command=typed, **plan.record())
    except OSError as error:
        raise ValueError(disk.cannot(f"write the run to {directory}", error, "give another runs_dir")) from None
    explained = explain(plan.config, options.stages, options.replicas, plan.schedule, options.chunks)
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


def _start(told: Options, ranks: int, directory: Path) -> tuple[list[Process], str]:
    """Return what starts the ranks, and the commands that do the same in terminals.

    Args:
        told: what the ranks are told.
        ranks: how many.
        directory: the run directory.
    """
    words = replace(told, run_dir=_short(directory)).words()
    if told.hostfile is None and told.hosts == 1:
        again = directory.with_name(f"{directory.name}-again")
        typed = [*deepspeed(ranks), *replace(told, run_dir=_short(again)).words()]
        return on_this_machine(words, ranks, directory), shlex.join(typed)
    if told.hostfile is None:
        processes = on_hosts(words, ranks, told.hosts, Path(_short(directory)))
    else:
        processes = by_ssh(words, ranks, told.hostfile, Path(_short(directory)))
    return processes, "\n".join(shlex.join(process.command) for process in processes)


def _world(options: Options, ranks: int) -> World:
    """Return where the run takes place: here, on hosts made here, or on those of a file."""
    if options.hostfile is None:
        return World(ranks, ranks, gpus(ranks), options.hosts if options.hosts > 1 else 0)
    slots = read_hostfile(options.hostfile)
    for name, value in (("hosts", options.hosts > 1), ("link", options.link)):
        if value:
            raise ValueError(
                f"{name} is for hosts that a launch makes on this machine, and hostfile {options.hostfile} names "
                "others: give one of them"
            )
    if sum(slots.values()) != ranks:
        raise ValueError(
            f"hostfile {options.hostfile} has {counted(sum(slots.values()), 'slot')}, and {options.stages} x "
            f"{options.replicas} stages and replicas are {counted(ranks, 'rank')}: let them be as many"
        )
    if not shutil.which("pdsh"):
        raise ValueError(
            "hostfile: DeepSpeed reaches other hosts by pdsh, which is missing here: apt-get install pdsh, or start "
            "the command on each host yourself, deepspeed --no_ssh --node_rank N"
        )
    check_logins(slots)
    most = max(slots.values())
    return World(ranks, most, Gpus(most))  # what GPUs hosts have is not known here: they refuse what they cannot do


def _brief(step: dict[str, Any]) -> str:
    return f"loss {records.number(step['loss']):.3f}, {step['images_per_second']:.1f} examples/s"


def _short(path: Path) -> str:
    """Return a path as a learner would type it: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
