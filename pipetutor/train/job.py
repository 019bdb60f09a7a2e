"""One rank of a job: it joins the others, trains, and keeps the record."""

import os
import shlex
import sys
import traceback
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout

from pipetutor.core import checkpoint, records
from pipetutor.core.batch import explain
from pipetutor.core.engine import own_device, say
from pipetutor.core.plan import Plan
from pipetutor.data.fetch import DataError
from pipetutor.processes.agreement import Refused, agree
from pipetutor.processes.supervise import end_when_asked
from pipetutor.processes.watch import RunFailed
from pipetutor.system.machine import versions
from pipetutor.train.joining import own_arguments, prepare, unlaunched, what_must_agree
from pipetutor.train.trainers import get_args, train_base, train_pipe

__all__ = ["main"]


def _begin_record(directory: Path, plan: Plan) -> None:
    """Say in run.json what this run is."""
    command = f"deepspeed --num_gpus {dist.get_world_size()} --module pipetutor.train {shlex.join(own_arguments())}"
    about = {"command": command} | plan.record()
    known = records.read(directory)
    if known.get("status") == "starting":  # made by launch for this run
        about |= {name: known[name] for name in ("command", "options")}
    about |= {
        "status": "running",
        "versions": versions(),
        "device": str(own_device()),
        "threads_per_rank": torch.get_num_threads(),
    }
    # Written anew: what an earlier part of the run came to is not what this one does.
    records.write_json(directory / "run.json", about)


def main() -> None:
    """Run one rank of a job that DeepSpeed's launcher started.

    What any rank refuses ends the job. The first rank of each host tells it, in one line, and ends with status 2; the
    others leave in silence with status 0, because the launcher ends the job at the first other status it sees, maybe
    before the first rank has spoken.
    """
    plan, refusal, table, common = None, "", "", {}
    speaks = os.environ.get("LOCAL_RANK", "0") == "0" or bool(unlaunched())
    try:
        args = get_args()
        plan, table = prepare(args)
        common = what_must_agree(plan)
    except (ValueError, OSError, RunFailed) as error:
        refusal = str(error)
        if speaks:
            print(f"pipetutor: {refusal}", file=sys.stderr, flush=True)
        if unlaunched():
            sys.exit(2)
    try:
        plan, store = agree(plan, refusal, common, default_pg_timeout)
    except Refused as refused:
        for line in str(refused).splitlines():
            if speaks:
                print(f"pipetutor: {line}", file=sys.stderr, flush=True)
        sys.exit(2 if speaks else 0)
    args.plan = plan
    options, directory, rank = plan.options, plan.options.directory, int(os.environ["RANK"])
    try:
        # DeepSpeed would compile a shared-memory all-reduce here, 20 s and a C++ compiler, to no gain.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        deepspeed.init_distributed(dist_backend=plan.backend)
        del store  # that of the process group has taken over
        if plan.backend == "nccl":
            torch.cuda.set_device(options.local_rank)
        say(explain(plan.config, options.stages, plan.batch.replicas, plan.schedule, options.chunks))
        for line in filter(None, [plan.notice, table]):
            say(line)
        if directory and rank == 0:
            _begin_record(directory, plan)
        end_when_asked(directory if rank == 0 else None)
        if options.stages:
            train_pipe(args)
        else:
            train_base(args)
        if directory and rank == 0:
            run = records.Run.load(directory)
            result = {"loss": run.losses[-1], "images_per_second": run.samples_per_second} if run.losses else {}
            accuracy = {"accuracy": run.evaluations[-1]["accuracy"]} if run.evaluations else {}
            records.close(directory, "finished", result=result | accuracy)
    except Exception as error:
        if directory:
            records.write_failure(directory, rank, error, traceback.format_exc())
            if rank == 0 and records.read(directory).get("status") == "running":
                records.close(directory, "failed")
        if isinstance(error, DataError | checkpoint.CheckpointError):
            print(f"pipetutor: {error}", file=sys.stderr)
            sys.exit(2)
        raise
    dist.destroy_process_group()
