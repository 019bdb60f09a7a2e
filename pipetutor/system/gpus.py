"""Which CUDA devices a process can use, asked without loading torch or creating a CUDA context."""

import importlib.util
import os
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Gpus", "gpus"]


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
