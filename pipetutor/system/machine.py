"""What this machine has, and what one process may take of it. Without torch, but for ``bf16_is_native``."""

import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

from pipetutor.system import cgroups
from pipetutor.system.gpus import gpus

__all__ = ["PYTHON", "bf16_is_native", "check", "code_digest", "cpu_cores", "cpu_name", "memory", "versions"]

PINNED = ("torch", "torchvision", "deepspeed", "numpy", "jupyterlab", "papermill")
# How our processes begin. -P: a learner's file random.py, say, in the working directory is none of their modules.
PYTHON = (sys.executable, "-P")


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


def cpu_name() -> str:
    """Return the CPU's name as Linux gives it, or its architecture where it gives none, as on ARM."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


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


def code_digest() -> str:
    """Return a sum of this package's own files, so that hosts with other versions of it are told apart."""
    root = Path(__file__).parents[1]
    files = sorted((path.relative_to(root).as_posix(), path.read_bytes()) for path in root.rglob("*.py"))
    return hashlib.sha256(repr(files).encode()).hexdigest()[:12]


def check() -> list[tuple[str, str, str]]:
    """Look the machine over, as the first cell of the first notebook does.

    Returns:
        Rows of (what, found, advice); the advice is empty where nothing needs doing.
    """
    cores, found = cpu_cores(), gpus()
    gpu_advice = "" if found.count >= 2 else f"{found.why or 'none needed'}: the pipeline runs on the CPU with gloo"
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
        ("GPUs", str(found.count), gpu_advice),
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
