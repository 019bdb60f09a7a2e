"""What a rank finds in its environment, and where the ranks of a job meet.

DeepSpeed's launcher, or ``starters`` in its place, sets a rank's number and the meeting place. Huge pages, thread
counts and DeepSpeed's accelerator are read once, when torch and DeepSpeed load, so they are set ahead of that, as
soon as ``pipetutor`` is imported.
"""

import os
import random
import re
import socket
from collections import deque
from collections.abc import MutableMapping, Sequence

import psutil

from pipetutor.system.gpus import gpus
from pipetutor.system.machine import cpu_cores

__all__ = ["cpu_environment", "free_port", "prepare_rank", "rank_environment"]

LOOPBACK = "lo"
_kept: deque[socket.socket] = deque(maxlen=16)  # ports of the last runs; nobody has more of them at once


def free_port() -> int:
    """Return a TCP port that is free on this machine, and that nobody else is given while the run lasts.

    Linux gives ports from 32768 on to connections that go out, those of another run among them, which could take one
    before the ranks do. So this one lies below, and is drawn at random. This process keeps it: nobody else who asks
    can have it, and the ranks, whose socket allows for another at its port, can listen there.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 29_500)  # 29500 is DeepSpeed's own
        probe = socket.socket()
        try:
            probe.bind(("", port))
        except OSError:
            probe.close()
            continue
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.set_inheritable(True)  # for a process that becomes the launcher; a child gets it only if it is told so
        _kept.append(probe)
        return port


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return what a rank finds in its environment: that of this process, and what DeepSpeed's launcher would add.

    Args:
        rank: its number.
        ranks: how many there are, all on this host.
        port: where they meet.
    """
    env = dict(os.environ) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
    }
    return env | {"CROSS_RANK": "0", "CROSS_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def cpu_environment(ranks: int) -> dict[str, str]:
    """Return what the environment of as many ranks on one CPU says of threads, memory, devices and network."""
    env = dict(os.environ) | {"LOCAL_SIZE": str(ranks), "WORLD_SIZE": str(ranks)}
    prepare_rank(env, ["--backend=gloo"])
    names = ("OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "GLOO_SOCKET_IFNAME")
    found = {name: env[name] for name in names if name in env}
    return found | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def prepare_rank(env: MutableMapping[str, str], argv: Sequence[str]) -> None:
    """Set what must stand in a rank's environment before torch and DeepSpeed load.

    A value that the user has set is kept, save one that belongs to another job.

    - ``THP_MEM_ALLOC_ENABLE``: torch's CPU allocator backs large tensors with huge pages. Each
      micro-batch allocates its weight gradients anew (151 MB for AlexNet's largest layer), and page
      faults otherwise cost a fifth of the step.
    - ``OMP_NUM_THREADS``: ranks on one host share its cores evenly instead of each taking all of them.
    - ``CUDA_VISIBLE_DEVICES``: DeepSpeed's launcher overwrites it with its own numbers, 0 and 1 for two ranks. Where
      these are not among the devices that the user allows, all that the user allows are put back, and the rank's
      number on its host chooses among them.
    - ``DS_ACCELERATOR``: DeepSpeed takes CUDA as soon as one GPU is there, even when there are more ranks
      than GPUs; those ranks belong on the CPU.
    - ``TORCHELASTIC_USE_AGENT_STORE``: set by torchrun for the ranks of its own job. Below it, no rank of this one
      would serve the store in which they meet.
    - ``GLOO_SOCKET_IFNAME``: gloo looks up the address of this host's name, which takes up to a minute where no name
      server answers. Ranks that are all on one host meet on its loopback interface; see ``agreement`` for others.

    Args:
        env: the rank's environment, changed in place.
        argv: the rank's command line; only ``--backend gloo`` is looked for, which asks for the CPU.
    """
    env.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    env.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    allowed = _allowed_devices()
    if allowed is not None and not _devices(env.get("CUDA_VISIBLE_DEVICES", "")) <= _devices(allowed):
        env["CUDA_VISIBLE_DEVICES"] = allowed
    local_ranks = int(env.get("LOCAL_SIZE", "1"))
    if env.get("WORLD_SIZE") == str(local_ranks) and LOOPBACK in (name for _, name in socket.if_nameindex()):
        env.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    wants_cpu = re.search(r"--backend[= ]gloo\b", " ".join(argv)) is not None
    if wants_cpu or gpus(local_ranks, env).count < local_ranks:
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // local_ranks)))


def _devices(names: str) -> set[str]:
    return {name.strip() for name in names.split(",")}


def _allowed_devices() -> str | None:
    """Return the ``CUDA_VISIBLE_DEVICES`` that DeepSpeed's command was started with, None without it or them.

    A rank's parent is the launcher, and the launcher's the runner, which takes the variable away for the launcher.
    """
    try:
        parents = psutil.Process().parents()[:2]
        if not parents or "deepspeed.launcher.launch" not in parents[0].cmdline():
            return None
        found = (process.environ().get("CUDA_VISIBLE_DEVICES") for process in parents)
        return next((names for names in found if names is not None), None)
    except psutil.Error:  # another user's process, or one that is gone
        return None
