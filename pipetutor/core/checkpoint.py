"""What a run learned, kept: save, resume on any number of stages and replicas, export.

    checkpoints/step-000020/
        checkpoint.json            model, step, position in the data, seed, optimizer, sha256 of each file
        shard-00001-….safetensors  what rank 0 holds: weights, optimizer state, random numbers

torch.distributed.checkpoint writes and reads the tensors under the names of torchvision's ``state_dict``
(``model.features.0.weight``, ``optimizer.features.0.weight.exp_avg``), so a stage finds its own whatever the
stages were before. The files are safetensors, which hold numbers alone: DCP's own format is read back
with pickle, which executes what a file tells it to.

A checkpoint is made in a hidden directory and gets its name in one step, once all of it is on disk. torch is
imported only where tensors are touched: ``launch`` checks a checkpoint before it starts anything.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipetutor.core.records import write_json
from pipetutor.options import Options
from pipetutor.system import disk
from pipetutor.system.kinds import shown

__all__ = [
    "CheckpointError",
    "check_fits",
    "find",
    "identity",
    "load_tensors",
    "read_manifest",
    "stored_tensors",
    "verify",
]

if TYPE_CHECKING:
    from pipetutor.core.engine import Engine, Kept

KEEP = 2  # AlexNet with Adam is 0.7 GB a checkpoint
MANIFEST = "checkpoint.json"
NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(ValueError):
    """A checkpoint is not there, damaged or of something else; the message says which and what to do."""


def find(path: str | Path) -> Path:
    """Return the checkpoint that ``path`` means: itself, or the newest one of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    try:
        if (path / MANIFEST).exists():
            return path
        found = _all(path / "checkpoints")
    except OSError as error:  # as for a name that is too long, or a directory that may not be read
        raise CheckpointError(disk.cannot(f"read checkpoint {path}", error, "give a run or a checkpoint")) from None
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint: give a run directory that was saved into (save_every=N, --save-every N), "
            "or one of its checkpoints/step-…"
        )
    return found[-1]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _all(parent: Path) -> list[Path]:
    """Return the checkpoints in a directory, the oldest first. To glob(), one that may not be read is empty."""
    names = os.listdir(parent) if parent.exists() else []
    return sorted((parent / name for name in names if NAME.fullmatch(name)), key=_step)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself, as it stands there; ``verify`` has looked at it before."""
    return json.loads((checkpoint / MANIFEST).read_text())


def verify(path: str | Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself, having compared every file of it with its sum.

    Args:
        path: a checkpoint, or a run directory, whose newest is meant.

    Returns:
        The content of ``checkpoint.json``.

    Raises:
        CheckpointError: something is missing or altered.
    """
    path = find(path)
    advice = ""
    try:
        if others := [other for other in _all(path.parent) if other != path]:
            advice = f"; resume from {others[-1]} instead"
        manifest = read_manifest(path)
        problem = ""
        if missing := {"step", "position", "stages", "replicas", "files"} - manifest.keys():
            problem = f"it has no {min(missing)}"
        elif not isinstance(manifest["step"], int):
            problem = f"its step is {shown(manifest['step'])}"
        if problem:
            raise CheckpointError(f"{path / MANIFEST} is damaged ({problem}){advice}")
        files = dict(manifest["files"])
        present = {name for name in os.listdir(path) if name.endswith(".safetensors")}
        if surplus := present - files.keys():
            raise CheckpointError(
                f"checkpoint {path} has a file that was not saved with it, {min(surplus)}: remove it"
            )
        for name, sha256 in files.items():
            if name not in present:
                raise CheckpointError(f"checkpoint {path} is incomplete: {name} is missing{advice}")
            if _sha256(path / name) != sha256:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} does not have its sha256{advice}")
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(disk.cannot(f"read checkpoint {path}", error) + advice) from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged ({type(error).__name__}){advice}") from None
    return manifest


def identity(options: Options, config: dict[str, Any]) -> dict[str, Any]:
    """Return what a run that resumes must have in common with the one that saved."""
    optimizer = config["optimizer"]["type"].lower()  # as checkpoints have had it from the first
    return {"model": options.model, "dataset": options.dataset, "seed": options.seed, "optimizer": optimizer}


def check_fits(manifest: dict[str, Any], wanted: dict[str, Any], steps: int) -> None:
    """Raise CheckpointError unless a checkpoint continues the run that is asked for.

    Args:
        manifest: from ``verify``.
        wanted: the run's ``identity``.
        steps: the run's last step.
    """
    for name, value in wanted.items():
        if manifest.get(name) != value:
            raise CheckpointError(
                f"the checkpoint was saved with {name} {manifest.get(name)!r}, and this run has {value!r}: "
                f"give it {name} {manifest.get(name)!r}, or start from its weights alone (export them first)"
            )
    if steps < manifest["step"]:
        raise CheckpointError(
            f"the checkpoint stands after step {manifest['step']}, and this run ends with step {steps}: "
            f"steps counts from the first run's start; give it at least {manifest['step']}"
        )


def _random_state(rank: int) -> dict[str, Any]:
    import torch

    state = {f"random.{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state[f"random.{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


def save(engine: "Engine", directory: Path, manifest: dict[str, Any]) -> None:
    """Save all ranks' state as ``directory/checkpoints/step-NNNNNN``; every rank calls this.

    Args:
        engine: of this rank.
        directory: the run directory, on a file system that all hosts share.
        manifest: what to keep beside the tensors; ``step`` names the checkpoint.

    Raises:
        Exception: it cannot be written, on any rank; the checkpoints before it are as they were.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    rank = dist.get_rank()
    parent = directory / "checkpoints"
    final = parent / f"step-{manifest['step']:06d}"
    partial = parent / f".{final.name}.partial"
    if rank == 0:
        for left in parent.glob(".step-*"):  # of a run that was killed while it saved
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    dist.barrier()
    tensors = _random_state(rank)
    for name, weight, parts in engine.kept():
        tensors[f"model.{name}"] = weight
        tensors |= {f"optimizer.{name}.{part}": value for part, value in parts.items()}
    writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # of replicas that differ, the first
    dcp.save(tensors, storage_writer=writer, planner=planner)
    mine = {path.name: _sha256(path) for path in partial.glob(f"shard-{rank + 1:05d}-*")}
    sums: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(sums, mine)
    if rank == 0:
        files = {name: sha256 for part in sums for name, sha256 in sorted(part.items())}
        schedule = {}
        if engine.scheduler:
            rates = [group["lr"] for group in engine.optimizer.param_groups]
            schedule = {"scheduler": engine.scheduler.state_dict(), "lr": rates}
        write_json(partial / MANIFEST, manifest | schedule | {"ranks": dist.get_world_size(), "files": files})
        _name(partial, final)
    dist.barrier()


def _name(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name, then remove older ones, so that ``KEEP`` of them stay with it."""
    for path in [partial / MANIFEST, partial]:  # the tensors have been synced
        disk.sync(path)  # else a power cut can keep the name and lose the content
    if final.exists():
        _remove(final)
    os.rename(partial, final)
    older = [path for path in _all(final.parent) if _step(path) < _step(final)]
    for path in older[: 1 - KEEP]:
        _remove(path)


def _remove(checkpoint: Path) -> None:
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")  # its name must not stand over half of it
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def keep_until(directory: Path, step: int) -> None:
    """Remove a run directory's checkpoints after ``step``, where the run goes on: the newest must be of this run."""
    for path in _all(directory / "checkpoints"):
        if _step(path) > step:
            _remove(path)


def load_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Fill these tensors from the checkpoint, each process for itself."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)


def stored_tensors(path: Path) -> dict[str, Any]:
    """Return an empty tensor for each tensor of the checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp

    found = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {name: meta for name, meta in found.items() if isinstance(meta, dcp.TensorStorageMetadata)}
    return {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in tensors.items()}


def restore(engine: "Engine", path: Path, manifest: dict[str, Any], topology: dict[str, int]) -> str:
    """Fill an engine from a checkpoint: weights, optimizer, schedule, and random numbers where they fit.

    Args:
        engine: of this rank, in a run of any number of stages and replicas.
        path: a checkpoint that ``verify`` has accepted.
        manifest: what ``verify`` returned.
        topology: this run's ``stages`` and ``replicas``.

    Returns:
        Why the random numbers, which dropout draws, do not go on where they stood; nothing where they do. They belong
        to ranks, and are those of a device: they cannot where the topology or the kind of device is another one.
    """
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    stored = stored_tensors(path)
    mine = {name: empty for name, empty in stored.items() if name.startswith(f"random.{rank}.")}
    lost = ""
    if any(manifest[name] != count for name, count in topology.items()):
        lost = "another topology than that of the checkpoint"
    elif mine.keys() != _random_state(rank).keys():
        lost = "another kind of device than that of the checkpoint"
    if lost:
        mine = {}
    state = engine.state()
    for name, tensor in state.items():
        there = stored.get(f"model.{name}")
        if there is None or there.shape != tensor.shape:
            kept = f"keeps {name} as {tuple(there.shape)}" if there is not None else f"has no {name}"
            raise CheckpointError(
                f"checkpoint {path} {kept}, and the model has {tuple(tensor.shape)}: it is not the model of the "
                "checkpoint any more; start anew, or go back to the code that saved"
            )
    engine.load(_kept(path, stored, state), manifest["step"])
    if "scheduler" in manifest and engine.scheduler:
        engine.scheduler.load_state_dict(manifest["scheduler"])
        for group, lr in zip(engine.optimizer.param_groups, manifest["lr"], strict=True):
            group["lr"] = lr  # which the schedule would only set after the next step
    load_tensors(path, mine)
    for name, value in mine.items():
        (torch.set_rng_state if name.endswith("cpu") else torch.cuda.set_rng_state)(value)
    return lost


def _kept(path: Path, stored: dict[str, Any], wanted: Iterable[str]) -> Iterator["Kept"]:
    """Read what a checkpoint keeps of these tensors, one after another, so that no more is in memory at a time."""
    from pipetutor.core.engine import Kept

    for name in wanted:
        parts = {key: stored.pop(key) for key in list(stored) if _tensor_of(key) == name}
        load_tensors(path, parts)
        weight = parts.pop(f"model.{name}")
        yield Kept(name, weight, {key.rsplit(".", 1)[1]: value for key, value in parts.items()})


def _tensor_of(key: str) -> str:
    """Return ``features.0.weight`` for ``model.features.0.weight`` and ``optimizer.features.0.weight.exp_avg``."""
    kind, _, name = key.partition(".")
    return {"model": name, "optimizer": name.rpartition(".")[0]}.get(kind, "")
