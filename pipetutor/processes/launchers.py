"""What starts the ranks of a launch: this package on this machine, DeepSpeed's launcher on hosts."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipetutor.core import records
from pipetutor.processes import network
from pipetutor.processes.children import Process
from pipetutor.processes.environment import cpu_environment, free_port, rank_environment
from pipetutor.system import machine
from pipetutor.system.gpus import gpus

__all__ = ["by_ssh", "deepspeed", "on_hosts", "on_this_machine"]

HOSTFILE = Path("/job/hostfile")  # where DeepSpeed looks for other hosts unless it is told not to
MODULE = ("--module", "pipetutor.train")


def on_this_machine(words: Sequence[str], ranks: int, directory: Path) -> list[Process]:
    """Return the ranks as processes, started as DeepSpeed's launcher does, which takes seconds more.

    Args:
        words: of a rank's command line.
        ranks: how many.
        directory: the run directory.
    """
    train = [*machine.PYTHON, "-u", "-m", "pipetutor.train", *words]
    port = free_port()
    return [
        Process(train, rank_environment(rank, ranks, port), records.log_path(directory, rank).name)
        for rank in range(ranks)
    ]


def deepspeed(ranks: int) -> list[str]:
    """Return the command that starts ranks on this machine, on the GPUs that CUDA_VISIBLE_DEVICES allows."""
    start, resources = _program(), ["--num_gpus", str(ranks)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and gpus(ranks).count >= ranks:
        chosen = [device.strip() for device in visible.split(",")][:ranks]
        if all(map(str.isdigit, chosen)):
            resources = ["--include", "localhost:" + ",".join(chosen)]
        else:  # DeepSpeed knows no UUIDs; the ranks take what stands here
            start = ["env", f"CUDA_VISIBLE_DEVICES={visible}", *start]
    if HOSTFILE.is_file():
        resources += ["--hostfile", os.devnull]
    return [*start, *resources, "--master_port", str(free_port()), *MODULE]


def _program() -> list[str]:
    found = shutil.which("deepspeed")
    here = Path(sys.executable).with_name("deepspeed")
    if " " in str(here):  # the kernel cannot run a script whose first line names an interpreter with spaces
        return [sys.executable, "-m", "deepspeed.launcher.runner"]
    return ["deepspeed" if found and Path(found).parent == here.parent else str(here)]


def by_ssh(words: Sequence[str], ranks: int, hostfile: str | Path, directory: Path) -> list[Process]:
    """Return DeepSpeed's launcher as the one process that starts all ranks of a cluster, by pdsh and ssh.

    Args:
        words: of a rank's command line.
        ranks: how many, of all hosts.
        hostfile: the hosts, with the ranks of each.
        directory: the run directory, which all of them share.
    """
    about = ["--hostfile", str(hostfile), "--force_multi", "--enable_each_rank_log", str(directory / "logs")]
    command = [*_program(), *about, "--master_port", str(free_port()), *MODULE, *words]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # DeepSpeed hands on what begins with PYTHON
    return [Process(command, environment, "launcher.log", ranks=list(range(ranks)))]


def on_hosts(words: Sequence[str], ranks: int, hosts: int, directory: Path) -> list[Process]:
    """Return DeepSpeed's launcher on each host of a run that has hosts of its own on this machine.

    The hosts share its cores, so a rank gets as many threads as if all ranks were on one.

    Args:
        words: of a rank's command line.
        ranks: how many, of all hosts.
        hosts: how many; each gets as many ranks as any other.
        directory: the run directory, as a learner would type it; the list of hosts is written there.
    """
    share, hostfile = ranks // hosts, directory / "hostfile"
    hostfile.write_text("".join(f"{network.address(host)} slots={share}\n" for host in range(hosts)))
    environment = os.environ | cpu_environment(ranks) | network.ENVIRONMENT | {"PYTHONSAFEPATH": "1"}
    for name in ("LOCAL_SIZE", "WORLD_SIZE"):
        environment.pop(name, None)
    about = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", network.address(0)]
    about += ["--enable_each_rank_log", str(directory / "logs")]
    return [
        Process(
            [*_program(), *about, "--node_rank", str(host), *MODULE, *words],
            environment,
            f"{network.name(host)}.log",
            ranks=list(range(host * share, (host + 1) * share)),
            host=host,
        )
        for host in range(hosts)
    ]
