"""What one rank runs: the data-parallel baseline and the pipeline, over the same data, model and loss.

    deepspeed --num_gpus 2 --module pipetutor.train -p 2 --steps 20

After ``training/pipeline_parallelism/train.py`` of DeepSpeedExamples, whose names and flags are kept.
"""

import argparse
import os
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from pipetutor import data, records
from pipetutor.data import cifar_testset, cifar_trainset
from pipetutor.fetch import DATA_DIR, DataError
from pipetutor.launch import free_port
from pipetutor.layers import build, join_layers
from pipetutor.machine import cpu_cores, gpu_count, versions
from pipetutor.partition import METHODS
from pipetutor.preflight import BACKENDS, DATASET_SIZES, Plan, preflight, read_config

__all__ = ["cifar_testset", "cifar_trainset", "get_args", "join_layers", "main", "train_base", "train_pipe"]


class _Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and exit, once for each rank."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists every flag)")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the flags and defaults of the reference, and ours on top.

    Args:
        argv: the arguments; None takes those of the process.

    Raises:
        ValueError: a flag is unknown, or its value has the wrong type.
    """
    parser = _Parser(prog="pipetutor.train", description="AlexNet on CIFAR-10, in a pipeline")
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
    parser.add_argument("--data-dir", default=DATA_DIR, help=f"default {DATA_DIR}")
    parser.add_argument("--model", default="alexnet", help="a torchvision model that join_layers can flatten")
    parser.add_argument("--partition", default="parameters", help=METHODS)
    parser.add_argument("--dropout", type=float, help="for every dropout layer; 0 turns dropout off")
    parser.add_argument("--run-dir", type=Path, help="record the run there")
    return deepspeed.add_config_arguments(parser).parse_args(argv)


class PipelineModule(deepspeed.pipe.PipelineModule):
    """DeepSpeed's ``PipelineModule``, which also takes bounds such as ``0,16,22`` as its partition method."""

    def _partition_layers(self, method: str = "uniform") -> None:
        if method[0].isdigit():
            self.parts = [int(bound) for bound in method.split(",")]
            self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])
        else:
            super()._partition_layers(method)


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the arguments against this job and this host; see ``preflight``."""
    return preflight(
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
        local_ranks=int(os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1"))),
        stages=args.pipeline_parallel_size,
        steps=args.steps,
        model=args.model,
        dataset=args.dataset,
        partition=args.partition,
        config=read_config(args.deepspeed_config),
        backend=args.backend,
        gpus=gpu_count(),
        dropout=args.dropout,
        seed=args.seed,
    )


def engine_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the DeepSpeed config as the engine gets it.

    What DeepSpeed 0.19.8 would do otherwise, and what is done about it:

    - It compiles its Adam at first use, which needs a compiler, and nvcc on a GPU. torch's AdamW takes its
      place, with DeepSpeed's default decay of 0 and not torch's 0.01.
    - It clips gradients to a norm of 1 when nobody asked, and takes that norm over each stage alone: the
      losses of a pipeline would depend on its cut. Clipping is off unless the config asks for it.
    - ``wall_clock_breakdown`` ends its pipeline engine ("timer has already been started"). It is left out.
    - It prints steps in its own form. They are printed here, in one form for both modes.
    """
    config = {"gradient_clipping": 0.0} | read_config(args.deepspeed_config)
    config["steps_per_print"] = None
    if args.pipeline_parallel_size > 1 and config["gradient_clipping"]:
        say("gradient_clipping: DeepSpeed clips each stage by its own norm, so the losses depend on the cut")
    optimizer = config.get("optimizer", {})
    if optimizer.get("type", "").lower() in ("adam", "adamw"):
        optimizer["params"] = {"torch_adam": True, "weight_decay": 0.0} | optimizer.get("params", {})
    if args.pipeline_parallel_size and config.pop("wall_clock_breakdown", False):
        say("wall_clock_breakdown is left out: DeepSpeed's pipeline engine does not support it")
    return config


def say(line: str) -> None:
    """Print on the job's first rank alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)


def _start(args: argparse.Namespace, net: nn.Module) -> tuple[Any, Any]:
    """Give the model to DeepSpeed; return the engine and its endless iterator of micro-batches."""
    trainset = data.load(args.dataset, True, args.local_rank, args.data_dir)
    engine, *_ = deepspeed.initialize(
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        config=engine_config(args),
    )
    replicas = engine.dp_world_size
    replica = engine.grid.get_data_parallel_rank() if args.pipeline_parallel_size else dist.get_rank()
    micro_batch = engine.train_micro_batch_size_per_gpu()
    return engine, data.micro_batches(trainset, micro_batch, replicas, replica, args.seed, engine.device)


def _train(args: argparse.Namespace, engine: Any, one_step: Any) -> None:
    """Run the steps; ``one_step()`` returns the mean loss over the whole train batch and all replicas."""
    first = dist.get_rank() == 0
    writer = records.StepWriter(args.run_dir if first else None, engine.train_batch_size())
    for step in range(1, args.steps + 1):
        begin = time.perf_counter()
        loss = float(one_step())
        writer.write(step, loss, time.perf_counter() - begin)
        if step % 10 == 0:
            say(f"step: {step:3d} / {args.steps:3d} loss: {loss:.6f}")


def train_base(args: argparse.Namespace) -> Any:
    """Train data-parallel: every rank holds the whole model, gradients are averaged over the ranks.

    Args:
        args: from ``get_args``.

    Returns:
        The DeepSpeed engine, trained for ``args.steps`` train batches.
    """
    torch.manual_seed(args.seed)
    engine, micro_batches = _start(args, build(args.model, dropout=args.dropout))
    criterion = nn.CrossEntropyLoss()
    accumulation = engine.gradient_accumulation_steps()

    def one_step() -> torch.Tensor:
        total = torch.zeros((), device=engine.device)
        for _ in range(accumulation):
            images, labels = next(micro_batches)
            loss = criterion(engine(images.to(engine.device)), labels.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        return total / (accumulation * dist.get_world_size())

    _train(args, engine, one_step)
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
    net = PipelineModule(
        layers=join_layers(build(args.model, dropout=args.dropout)),
        loss_fn=nn.CrossEntropyLoss(),
        num_stages=args.pipeline_parallel_size,
        partition_method=part,
        activation_checkpoint_interval=0,
    )
    engine, micro_batches = _start(args, net)
    _train(args, engine, lambda: engine.train_batch(data_iter=micro_batches))
    return engine


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
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    env = {name: value for name, value in os.environ.items() if name not in launched}
    rest = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(stages)]
    command += ["--master_port", str(free_port()), "--module", "pipetutor.train", *rest]
    os.execve(sys.executable, command, env)


def _begin_record(args: argparse.Namespace, plan: Plan) -> None:
    """Say in run.json what this run is; a directory that held another run is taken over."""
    command = f"deepspeed --num_gpus {dist.get_world_size()} --module pipetutor.train {shlex.join(sys.argv[1:])}"
    known = records.read(args.run_dir)
    if known.get("status") == "starting":  # made by launch for this run
        command = known["command"]
    records.update(
        args.run_dir,
        status="running",
        command=command,
        model=args.model,
        config=read_config(args.deepspeed_config),
        versions=versions(),
        device=str(deepspeed.get_accelerator().current_device_name()),
        threads_per_rank=torch.get_num_threads(),
        **plan.record(),
    )


def main() -> None:
    """Run one rank of a job that DeepSpeed's launcher started.

    Bad input ends the job with status 2 and one line from the first rank; the other ranks leave in
    silence with status 0, because the launcher ends the job at the first other status it sees, maybe
    before the first rank has spoken.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        args = get_args()
        args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
        stages = args.pipeline_parallel_size
        if os.environ.get("WORLD_SIZE") == "1" and stages > 1 and gpu_count() == 0:
            _relaunch(args)
        plan = make_plan(args)
        if args.run_dir and rank == 0:
            args.run_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        if rank == 0:
            print(f"pipetutor: {error}", file=sys.stderr)
        sys.exit(2 if rank == 0 else 0)
    try:
        # DeepSpeed would compile a shared-memory all-reduce here, 20 s and a C++ compiler, to no gain.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        deepspeed.init_distributed(dist_backend=plan.backend)
        if plan.backend == "nccl":
            torch.cuda.set_device(args.local_rank)
        if plan.notice:
            say(plan.notice)
        if args.run_dir and rank == 0:
            _begin_record(args, plan)
        if stages:
            train_pipe(args, ",".join(map(str, plan.bounds)))
        else:
            train_base(args)
        if args.run_dir and rank == 0:
            run = records.Run.load(args.run_dir)
            result = {"loss": run.losses[-1], "images_per_second": run.samples_per_second}
            records.update(args.run_dir, status="finished", result=result)
    except Exception as error:
        if args.run_dir:
            records.write_failure(args.run_dir, rank, error, traceback.format_exc())
        if isinstance(error, DataError):
            print(f"pipetutor: {error}", file=sys.stderr)
            sys.exit(2)
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
