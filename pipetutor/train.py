"""What one rank runs: the data-parallel baseline and the pipeline, over the same data, model and loss.

    deepspeed --num_gpus 2 --module pipetutor.train -p 2 --steps 20

After ``training/pipeline_parallelism/train.py`` of DeepSpeedExamples, whose names and flags are kept.
"""

import argparse
import atexit
import hashlib
import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from torch import nn

from pipetutor.core import checkpoint, records
from pipetutor.core.batch import explain
from pipetutor.core.deepspeed_engines import DataParallel, Pipeline
from pipetutor.core.engine import Batches, say
from pipetutor.core.layers import build, join_layers
from pipetutor.core.loop import Loop
from pipetutor.core.observer import Observer
from pipetutor.core.plan import Plan
from pipetutor.costs import profile
from pipetutor.data import fetch
from pipetutor.data.fetch import DataError
from pipetutor.data.loader import cifar_testset, cifar_trainset
from pipetutor.options import PROFILE, Options, parser
from pipetutor.preflight import World, preflight
from pipetutor.processes.agreement import Refused, agree
from pipetutor.processes.environment import free_port
from pipetutor.processes.faults import Fault, Injector
from pipetutor.processes.heartbeat import Heartbeat
from pipetutor.processes.supervise import end_when_asked
from pipetutor.processes.watch import RunFailed
from pipetutor.system import disk
from pipetutor.system.gpus import gpus
from pipetutor.system.kinds import check, whole
from pipetutor.system.machine import cpu_cores, versions
from pipetutor.tracing.trace import Recorder
from pipetutor.weights import load_weights

__all__ = ["cifar_testset", "cifar_trainset", "get_args", "join_layers", "main", "train_base", "train_pipe"]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the flags and defaults of the reference, and ours on top.

    Args:
        argv: the arguments; None takes those of the process.

    Raises:
        ValueError: a flag is unknown, or its value has the wrong type.
    """
    return deepspeed.add_config_arguments(parser()).parse_args(argv)


def _local_ranks() -> int:
    """Return how many ranks of the job this host has."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1")))


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the arguments against this job and this host; see ``preflight``."""
    ranks, here = int(os.environ.get("WORLD_SIZE", "1")), _local_ranks()
    check("--master_port", int(os.environ.get("MASTER_PORT", "29500")), whole(1, 65535, 29501))
    plan = preflight(Options.typed(args, ranks), World(ranks, here, gpus(here)))
    # The files of a host are those of all its ranks: its first rank looks.
    if plan.options.weights and os.environ.get("LOCAL_RANK", "0") == "0":
        _model(plan.options)
    return plan


def _agreed(args: argparse.Namespace) -> Plan:
    """Return the plan that all ranks have agreed on; a script of one's own that has no ``main`` makes it here."""
    return getattr(args, "plan", None) or make_plan(args)


def _common(plan: Plan) -> dict[str, Any]:
    """Return what must be the same on every rank; files may have other names elsewhere: their content counts."""
    options = plan.options
    found = options.common() | {f"{name} of the config": value for name, value in plan.config.items()}
    found |= {f"version of {name}": value for name, value in versions().items()}
    if options.resume:
        manifest = json.loads((checkpoint.find(options.resume) / checkpoint.MANIFEST).read_text())
        found["checkpoint"] = manifest["files"]
    if options.weights and os.environ["LOCAL_RANK"] == "0":
        with open(options.weights, "rb") as file:
            found["sha256 of the weights"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _model(options: Options) -> nn.Module:
    model = build(options.model, dropout=options.dropout)
    if options.weights:
        load_weights(model, options.weights)
    return model


def _observers(options: Options) -> list[Observer]:
    """Return who looks on; made ahead of the model, from whose memory a recorder tells what was there before."""
    rank, directory = dist.get_rank(), options.run_dir
    found: list[Observer] = [Heartbeat(directory, rank)]
    if options.trace and directory:
        found.append(Recorder(directory, rank, torch.device(deepspeed.get_accelerator().current_device_name())))
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
    torch.manual_seed(args.seed)
    observers = _observers(plan.options)
    base = DataParallel(_model(plan.options), plan.config)
    engine, criterion = base.deepspeed, nn.CrossEntropyLoss()
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

    Every rank builds the whole model from the same seed and keeps its own stage, so the initial weights
    do not depend on the number of stages.

    Args:
        args: from ``get_args``.
        part: where to cut: a method of DeepSpeed, or bounds such as ``0,16,22``.

    Returns:
        The DeepSpeed pipeline engine, trained for ``args.steps`` train batches; torch's with ``--engine torch``.
    """
    plan = _agreed(args)
    deepspeed.runtime.utils.set_random_seed(args.seed)
    observers, options = _observers(plan.options), plan.options
    model = _model(options)
    if options.engine == "torch":
        from pipetutor.core.torch_engine import TorchPipeline  # torch's pipelining, with the compiler that it loads

        bounds = [int(bound) for bound in part.split(",")]
        engine = TorchPipeline(model, options.schedule, bounds, plan.config, options.recompute)
        Loop(plan, engine, observers).run(engine.train_batch)
        return engine
    pipe = Pipeline(model, options.stages, part, plan.config, options.recompute)
    Loop(plan, pipe, observers).run(pipe.train_batch)
    return pipe.deepspeed


def _own_arguments() -> list[str]:
    """Return what the command line says, without what the launcher has added to it."""
    return [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]


def _relaunch(args: argparse.Namespace) -> None:
    """Replace this lone CPU rank by the launcher with one rank a stage; does not return.

    Without ``--num_gpus``, DeepSpeed's launcher starts a rank for each GPU. On a machine without any it
    counts NUMA nodes instead, one on most, and the reference's command line would never fill its pipeline.
    """
    stages = args.pipeline_parallel_size
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
    command += ["--master_port", str(free_port()), "--module", "pipetutor.train", *_own_arguments()]
    os.execve(sys.executable, command, env)


def _take_directory(args: argparse.Namespace, rank: int) -> None:
    """Make the run directory this run's own, unless another run is in it that this one does not go on with.

    Every rank looks, before any of them writes: none starts a record before all have joined.
    """
    args.run_dir.mkdir(parents=True, exist_ok=True)
    goes_on = args.resume and checkpoint.find(args.resume).resolve().parent.parent == args.run_dir.resolve()
    if (held := records.held(args.run_dir)) and not goes_on:
        saved = f", or go on with it: --resume {args.run_dir}" if "checkpoint" in held else ""
        raise ValueError(f"--run-dir {args.run_dir} holds a run already ({held}): give another --run-dir{saved}")
    records.forget(args.run_dir, rank, int(os.environ.get("WORLD_SIZE", "1")))
    Heartbeat(args.run_dir, rank)  # who hangs while it joins the others has said so


def _begin_record(directory: Path, plan: Plan) -> None:
    """Say in run.json what this run is."""
    command = f"deepspeed --num_gpus {dist.get_world_size()} --module pipetutor.train {shlex.join(_own_arguments())}"
    about = {"command": command} | plan.record()
    known = records.read(directory)
    if known.get("status") == "starting":  # made by launch for this run
        about |= {name: known[name] for name in ("command", "options")}
    about |= {
        "status": "running",
        "versions": versions(),
        "device": str(deepspeed.get_accelerator().current_device_name()),
        "threads_per_rank": torch.get_num_threads(),
    }
    # Written anew: what an earlier part of the run came to is not what this one does.
    records.write_json(directory / "run.json", about)


def _unlaunched() -> list[str]:
    """Return what a launcher would have set in the environment, and is not there."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return [name for name in names if name not in os.environ]


def _prepare(args: argparse.Namespace) -> tuple[Plan, str]:
    """Refuse what cannot run on this host; return the plan, and the table of a measured cut.

    Raises:
        ValueError: something asked for cannot work here.
        RunFailed: layers could not be measured.
    """
    if missing := _unlaunched():  # DeepSpeed would look for MPI
        raise ValueError(
            f"no launcher has started this rank ({missing[0]} is not set): use deepspeed --num_gpus "
            f"{args.pipeline_parallel_size or 2} --module pipetutor.train {shlex.join(_own_arguments())}"
        )
    args.local_rank = int(os.environ["LOCAL_RANK"])
    stages = args.pipeline_parallel_size
    if os.environ["WORLD_SIZE"] == "1" and stages > 1 and not gpus(1).count:
        _relaunch(args)
    plan = make_plan(args)
    for flag in ("save_every", "trace"):
        if getattr(args, flag) and not args.run_dir:
            raise ValueError(f"--{flag.replace('_', '-')} needs a place to write to: give --run-dir, too")
    if args.run_dir:
        try:
            _take_directory(args, int(os.environ["RANK"]))
        except OSError as error:
            words = disk.cannot(f"write --run-dir {args.run_dir}", error, "give another directory")
            raise ValueError(words) from None
    if args.local_rank == 0:
        fetch.prepare(args.dataset, args.data_dir)
    if stages and args.partition == PROFILE and os.environ["RANK"] == "0":
        return profile.cut(plan, _local_ranks())
    return plan, ""


def main() -> None:
    """Run one rank of a job that DeepSpeed's launcher started.

    What any rank refuses ends the job. The first rank of each host tells it, in one line, and ends with status 2; the
    others leave in silence with status 0, because the launcher ends the job at the first other status it sees, maybe
    before the first rank has spoken.
    """
    plan, refusal, table, common = None, "", "", {}
    speaks = os.environ.get("LOCAL_RANK", "0") == "0" or bool(_unlaunched())
    try:
        args = get_args()
        plan, table = _prepare(args)
        common = _common(plan)
    except (ValueError, OSError, RunFailed) as error:
        refusal = str(error)
        if speaks:
            print(f"pipetutor: {refusal}", file=sys.stderr, flush=True)
        if _unlaunched():
            sys.exit(2)
    try:
        plan, store = agree(plan, refusal, common, default_pg_timeout)
    except Refused as refused:
        for line in str(refused).splitlines():
            if speaks:
                print(f"pipetutor: {line}", file=sys.stderr, flush=True)
        sys.exit(2 if speaks else 0)
    args.plan = plan
    rank, stages = int(os.environ["RANK"]), args.pipeline_parallel_size
    try:
        # DeepSpeed would compile a shared-memory all-reduce here, 20 s and a C++ compiler, to no gain.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        deepspeed.init_distributed(dist_backend=plan.backend)
        del store  # that of the process group has taken over
        if plan.backend == "nccl":
            torch.cuda.set_device(args.local_rank)
        say(explain(plan.config, stages, plan.batch.replicas, args.schedule, args.chunks))
        for line in filter(None, [plan.notice, table]):
            say(line)
        if args.run_dir and rank == 0:
            _begin_record(args.run_dir, plan)
        end_when_asked(args.run_dir if rank == 0 else None)
        if stages:
            train_pipe(args, ",".join(map(str, plan.bounds)))
        else:
            train_base(args)
        if args.run_dir and rank == 0:
            run = records.Run.load(args.run_dir)
            result = {"loss": run.losses[-1], "images_per_second": run.samples_per_second} if run.losses else {}
            accuracy = {"accuracy": run.accuracy} if run.evaluations else {}
            records.close(args.run_dir, "finished", result=result | accuracy)
    except Exception as error:
        if args.run_dir:
            records.write_failure(args.run_dir, rank, error, traceback.format_exc())
            if rank == 0 and records.read(args.run_dir).get("status") == "running":
                records.close(args.run_dir, "failed")
        if isinstance(error, DataError | checkpoint.CheckpointError):
            print(f"pipetutor: {error}", file=sys.stderr)
            sys.exit(2)
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    atexit._run_exitfuncs()
    os._exit(0)  # taking the engine and every module apart takes half a second, and the memory goes in any case
