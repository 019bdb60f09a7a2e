"""``--partition profile``: cut where measured times say, and measure only once.

    ~/.cache/pipetutor/alexnet-0f3a91c2d4e5/     (or $XDG_CACHE_HOME/pipetutor/..., or in /tmp: see home())
        costs.json   what each layer costs here; see ``pipetutor.costs.table``
        key.json     what it holds for: model, micro-batch, ranks, threads, versions, machine

With another torch or torchvision, and when the code that measures has changed, costs are measured anew. Those that
were measured on a busy machine stay as they are until that directory is deleted.

DeepSpeed declares this method and raises NotImplementedError. The cut is ``core.partition.fastest``: exact, for
a stage that loads, computes and then waits for each of its messages, as DeepSpeed's do. No torch: with costs in the
cache a cut takes milliseconds.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipetutor.core import records
from pipetutor.core.description import known_layers
from pipetutor.core.partition import Layer, bounds_for, fastest
from pipetutor.core.plan import Plan
from pipetutor.costs.measuring import measure
from pipetutor.costs.table import FILE, LayerCosts
from pipetutor.data import fetch
from pipetutor.processes.environment import cpu_environment
from pipetutor.system import disk, machine
from pipetutor.system.named import Named

__all__ = ["choose", "costs_of", "cut", "stage_seconds", "table"]

STATE_BYTES = 16  # a parameter's, in fp32: itself, its gradient, and Adam's two moments
DTYPE = "float32"
# The modules whose code costs depend on.
MEASURING = (
    "costs/table",
    "costs/measuring",
    "costs/ranks",
    "costs/messages",
    "core/accumulate",
    "core/layers",
    "core/model",
    "core/tied",
    "core/gpt",
    "data/loader",
    "data/text",
)
# What keeps torch, oneDNN and MKL from instructions that the CPU has.
INSTRUCTIONS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")


def home() -> Path:
    """Return where costs are kept: in the user's cache, or where there is none, or a read-only one, in /tmp."""
    if found := os.environ.get("XDG_CACHE_HOME"):
        return Path(found) / "pipetutor"
    with contextlib.suppress(RuntimeError):  # a user whom the machine does not know, as in a container
        place = Path.home() / ".cache" / "pipetutor"
        there = next(path for path in (place, *place.parents) if os.path.lexists(path))
        if os.access(there, os.W_OK | os.X_OK):
            return place
    return Path(tempfile.gettempdir(), f"pipetutor-{os.getuid()}")


def cached(
    model: str, micro_batch: int, ranks: int, dropout: float | None = None, dataset: str = "synthetic"
) -> Path:
    """Return the directory in which costs like these are kept, whether it is there or not.

    Args:
        model: as in ``launch``.
        micro_batch: examples in a micro-batch.
        ranks: ranks on this host.
        dropout: probability for every dropout layer; None keeps the model's own.
        dataset: as in ``launch``.
    """
    key = json.dumps(_key(model, dataset, micro_batch, ranks, dropout), sort_keys=True, allow_nan=False)
    return home() / f"{model}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _key(model: str, dataset: str, micro_batch: int, ranks: int, dropout: float | None) -> dict[str, object]:
    """Return all that costs depend on."""
    own = [named for named in map(Named.parse, (model, dataset)) if named.is_own]
    return {
        "model": model,
        "dataset": dataset,
        "own code": [named.source_digest() for named in own],
        "micro_batch": micro_batch,
        "dropout": None if dropout is None else float(dropout),
        "ranks": ranks,
        "environment": cpu_environment(ranks),
        "dtype": DTYPE,
        "linear gradients": "in place",
        "versions": {name: machine.versions()[name] for name in ("torch", "torchvision")},
        "code": _digest(),
        "cpu": machine.cpu_name(),
        "instructions": {name: os.environ.get(name) for name in INSTRUCTIONS},
        "cores": machine.cpu_cores(),
    }


def _digest() -> str:
    """Return a sum of the code by which costs are measured, and of the form in which they are kept."""
    sources = (Path(__file__).parents[1].joinpath(f"{name}.py").read_bytes() for name in MEASURING)
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _read(directory: Path, model: str) -> LayerCosts | None:
    """Return the costs that a directory holds; None where it holds none, or none of use."""
    try:
        costs = LayerCosts.load(directory)
        costs.for_bounds([0, len(known_layers(model) or costs.layers)])  # refuses what is no cost
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return costs


def costs_of(
    model: str,
    micro_batch: int,
    ranks: int,
    dropout: float | None = None,
    *,
    dataset: str = "synthetic",
    data_dir: str | Path = fetch.DATA_DIR,
) -> LayerCosts:
    """Return what each layer costs on this host, from the cache, or measured into it.

    Any number of processes may ask at once: one measures, with a progress bar, and the others wait for it.

    Args:
        model: as in ``launch``.
        micro_batch: examples in a micro-batch.
        ranks: ranks on this host, all replicas together: as many processes measure at once.
        dropout: probability for every dropout layer; None keeps the model's own.
        dataset: as in ``launch``.
        data_dir: where the data is or will be.

    Raises:
        ValueError: something asked for cannot work, or the cache cannot be written.
        RunFailed: a measuring process failed.

    >>> choose(costs_of("alexnet", 8, ranks=2), stages=2)  # doctest: +SKIP
    [0, 16, 22]
    """
    place = cached(model, micro_batch, ranks, dropout, dataset)
    try:
        if found := _read(place, model):
            return found
        place.mkdir(parents=True, exist_ok=True)
        with fetch.locked(place.with_name(f".{place.name}.lock")):
            if found := _read(place, model):  # another process measured while this one waited
                return found
            print(
                f"measuring what each layer of {model} costs here, once; to measure anew, delete {place}", flush=True
            )
            work = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
            try:
                measured = measure(
                    model, micro_batch, ranks, dataset=dataset, dropout=dropout, data_dir=data_dir, runs_dir=work
                )
                records.write_json(place / "key.json", _key(model, dataset, micro_batch, ranks, dropout))
                os.replace(measured.directory / FILE, place / FILE)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ValueError(disk.cannot(f"keep costs in {place}", error, "set XDG_CACHE_HOME")) from None
    return replace(measured, directory=place)


def _seconds(costs: LayerCosts, low: int, high: int, micro_batches: int | None, recompute: bool) -> float:
    stage = costs.stage(low, high, micro_batches)
    boundaries = [stage.input_bytes] * (low > 0) + [stage.output_bytes] * (high < len(costs.layers))
    messages = 2 * sum(costs.latency + max(size - costs.burst, 0) / costs.bandwidth for size in boundaries)
    return stage.load + (1 + recompute) * stage.forward + stage.backward_input + stage.backward_weight + messages


def stage_seconds(
    costs: LayerCosts, bounds: Sequence[int], micro_batches: int | None = None, *, recompute: bool = False
) -> list[float]:
    """Predict what each stage takes for a micro-batch: its load, both passes, and its messages.

    An activation and a gradient pass each boundary of a stage, and it waits for each to arrive. That is how
    DeepSpeed's engine works; torch's sends them in the background, and its stages take no longer than this.

    Args:
        costs: of the model's layers.
        bounds: of the stages.
        micro_batches: M, over which the first backward of a step, which adds to nothing, is averaged in; see
            ``LayerCosts.for_bounds``.
        recompute: whether stages compute their forward pass once more to go backward.
    """
    return [_seconds(costs, low, high, micro_batches, recompute) for low, high in itertools.pairwise(bounds)]


def choose(
    costs: LayerCosts,
    stages: int,
    micro_batches: int | None = None,
    *,
    recompute: bool = False,
    limit: float | None = None,
) -> list[int]:
    """Choose the bounds whose slowest stage is fastest; see ``partition.fastest`` for which of several.

    Where a rank holds several stages of the model, the slowest of all P x chunks counts, whoever holds it: a simple
    rule, under which no rank takes longer than ``chunks`` times that.

    Args:
        costs: of the model's layers.
        stages: stages of the model: P, or P x chunks.
        micro_batches: see ``stage_seconds``.
        recompute: see ``stage_seconds``.
        limit: bytes that a stage may need: 16 for each parameter (with Adam, in fp32), and its activations of
            min(P - s, M) micro-batches, which 1F1B keeps alive on stage s; None for no limit.

    Raises:
        ValueError: too many stages, or a limit that every split breaks; the message names the least that would do.

    >>> choose(costs, 2, micro_batches=16)  # doctest: +SKIP
    [0, 16, 22]
    """

    def seconds(low: int, high: int) -> float:
        return _seconds(costs, low, high, micro_batches, recompute)

    def needed(stage: int, low: int, high: int) -> float:
        found = costs.stage(low, high)
        live = min(stages - stage, micro_batches or stages)
        return STATE_BYTES * found.parameters + live * found.activation_bytes

    weights = [layer.parameters for layer in costs.layers]
    if limit is None:
        return fastest(weights, stages, seconds)
    return fastest(weights, stages, seconds, needed, limit)


def table(
    costs: LayerCosts, bounds: Sequence[int], micro_batches: int | None = None, *, recompute: bool = False
) -> str:
    """Say what each stage is predicted to take, and what the slowest one would take at other cuts.

    Args:
        costs: of the model's layers.
        bounds: of the stages.
        micro_batches: see ``stage_seconds``.
        recompute: see ``stage_seconds``.

    >>> print(table(costs, [0, 16, 22]))  # doctest: +SKIP
    stage  layers  ms a micro-batch  share
        0    0-15              98.1   0.52
        1   16-21              91.7   0.48
    slowest stage of 0,16,22: 98.1 ms; parameters 0,19,22: 167.8 ms; uniform 0,11,22: 104.4 ms
    """
    seconds = stage_seconds(costs, bounds, micro_batches, recompute=recompute)
    lines = [f"{'stage':>5} {'layers':>7} {'ms a micro-batch':>17} {'share':>6}"]
    for stage, (low, high) in enumerate(itertools.pairwise(bounds)):
        share = seconds[stage] / sum(seconds)
        lines.append(f"{stage:5} {f'{low}-{high - 1}':>7} {1e3 * seconds[stage]:17.1f} {share:6.2f}")
    kinds = [Layer(layer.kind, layer.parameters) for layer in costs.layers]
    cuts = {"": bounds}
    for method in ("parameters", "uniform"):
        with contextlib.suppress(ValueError):  # it would make a stage without weights
            cuts[method + " "] = bounds_for(kinds, len(bounds) - 1, method)
    slowest = [
        f"{name}{','.join(map(str, cut))}: "
        f"{1e3 * max(stage_seconds(costs, cut, micro_batches, recompute=recompute)):.1f} ms"
        for name, cut in cuts.items()
    ]
    return "\n".join([*lines, f"slowest stage of {'; '.join(slowest)}"])


def cut(plan: Plan, ranks: int) -> tuple[Plan, str]:
    """Complete a plan whose partition is ``profile``.

    Args:
        plan: from ``preflight``, still without bounds.
        ranks: its ranks on this host.

    Returns:
        The plan with bounds, and the table that says why these.

    Raises:
        ValueError: see ``costs_of``.
        RunFailed: see ``costs_of``.
    """
    options, micro_batches = plan.options, plan.batch.accumulation
    costs = costs_of(
        options.model,
        plan.batch.micro,
        ranks,
        options.dropout,
        dataset=options.dataset,
        data_dir=options.data_dir,
    )
    bounds = choose(costs, len(plan.placement), micro_batches, recompute=options.recompute)
    return replace(plan, bounds=bounds), table(costs, bounds, micro_batches, recompute=options.recompute)
