"""What this machine has, and what one rank may take of it.

Everything here works without torch: the launcher asks these questions before it starts a process, and a
rank asks them before torch loads, because huge pages, thread counts and DeepSpeed's accelerator are read
once, at import.
"""

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import runpy
import shutil
import socket
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipetutor import cgroups

PINNED = ("torch", "torchvision", "deepspeed", "numpy", "jupyterlab", "papermill")
LOOPBACK = "lo"
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


@dataclass(frozen=True)
class Gpus:
    """The CUDA devices that a process can use.

    Attributes:
        count: how many.
        why: why it is not all GPUs of the machine; empty where it is, and where there are none.
    """

    count: int
    why: str = ""


def gpus(ranks: int = 0, env: Mapping[str, str] = os.environ) -> Gpus:
    """Return the CUDA devices that processes with this environment can use.

    The driver is asked through NVML and torch's build through its file of versions: neither loads torch nor creates
    a CUDA context, which would take memory of a GPU that may be somebody else's.

    Args:
        ranks: processes that want one each. Where there are enough, a ``DS_ACCELERATOR`` that names another device
            leaves none; where there are not, it may be the word of ``prepare_rank``, and does not count.
        env: the environment, whose ``CUDA_VISIBLE_DEVICES`` narrows the choice.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        try:
            present = nvml.nvmlDeviceGetCount()
            visible = _visible(nvml, env.get("CUDA_VISIBLE_DEVICES"))
            driver = _driver(nvml)
        finally:
            nvml.nvmlShutdown()
    except Exception:  # no NVML binding, no driver, no device: each of them means no GPU
        return Gpus(0)
    if not present:
        return Gpus(0)
    torch = _torch_build()
    if not torch["cuda"]:
        device = "ROCm" if torch["hip"] else "the CPU"
        return Gpus(0, f"torch {torch['__version__']} is built for {device}, not for CUDA")
    if not driver:
        return Gpus(0, "the driver's library, libcuda.so.1, is missing")
    if driver // 1000 < int(torch["cuda"].split(".")[0]):  # a later CUDA of the same number works with it
        known = f"{driver // 1000}.{driver % 1000 // 10}"
        return Gpus(0, f"torch is built for CUDA {torch['cuda']}, and the driver is one for CUDA {known}: too old")
    accelerator = env.get("DS_ACCELERATOR", "cuda")
    if accelerator != "cuda" and visible >= ranks:
        return Gpus(0, f"DS_ACCELERATOR={accelerator}")
    if visible < present:
        names = env.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={names}" if names is not None else "CUDA uses one MIG device at a time"
        return Gpus(visible, f"{why} leaves {visible} of {present}")
    return Gpus(visible)


def _driver(nvml: Any) -> int:
    """Return the CUDA version of the driver's library, 12040 for 12.4; 0 without it, as in some containers."""
    try:
        return nvml.nvmlSystemGetCudaDriverVersion_v2()
    except nvml.NVMLError:
        return 0


def _torch_build() -> dict[str, Any]:
    """Return what torch says of its build, without loading it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {"__version__": "(missing)", "cuda": None, "hip": None}
    return {"hip": None} | runpy.run_path(str(Path(spec.origin).with_name("version.py")))


def _visible(nvml: Any, names: str | None) -> int:
    """Return how many devices CUDA shows to a process that has these ``CUDA_VISIBLE_DEVICES``.

    CUDA enumerates one MIG device at most, and no whole GPU beside it (NVIDIA's MIG User Guide, "CUDA Device
    Enumeration").
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    whole = {nvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    chosen = list(whole) if names is None else _chosen(names, list(whole))
    try:
        if chosen and chosen[0] not in whole:
            nvml.nvmlDeviceGetHandleByUUID(chosen[0])
            return 1
    except nvml.NVMLError:  # there is no MIG device of this name
        return 0
    return min(len(chosen), 1) if any(_is_divided(nvml, whole[uuid]) for uuid in chosen) else len(chosen)


def _chosen(names: str, gpus: Sequence[str]) -> list[str]:
    """Return the UUIDs of the devices that ``CUDA_VISIBLE_DEVICES`` names, as CUDA reads it.

    They are indices, or UUIDs of GPUs or as much of one as makes it unique, or names of MIG devices. The first that
    means no device ends the list, and one that is named twice makes it empty.

    >>> _chosen("1,-1,0", ["GPU-a", "GPU-b"])
    ['GPU-b']
    """
    kind = next((prefix for prefix in ("GPU-", "MIG-") if names.startswith(prefix)), "")
    chosen: list[str] = []
    for name in names.split(","):
        index = re.match(r"\s*\+?(\d+)", name)
        if kind and name.startswith(kind):
            found = [name] if kind == "MIG-" else [uuid for uuid in gpus if uuid.startswith(name)]
        else:
            found = list(gpus[int(index[1]) :][:1]) if index and not kind else []
        if len(found) != 1:
            break
        if found[0] in chosen:
            return []
        chosen += found
    return chosen


def _is_divided(nvml: Any, handle: Any) -> bool:
    """Say whether a GPU is in MIG mode."""
    try:
        return nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError:  # it is of a kind that has none
        return False


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
      server answers. Ranks that are all on one host meet on its loopback interface.

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
