"""From a rank's command line and environment to the plan of its job, or to the reason why it cannot run.

What is wrong is said here, before a model is built or the other ranks are met.
"""

import argparse
import contextlib
import hashlib
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipetutor.core import checkpoint, records
from pipetutor.core.plan import Plan
from pipetutor.costs import profile
from pipetutor.data import fetch
from pipetutor.options import PROFILE, Options
from pipetutor.preflight import World, preflight
from pipetutor.processes.describe import describe_here
from pipetutor.processes.environment import free_port
from pipetutor.processes.heartbeat import Heartbeat, end_with_run
from pipetutor.processes.host import hosts_made
from pipetutor.processes.starters import command
from pipetutor.system import disk
from pipetutor.system.gpus import gpus
from pipetutor.system.kinds import check, whole
from pipetutor.system.machine import code_digest, cpu_cores, versions
from pipetutor.system.named import Named
from pipetutor.weights import check_weights

__all__ = []


def _local_ranks() -> int:
    """Return how many ranks of the job this host has."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1")))


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the arguments against this job and this host; see ``preflight``."""
    ranks, here = int(os.environ.get("WORLD_SIZE", "1")), _local_ranks()
    check("--master_port", int(os.environ.get("MASTER_PORT", "29500")), whole(1, 65535, 29501))
    options = Options.from_command_line(args, ranks)
    with _one_by_one(options):
        about = describe_here(options.model, options.dataset, options.data_dir)
    plan = preflight(options, World(ranks, here, gpus(here), hosts_made()), about)
    # The files of a host are those of all its ranks: its first rank looks.
    if plan.options.weights and os.environ.get("LOCAL_RANK", "0") == "0":
        check_weights(plan.options.model, plan.options.weights)
    return plan


@contextlib.contextmanager
def _one_by_one(options: Options) -> Iterator[None]:
    """Have a host's ranks call code of one's own one after the other: a data set may download at its first call."""
    if not Named.parse(options.dataset).is_own:
        yield
        return
    place = Path(tempfile.gettempdir(), f"pipetutor-{os.getuid()}-{Named.parse(options.dataset).module}.lock")
    with fetch.locked(place):
        yield


def with_bounds(plan: Plan) -> tuple[Plan, str]:
    """Return the plan with the bounds that were left to measured costs, and the table that says why these."""
    return profile.cut(plan, _local_ranks()) if plan.options.partition == PROFILE else (plan, "")


def what_must_agree(plan: Plan) -> dict[str, Any]:
    """Return what must be the same on every rank; files may have other names elsewhere: their content counts."""
    options = plan.options
    found = options.common() | {f"{name} of the config": value for name, value in plan.config.items()}
    found |= {f"version of {name}": value for name, value in versions().items()}
    found["code of pipetutor"] = code_digest()
    for name, text in {"model": options.model, "data set": options.dataset}.items():
        if (named := Named.parse(text)).is_own:
            found[f"code of the {name}"] = named.source_digest()
    if options.resume:
        found["checkpoint"] = checkpoint.read_manifest(checkpoint.find(options.resume))["files"]
    if options.weights and os.environ["LOCAL_RANK"] == "0":
        with open(options.weights, "rb") as file:
            found["sha256 of the weights"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def own_arguments() -> list[str]:
    """Return what the command line says, without what the launcher has added to it."""
    return [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]


def _relaunch(stages: int) -> None:
    """Replace this lone CPU rank by the launcher with one rank a stage; does not return.

    Without ``--num_gpus``, DeepSpeed's launcher starts a rank for each GPU. On a machine without any it
    counts NUMA nodes instead, one on most, and the reference's command line would never fill its pipeline.
    """
    print(
        f"1 rank for {stages} stages on the CPU: starting {stages} (deepspeed --num_gpus {stages})",
        flush=True,
    )
    if os.environ.get("OMP_NUM_THREADS") == str(cpu_cores()):  # set for this lone rank, not by the user
        del os.environ["OMP_NUM_THREADS"]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in launched}
    env["CUDA_VISIBLE_DEVICES"] = ""  # there was none to use, and the new launcher may not show others
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(stages)]
    command += ["--master_port", str(free_port()), "--module", "pipetutor.train", *own_arguments()]
    os.execve(sys.executable, command, env)


def _take_directory(options: Options, directory: Path, rank: int) -> None:
    """Make the run directory this run's own, unless another run is in it that this one does not go on with.

    Every rank looks, before any of them writes: none starts a record before all have joined.
    """
    directory.mkdir(parents=True, exist_ok=True)
    goes_on = options.resume and checkpoint.find(options.resume).resolve().parent.parent == directory.resolve()
    if (held := records.held(directory)) and not goes_on:
        saved = f", or go on with it: --resume {directory}" if "checkpoint" in held else ""
        raise ValueError(f"--run-dir {directory} holds a run already ({held}): give another --run-dir{saved}")
    records.forget(directory, rank, int(os.environ.get("WORLD_SIZE", "1")))
    Heartbeat(directory, rank)  # who hangs while it joins the others has said so
    if os.environ.get("CROSS_SIZE", "1") != "1" and not goes_on:  # else what is there may have been for a run before
        end_with_run(directory)


def unlaunched() -> list[str]:
    """Return what a launcher would have set in the environment, and is not there."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return [name for name in names if name not in os.environ]


def prepare(args: argparse.Namespace) -> tuple[Plan, str]:
    """Refuse what cannot run on this host; return the plan, and the table of a measured cut.

    Raises:
        ValueError: something asked for cannot work here.
        RunFailed: layers could not be measured.
    """
    if missing := unlaunched():  # DeepSpeed would look for MPI
        raise ValueError(
            f"no launcher has started this rank ({missing[0]} is not set): use "
            f"{command(os.environ, args.pipeline_parallel_size or 2)} {shlex.join(own_arguments())}"
        )
    args.local_rank = int(os.environ["LOCAL_RANK"])
    if os.environ["WORLD_SIZE"] == "1" and args.pipeline_parallel_size > 1 and not gpus(1).count:
        _relaunch(args.pipeline_parallel_size)
    plan = make_plan(args)
    options = plan.options
    if options.directory:
        try:
            _take_directory(options, options.directory, int(os.environ["RANK"]))
        except OSError as error:
            words = disk.cannot(f"write --run-dir {options.directory}", error, "give another directory")
            raise ValueError(words) from None
    elif options.save_every or options.trace:
        flag = "--save-every" if options.save_every else "--trace"
        raise ValueError(f"{flag} needs a place to write to: give --run-dir, too")
    if options.local_rank == 0:
        fetch.prepare(options.dataset, options.data_dir)
    return with_bounds(plan) if os.environ["RANK"] == "0" else (plan, "")  # the first rank's bounds are everybody's
