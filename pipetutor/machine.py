"""What this machine has, and what one rank may take of it.

Everything here works without torch: the launcher asks these questions before it starts a process, and a
rank asks them before torch loads, because huge pages, thread counts and DeepSpeed's accelerator are read
once, at import.
"""

import importlib.metadata
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from pipetutor import cgroups

PINNED = ("torch", "torchvision", "deepspeed", "numpy", "jupyterlab", "papermill")


class Memory(NamedTuple):
    """Bytes that this process and those beside it may take in all, and those that are still free."""

    total: int
    free: int


def cpu_cores() -> int:
    """Return the number of cores that this process may keep busy: of its affinity and its container, the least."""
    return min(len(os.sched_getaffinity(0)), max(1, math.ceil(min(cgroups.quota(), os.cpu_count() or 1))))


def memory() -> Memory:
    """Return the memory of this machine, or of the container that this process is in."""
    host = psutil.virtual_memory()
    limits = cgroups.memory()
    total = min([host.total, *(limit for limit, _ in limits)])
    return Memory(total, max(0, min([host.available, *(limit - used for limit, used in limits)])))


def oom_kills() -> int | None:
    """Return how many processes the kernel has killed here for want of memory; see ``cgroups``."""
    return cgroups.oom_kills()


def cpu_name() -> str:
    """Return the CPU's name as Linux gives it, or its architecture where it gives none, as on ARM."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def gpu_count(env: Mapping[str, str] = os.environ) -> int:
    """Return the number of CUDA devices that a process with this environment can see.

    The driver is asked through NVML, which neither loads torch nor creates a CUDA context.

    Args:
        env: the environment whose ``CUDA_VISIBLE_DEVICES`` narrows the count.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        present = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
    except Exception:  # no NVML binding, no driver, no device: each of them means no GPU
        return 0
    visible = env.get("CUDA_VISIBLE_DEVICES")
    return (
        present
        if visible is None
        else min(present, len([d for d in visible.split(",") if d.strip() not in ("", "-1")]))
    )


def bf16_is_native() -> bool:
    """Say whether this processor multiplies bf16 numbers with instructions of its own. It loads torch.

    Where it does not, oneDNN computes bf16 by way of other formats. Convolutions and linear layers were measured to
    take twice as long as in fp32 with AVX-512 (half as long with its bf16 instructions), and ten times with AVX2.
    """
    import torch

    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # On x86, oneDNN calls bf16 supported as soon as there is AVX-512.
    return platform.machine() != "x86_64" or torch.cpu._is_avx512_bf16_supported()


def versions() -> dict[str, str]:
    """Return the installed version of each package that decides what a run computes."""
    return {name: importlib.metadata.version(name) for name in PINNED}


def prepare_rank(env: MutableMapping[str, str], argv: Sequence[str]) -> None:
    """Set what must stand in a rank's environment before torch and DeepSpeed load.

    A value that the user has set is kept.

    - ``THP_MEM_ALLOC_ENABLE``: torch's CPU allocator backs large tensors with huge pages. Each
      micro-batch allocates its weight gradients anew (151 MB for AlexNet's largest layer), and page
      faults otherwise cost a fifth of the step.
    - ``OMP_NUM_THREADS``: ranks on one host share its cores evenly instead of each taking all of them.
    - ``DS_ACCELERATOR``: DeepSpeed takes CUDA as soon as one GPU is there, even when there are more ranks
      than GPUs; those ranks belong on the CPU.

    Args:
        env: the rank's environment, changed in place.
        argv: the rank's command line; only ``--backend gloo`` is looked for, which asks for the CPU.
    """
    env.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    local_ranks = int(env.get("LOCAL_SIZE", "1"))
    wants_cpu = re.search(r"--backend[= ]gloo\b", " ".join(argv)) is not None
    if wants_cpu or gpu_count(env) < local_ranks:
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // local_ranks)))


def check() -> list[tuple[str, str, str]]:
    """Look the machine over, as the first cell of the first notebook does.

    Returns:
        Rows of (what, found, advice); the advice is empty where nothing needs doing.
    """
    cores, gpus = cpu_cores(), gpu_count()
    gigabytes = memory().total / 2**30
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    rows = [
        ("CPU cores", str(cores), "" if cores >= 2 else "two stages will share one core: expect no speed-up"),
        (
            "memory",
            f"{gigabytes:.0f} GiB",
            "" if gigabytes >= 7.5 else "two stages need about 8 GB: close programs, or give the container more",
        ),
        ("free disk", f"{free:.0f} GiB", "" if free >= 3 else "checkpoints and data need 3 GB: free some space"),
        ("GPUs", str(gpus), "" if gpus >= 2 else "none needed: the pipeline runs on the CPU with gloo"),
        (
            "C++ compiler",
            compiler or "none",
            "" if compiler else "none needed: no operation is compiled here",
        ),
    ]
    pins = importlib.metadata.requires("pipetutor") or []
    for name, installed in versions().items():
        pinned = next((r.split("==")[1].split(";")[0].strip() for r in pins if r.startswith(f"{name}==")), "")
        wrong = installed.split("+")[0] != pinned
        rows.append((name, installed, f"the workbook is tested with {pinned}: run `make run`" if wrong else ""))
    return rows
