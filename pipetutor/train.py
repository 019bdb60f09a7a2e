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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from torch import nn

from pipetutor.core import checkpoint, records
from pipetutor.core.batch import explain
from pipetutor.core.config import DTYPES, read_config
from pipetutor.core.engine import data_parallel, pipeline, release_inputs, say
from pipetutor.core.layers import build, join_layers
from pipetutor.core.loop import Loop
from pipetutor.core.partition import METHODS, PROFILE
from pipetutor.costs import profile
from pipetutor.data import fetch
from pipetutor.data.fetch import DATA_DIR, DATA_DIR_HELP, DataError
from pipetutor.data.loader import cifar_testset, cifar_trainset
from pipetutor.preflight import BACKENDS, DATASET_SIZES, ENGINES, TRANSFORMS, Plan, preflight
from pipetutor.processes import faults
from pipetutor.processes.agreement import Refused, agree
from pipetutor.processes.environment import free_port
from pipetutor.processes.heartbeat import Heartbeat
from pipetutor.processes.supervise import end_when_asked
from pipetutor.processes.watch import RunFailed
from pipetutor.schedule.orders import SCHEDULES
from pipetutor.system import disk
from pipetutor.system.command import Parser
from pipetutor.system.gpus import gpus
from pipetutor.system.kinds import check, whole
from pipetutor.system.machine import cpu_cores, versions
from pipetutor.tracing.trace import Recorder
from pipetutor.weights import load_weights

__all__ = ["cifar_testset", "cifar_trainset", "get_args", "join_layers", "main", "train_base", "train_pipe"]


def _path(text: str) -> Path:
    try:
        check("it", text, "path")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the flags and defaults of the reference, and ours on top.

    Args:
        argv: the arguments; None takes those of the process.

    Raises:
        ValueError: a flag is unknown, or its value has the wrong type.
    """
    parser = Parser(
        prog="pipetutor.train", description="train AlexNet, or another model of torchvision, in a pipeline"
    )
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("-s", "--steps", type=int, default=100, help="train batches to run (default 100)")
    parser.add_argument(
        "-p",
        "--pipeline-parallel-size",
        type=int,
        default=2,
        help="pipeline stages; 0: data-parallel baseline",
    )
    parser.add_argument("--backend", help=f"{' or '.join(BACKENDS)} (default: nccl where every rank has a GPU)")
    parser.add_argument("--seed", type=int, default=1138, help="of weights, dropout and data order")
    parser.add_argument("--dataset", default="synthetic", help=f"{' or '.join(DATASET_SIZES)} (default synthetic)")
    parser.add_argument("--data-dir", default=DATA_DIR, help=DATA_DIR_HELP)
    parser.add_argument("--model", default="alexnet", help="a torchvision model that join_layers can flatten")
    parser.add_argument("--partition", default="parameters", help=METHODS)
    parser.add_argument("--dropout", type=float, help="for every dropout layer; 0 turns dropout off")
    parser.add_argument("--run-dir", type=_path, help="record the run there: a new one, or that which is resumed")
    parser.add_argument("--eval-every", type=int, help="evaluate on the test set every N steps and at the end")
    parser.add_argument("--save-every", type=int, help="save into the run directory every N steps and at the end")
    parser.add_argument("--resume", type=_path, help="a checkpoint, or a run directory: go on from its newest")
    parser.add_argument("--weights", type=_path, help="start from this torchvision state_dict")
    parser.add_argument("--dtype", help=f"{' or '.join(DTYPES)} (default: what the config says, else fp32)")
    parser.add_argument("--transforms", default="batched", help=f"{' or '.join(TRANSFORMS)} (default batched)")
    parser.add_argument("--engine", default="deepspeed", help=f"{' or '.join(ENGINES)} (default deepspeed)")
    parser.add_argument("--schedule", default="1f1b", help=f"{', '.join(SCHEDULES)} (default 1f1b)")
    parser.add_argument("--chunks", type=int, default=1, help="stages a rank, for interleaved_1f1b (default 1)")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of each stage")
    parser.add_argument("--trace", action="store_true", help="time every instruction, into the run directory")
    parser.add_argument("--fault", help=f"inject a fault ({', '.join(faults.KINDS)}), as in {faults.EXAMPLE}")
    return deepspeed.add_config_arguments(parser).parse_args(argv)


def _local_ranks() -> int:
    """Return how many ranks of the job this host has."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1")))


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the arguments against this job and this host; see ``preflight``."""
    check("data_dir", args.data_dir, "path")
    check("--master_port", int(os.environ.get("MASTER_PORT", "29500")), whole(1, 65535, 29501))
    plan = preflight(
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
        local_ranks=_local_ranks(),
        stages=args.pipeline_parallel_size,
        steps=args.steps,
        model=args.model,
        dataset=args.dataset,
        partition=args.partition,
        config=read_config(args.deepspeed_config, args.dtype),
        backend=args.backend,
        gpus=gpus(_local_ranks()),
        dropout=args.dropout,
        seed=args.seed,
        eval_every=args.eval_every,
        save_every=args.save_every,
        resume=args.resume,
        weights=args.weights,
        fault=args.fault,
        transforms=args.transforms,
        engine=args.engine,
        schedule=args.schedule,
        chunks=args.chunks,
        recompute=args.recompute,
    )
    # The files of a host are those of all its ranks: its first rank looks.
    if args.weights and os.environ.get("LOCAL_RANK", "0") == "0":
        _model(args)
    return plan


def _common(args: argparse.Namespace) -> dict[str, Any]:
    """Return what must be the same on every rank; files may have other names elsewhere: their content counts."""
    own = ("local_rank", "backend", "data_dir", "run_dir", "resume", "weights", "deepspeed_config")
    words = {name: value for name, value in vars(args).items() if name not in own}
    config = read_config(args.deepspeed_config, args.dtype)
    found = words | {f"{name} of the config": value for name, value in config.items()}
    found |= {f"version of {name}": value for name, value in versions().items()}
    if args.resume:
        found["checkpoint"] = json.loads((checkpoint.find(args.resume) / checkpoint.MANIFEST).read_text())["files"]
    if args.weights and os.environ["LOCAL_RANK"] == "0":
        with open(args.weights, "rb") as file:
            found["sha256 of the weights"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _model(args: argparse.Namespace) -> nn.Module:
    model = build(args.model, dropout=args.dropout)
    if args.weights:
        load_weights(model, args.weights)
    return model


def _recorder(args: argparse.Namespace) -> Recorder | None:
    """Return the recorder of a run that is traced; made ahead of the model, whose memory it tells apart."""
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    return Recorder(args.run_dir, dist.get_rank(), device) if args.trace else None


def train_base(args: argparse.Namespace) -> Any:
    """Train data-parallel: every rank holds the whole model, gradients are averaged over the ranks.

    Args:
        args: from ``get_args``.

    Returns:
        The DeepSpeed engine, trained for ``args.steps`` train batches.
    """
    torch.manual_seed(args.seed)
    recorder = _recorder(args)
    engine = data_parallel(_model(args), read_config(args.deepspeed_config, args.dtype))
    criterion = nn.CrossEntropyLoss()
    accumulation = engine.gradient_accumulation_steps()

    def one_step(micro_batches: Iterator[list[torch.Tensor]]) -> torch.Tensor:
        total = torch.zeros((), device=engine.device)
        for _ in range(accumulation):
            images, labels = next(micro_batches)
            loss = criterion(engine(images.to(engine.device)), labels.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        return total / (accumulation * dist.get_world_size())

    Loop(args, engine, recorder).run(one_step)
    return engine


def train_pipe(args: argparse.Namespace, part: str = "parameters") -> Any:
    """Train in ``args.pipeline_parallel_size`` stages; the ranks beyond one pipeline are replicas of it.

    Every rank builds the whole model from the same seed and keeps its own stage, so the initial weights
    do not depend on the number of stages.

    Args:
        args: from ``get_args``.
        part: where to cut: a method of DeepSpeed, or bounds such as ``0,16,22``.

    Returns:
        The DeepSpeed pipeline engine, trained for ``args.steps`` train batches.
    """
    deepspeed.runtime.utils.set_random_seed(args.seed)
    recorder, config = _recorder(args), read_config(args.deepspeed_config, args.dtype)
    if args.engine == "torch":
        from pipetutor.core.torch_engine import TorchPipeline  # torch's pipelining, with the compiler that it loads

        bounds = [int(bound) for bound in part.split(",")]
        engine = TorchPipeline(_model(args), args.schedule, bounds, config, args.recompute)
    else:
        engine = pipeline(_model(args), args.pipeline_parallel_size, part, config, args.recompute)

    def one_step(micro_batches: Iterator[list[torch.Tensor]]) -> torch.Tensor:
        loss = engine.train_batch(data_iter=micro_batches)
        release_inputs(engine)
        return loss

    Loop(args, engine, recorder).run(one_step)
    return engine


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


def _begin_record(args: argparse.Namespace, plan: Plan) -> None:
    """Say in run.json what this run is."""
    command = f"deepspeed --num_gpus {dist.get_world_size()} --module pipetutor.train {shlex.join(_own_arguments())}"
    known = records.read(args.run_dir)
    if known.get("status") == "starting":  # made by launch for this run
        command = known["command"]
    about = {
        "status": "running",
        "command": command,
        "model": args.model,
        "config": read_config(args.deepspeed_config, args.dtype),
        "versions": versions(),
        "device": str(deepspeed.get_accelerator().current_device_name()),
        "threads_per_rank": torch.get_num_threads(),
    }
    # Written anew: what an earlier part of the run came to is not what this one does.
    records.write_json(args.run_dir / "run.json", about | plan.record())


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
        return profile.cut(plan, args.model, _local_ranks(), args.dropout, args.recompute)
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
        common = _common(args)
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
    rank, stages = int(os.environ["RANK"]), args.pipeline_parallel_size
    try:
        # DeepSpeed would compile a shared-memory all-reduce here, 20 s and a C++ compiler, to no gain.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        deepspeed.init_distributed(dist_backend=plan.backend)
        del store  # that of the process group has taken over
        if plan.backend == "nccl":
            torch.cuda.set_device(args.local_rank)
        config = read_config(args.deepspeed_config, args.dtype)
        say(explain(config, stages, plan.batch.replicas, args.schedule, args.chunks))
        for line in filter(None, [plan.notice, table]):
            say(line)
        if args.run_dir and rank == 0:
            _begin_record(args, plan)
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
