"""Measure what each layer costs here, in processes of their own, which ``pipetutor.costs.ranks`` runs."""

import shutil
from pathlib import Path
from typing import Any

from pipetutor.core import records
from pipetutor.core.description import check_pair, known_data, known_layers
from pipetutor.costs.table import FILE, LayerCosts
from pipetutor.data import fetch
from pipetutor.processes.entry import briefly, command
from pipetutor.processes.environment import cpu_environment
from pipetutor.processes.job import run_job
from pipetutor.system import machine
from pipetutor.system.kinds import check, counted, whole
from pipetutor.system.network import check_network

__all__ = ["measure"]

STEPS, MICRO_BATCHES = 4, 4  # that are measured
COPIES = 5  # of the parameters, at most, in one rank: themselves, gradients (sum and new), Adam's two moments


@briefly
def measure(
    model: str = "alexnet",
    micro_batch: int = 8,
    ranks: int = 2,
    *,
    dataset: str = "synthetic",
    dropout: float | None = None,
    data_dir: str | Path = fetch.DATA_DIR,
    runs_dir: str | Path = "runs",
) -> LayerCosts:
    """Measure what each layer costs on this machine's CPU in fp32, in processes of their own.

    The costs hold for pipelines of as many ranks as measured; nothing is left running.

    Args:
        model: as in ``launch``.
        micro_batch: examples in a micro-batch.
        ranks: processes that measure at once: the ranks that the pipeline will have. Each builds the whole model.
        dataset: as in ``launch``: ``sums`` for a gpt.
        dropout: probability for every dropout layer; by default the model's own, and 0 turns dropout off.
        data_dir: where the data is or will be.
        runs_dir: where the directory with ``costs.json`` is made.

    Raises:
        ValueError: something asked for cannot work; nothing was started.
        RunFailed: a measuring process failed.

    >>> costs = measure(micro_batch=8, ranks=2)  # doctest: +SKIP
    >>> costs.for_bounds([0, 16, 22]).forward  # doctest: +SKIP
    [0.057, 0.023]
    """
    check("model", model, "text")
    check("dataset", dataset, "text")
    layers, data = known_layers(model), known_data(dataset)
    check_pair(model, dataset)
    check("micro_batch", micro_batch, whole(1, data.train, 8) if data else "count")
    check("ranks", ranks, "count")
    check("dropout", dropout, "share?")
    check("data_dir", data_dir, "path")
    check("runs_dir", runs_dir, "path")
    check_network("gloo")
    needed = COPIES * 4 * sum(layer.parameters for layer in layers or ())
    free = machine.memory().free
    if ranks * needed > free:
        raise ValueError(
            f"all of {model} on each of {counted(ranks, 'rank')} takes {ranks * needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} are free: use {counted(max(1, free // needed), 'rank')} or a smaller model"
        )
    fetch.prepare(dataset, data_dir)
    directory = records.create(Path(runs_dir), "costs")
    asked = {"model": model, "dataset": dataset, "micro_batch": micro_batch, "ranks": ranks, "dropout": dropout}
    total = STEPS * MICRO_BATCHES
    env = cpu_environment(ranks) | {fetch.VARIABLE: str(data_dir)}
    rows = run_job("pipetutor.costs.ranks", directory, asked, env, total, "micro-batches", _brief)
    for refusal in (row["refusal"] for row in rows if "refusal" in row):
        shutil.rmtree(directory)
        raise ValueError(refusal)
    return LayerCosts.load(directory)


def _brief(row: dict[str, Any]) -> str:
    return "refused" if "refusal" in row else f"{1e3 * row['seconds']:.0f} ms a micro-batch"


def main() -> None:
    """Run ``measure`` from the command line; status 1 if it fails, 2 for bad input."""
    costs = command(measure, "pipetutor.costs")
    print(costs)
    print(f"written to {costs.directory / FILE}")
