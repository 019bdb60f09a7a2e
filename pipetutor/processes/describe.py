"""What a run's model and data are, found out before its ranks start.

For names of ours it is known. A function of one's own is called in a process of its own, on torch's ``meta`` device,
and a micro-batch without numbers goes through its layers and its loss: what cannot work is said before anything else
starts, and the kernel of a notebook, which would keep an old version of a file, imports none of it.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipetutor.core.description import Data, Description, check_pair, known_data, known_layers
from pipetutor.core.partition import Layer
from pipetutor.data import fetch
from pipetutor.processes.environment import cpu_environment
from pipetutor.processes.job import do_job, run_job

__all__ = ["describe", "describe_here"]

MICRO_BATCH = 2


def describe(model: str, dataset: str, data_dir: str | Path = fetch.DATA_DIR) -> Description:
    """Describe a run's model and data, in a process of its own where they are one's own.

    Args:
        model: as in ``launch``.
        dataset: as in ``launch``.
        data_dir: where the data is or will be.

    Raises:
        ValueError: there is no such model or data set, or they do not fit each other or a pipeline.
        RunFailed: the process ended early.
    """
    if found := _known(model, dataset):
        return found
    fetch.prepare(dataset, data_dir)
    asked = {"model": model, "dataset": dataset, "data_dir": str(data_dir)}
    with tempfile.TemporaryDirectory(prefix="pipetutor-describe-") as directory:
        env = cpu_environment(1)
        (row,) = run_job(
            "pipetutor.processes.describe", Path(directory), asked, env, 1, "models", lambda row: row["brief"]
        )
    if "refusal" in row:
        raise ValueError(row["refusal"])
    return Description([Layer(*layer) for layer in row["layers"]], Data(**row["data"]))


def describe_here(model: str, dataset: str, data_dir: str | Path) -> Description:
    """Describe a run's model and data in this process: a rank's, say.

    Raises:
        ValueError: see ``describe``.
    """
    return _known(model, dataset) or _look(model, dataset, data_dir)


def _known(model: str, dataset: str) -> Description | None:
    """Return what is known without running code of one's own; None where that has to run."""
    layers, data = known_layers(model), known_data(dataset)
    if layers is None or data is None:
        return None
    check_pair(model, dataset)
    return Description(layers, data)


def _look(model: str, dataset: str, data_dir: str | Path) -> Description:
    from pipetutor.core.crossing import check_model
    from pipetutor.core.model import build_model
    from pipetutor.data import loader

    built = build_model(model, held=())
    train, test = (loader.load(dataset, train, -1, data_dir) for train in (True, False))
    inputs, _ = loader.example(train, MICRO_BATCH)
    tested, _ = loader.example(test, MICRO_BATCH)
    if tested.shape != inputs.shape or tested.dtype != inputs.dtype:
        shapes = " and ".join(f"{tuple(part.shape[1:])} {part.dtype}" for part in (inputs, tested))
        raise ValueError(f"{dataset}: inputs to train and to test on differ: {shapes}")
    try:
        for part in (train, test):
            labels = loader.some_labels(part)
            check_model(built, inputs.new_empty(len(labels), *inputs.shape[1:]), labels)
    except ValueError as error:
        raise ValueError(f"{model} with {dataset}: {error}") from None
    sizes = len(train), len(test)  # type: ignore[arg-type]
    data = Data(*sizes, list(inputs.shape[1:]), str(inputs.dtype).removeprefix("torch."))
    return Description(built.about(), data)


def _work(directory: Path, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        found = _look(**asked)
    except ValueError as error:
        yield {"refusal": str(error), "brief": "refused"}
        return
    brief = f"{len(found.layers)} layers, {found.data.train} examples"
    yield {"layers": found.layers, "data": vars(found.data), "brief": brief}


if __name__ == "__main__":
    do_job(_work)
