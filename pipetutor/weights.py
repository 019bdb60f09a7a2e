"""Weights alone, as torchvision's own ``state_dict``: out of a checkpoint, and into a model to start from.

python -m pipetutor.weights runs/20261124-101502-p2r1 alexnet.pt
"""

import contextlib
import os
import zipfile
from pathlib import Path

import torch

from pipetutor.core import checkpoint
from pipetutor.core.checkpoint import CheckpointError
from pipetutor.core.model import Model, build_model
from pipetutor.processes.entry import command
from pipetutor.system import disk
from pipetutor.system.kinds import check

__all__ = ["check_weights", "export", "load_weights"]

NEEDED = "give a file that torch.save(model.state_dict(), file) or pipetutor.weights wrote"


def export(path: str | Path, file: str | Path) -> Path:
    """Write a checkpoint's weights as a plain ``state_dict``, torchvision's for its models.

    Args:
        path: a checkpoint, or a run directory, whose newest is meant.
        file: a ``.pt`` file, which holds tensors alone: ``torch.load`` reads it with ``weights_only``.

    Returns:
        The file.

    Raises:
        ValueError: ``path`` or ``file`` is no path.
        CheckpointError: there is no checkpoint, it is damaged, or the file cannot be written.

    >>> export("runs/20261124-101502-p2r1", "alexnet.pt")  # doctest: +SKIP
    >>> torchvision.models.alexnet(num_classes=10).load_state_dict(torch.load("alexnet.pt"))  # doctest: +SKIP
    """
    check("path", path, "path")
    check("file", file, "path")
    path, file = checkpoint.find(path), Path(file)
    checkpoint.verify(path)
    state = {name: empty for name, empty in checkpoint.stored_tensors(path).items() if name.startswith("model.")}
    checkpoint.load_tensors(path, state)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        torch.save({name.removeprefix("model."): tensor for name, tensor in state.items()}, partial)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:
        error = error if isinstance(error, OSError) else OSError(str(error))  # torch's own, for a missing directory
        raise CheckpointError(disk.cannot(f"write the weights to {file}", error)) from None
    finally:
        with contextlib.suppress(OSError):  # of a directory that is none, or not ours
            partial.unlink()
    return file


def load_weights(model: Model, file: str | Path) -> None:
    """Fill a model, or what is held of it, from a ``state_dict`` file, executing nothing that is in the file.

    Args:
        model: of the same layers as the file's.
        file: what ``export`` or ``torch.save(model.state_dict(), file)`` wrote.

    Raises:
        CheckpointError: the file cannot be read, holds other than tensors, or is of another model.
    """
    try:
        # Mapped, only what is held is read; the form of old files cannot be.
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError as error:
        raise CheckpointError(f"weights {file}: {error.strerror or error}; {NEEDED}") from None
    except Exception as error:  # torch raises several kinds, for what is no archive and for what it will not execute
        kind = type(error).__name__
        raise CheckpointError(
            f"weights {file} is not a state_dict that holds tensors alone ({kind}); {NEEDED}"
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"weights {file} is not a state_dict, but a {type(found).__name__}; {NEEDED}")
    wanted = model.whole.state_dict()
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in found.items()}
    kind = type(model.whole).__name__
    for name, tensor in wanted.items():
        if name not in shapes:
            raise CheckpointError(f"weights {file} are not of this {kind}: {name} is missing")
        if shapes[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"weights {file} are not of this {kind}: {name} is {shapes[name]}, and the model's is "
                f"{tuple(tensor.shape)}"
            )
    if surplus := shapes.keys() - wanted.keys():
        raise CheckpointError(f"weights {file} are not of this {kind}: it has no {min(surplus)}")
    for name, tensor in wanted.items():
        if not tensor.is_meta:
            tensor.copy_(found[name])


def check_weights(model: str, file: str | Path) -> None:
    """Raise CheckpointError unless a file holds weights for a model of this name."""
    load_weights(build_model(model, held=()), file)


def main() -> None:
    """Run ``export`` from the command line; status 2 for bad input."""
    written = command(export, "pipetutor.weights")
    print(f"wrote {written}")


if __name__ == "__main__":
    main()
