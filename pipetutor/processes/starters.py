"""Ranks that torchrun or Slurm's srun starts: what DeepSpeed's launcher would have told them.

    torchrun --nproc-per-node 2 -m pipetutor.train -p 2
    srun --ntasks 2 python -m pipetutor.train -p 2

All else reads DeepSpeed's words alone, see ``take_over``.
"""

import re
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import pairwise

__all__ = ["command", "is_rank", "take_over"]

# What srun tells each task of a step. A batch script, which is no task of one, has only some of them.
STEP = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_NODEID")


def is_rank(argv: Sequence[str]) -> bool:
    """Tell a rank by its whole command line from, say, a notebook's kernel that finds what a starter has set."""
    return ("-m", "pipetutor.train") in pairwise(argv)


def take_over(env: MutableMapping[str, str]) -> None:
    """Add to a rank's environment what DeepSpeed's launcher would have set, where another starter was at work.

    Starters may stand in each other, as torchrun in a step of Slurm: the inner one counts.

    Args:
        env: the environment of this rank, changed in place.
    """
    if "LOCAL_SIZE" in env:
        return
    if "LOCAL_WORLD_SIZE" in env:
        env.update(_of_torchrun(env))
    elif all(name in env for name in STEP):
        env.update(_of_srun(env))


def command(env: Mapping[str, str], ranks: int) -> str:
    """Return the beginning of a command that starts ranks, for one who has started Python alone.

    Args:
        env: the environment of this process.
        ranks: how many.
    """
    if "LOCAL_WORLD_SIZE" in env:
        return f"torchrun --nproc-per-node {env['LOCAL_WORLD_SIZE']} -m pipetutor.train"
    if "SLURM_JOB_ID" in env:
        return f"srun --ntasks {ranks} python -m pipetutor.train"
    return f"deepspeed --num_gpus {ranks} --module pipetutor.train"


def _port(number: int) -> int:
    """Return a port below those that Linux gives to connections that go out, the same on every host."""
    return 20_000 + number % 9_500


def _of_torchrun(env: Mapping[str, str]) -> dict[str, str]:
    """At torchrun's MASTER_PORT its own agent serves a store: the ranks meet at another one on that host."""
    return {
        "LOCAL_SIZE": env["LOCAL_WORLD_SIZE"],
        "CROSS_RANK": env["GROUP_RANK"],
        "CROSS_SIZE": env["GROUP_WORLD_SIZE"],
        "MASTER_PORT": str(_port(int(env["MASTER_PORT"]))),
    }


def _of_srun(env: Mapping[str, str]) -> dict[str, str]:
    """The ranks meet on the first host of their step, where several steps of several jobs may be.

    What the user has set of the meeting place and of threads is kept.
    """
    tasks, node = _tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"]), int(env["SLURM_NODEID"])
    step = 10 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"]) % 10
    found = {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_SIZE": str(tasks[node]),
        "CROSS_RANK": str(node),
        "CROSS_SIZE": str(len(tasks)),
    }
    default = {"MASTER_ADDR": _first_host(env["SLURM_STEP_NODELIST"]), "MASTER_PORT": str(_port(step))}
    if cores := env.get("SLURM_CPUS_PER_TASK"):  # to which a rank is bound: no share of them, but all are its own
        default["OMP_NUM_THREADS"] = cores
    return found | {name: env.get(name, value) for name, value in default.items()}


def _tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node: ``2(x3),1`` is three nodes with two, and one with one."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]


def _first_host(nodes: str) -> str:
    """Return the first name of a list such as ``gpu[07-09,12],login``, in which brackets hold what differs."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group())
