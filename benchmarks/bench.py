"""How fast is it? The reference example, this workbook, torch's own pipeline and others, in one run.

    python -m benchmarks.bench

All train the same AlexNet on the same images with the same SGD; their losses are compared as well, since a rival
that computes something else is no rival. Who they are is in ``benchmarks.contest``, what they run in
``benchmarks.rivals``. Nothing here loads torch, except to ask whether bf16 is worth a run.
"""

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contest import GROWING_STAGES, LATER, MICRO_BATCHES, RIVALS, STAGES, WARM_UP
from pipetutor.core import records
from pipetutor.core.partition import bounds_for, catalog
from pipetutor.costs import profile
from pipetutor.data import fetch
from pipetutor.options import Options
from pipetutor.preflight import World, preflight
from pipetutor.processes.describe import describe
from pipetutor.processes.entry import command
from pipetutor.processes.job import run_job
from pipetutor.system import machine
from pipetutor.system.gpus import gpus
from pipetutor.system.kinds import check, list_of, named, whole

FILE = "bench.json"
TOLERANCE = 1e-4  # of a loss; rounding makes 1e-6, and gradients that are 4 times too large 2e-3
SLOW_BF16 = (
    "bf16 is left out: this processor has no instructions for it, and computes it by way of other formats, "
    "many times slower than fp32"
)
GIGABYTES = 4.0  # 3 were measured, with Adam, which keeps more than SGD


def limit(rate: float, micro_batches: int) -> float:
    """Return the images a second that P ranks of a pipeline could reach, if messages took no time.

    P ranks train a whole model each, on their share of the cores and at the same time, and each reaches ``rate``.
    1F1B leaves a rank M/(M+P-1) of a step to compute in, where stages are even.

    Args:
        rate: images a second of one of them.
        micro_batches: M.

    >>> round(limit(28.0, 16), 1)
    52.7
    """
    return STAGES * rate * micro_batches / (micro_batches + STAGES - 1)


def _middle(rates: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(rates), "minimum": min(rates), "maximum": max(rates)}


def _difference(runs: Iterable[Sequence[float | None]], base: Sequence[float | None]) -> float:
    """Return the largest difference of a loss from that of the same step in ``base``; a NaN counts as infinite."""
    pairs = (pair for losses in runs for pair in zip(losses, base, strict=False))
    found = [abs(records.number(a) - records.number(b)) for a, b in pairs]
    return max(float("inf") if difference != difference else difference for difference in found)


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        rows: a dict for each run; see ``benchmarks.contest.compete``.
        directory: where ``bench.json`` holds the same.
        left_out: which rival was asked for and cannot sensibly run on this machine, and why; else empty.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    directory: Path
    left_out: str = ""

    def _runs(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["part"] == part]

    @property
    def summary(self) -> list[dict[str, Any]]:
        """One dict a rival.

        It has ``rival``, ``title``, ``median``, ``minimum`` and ``maximum`` in images a second, ``to_reference`` and
        ``to_ours``, the ratios of medians (None where that rival was left out), and ``difference``, the largest of
        a loss from that of the first rival (None where they are not to be compared).
        """
        runs = self._runs("rivals")
        found: list[dict[str, Any]] = []
        for name, rival in RIVALS.items():
            own = [row for row in runs if row["rival"] == name]
            if own:
                rates = [limit(row["rate"], row["micro_batches"]) if name == "limit" else row["rate"] for row in own]
                losses = [row["losses"] for row in own]
                difference = _difference(losses, runs[0]["losses"]) if rival.compared else None
                found.append({"rival": name, "title": rival.title, **_middle(rates), "difference": difference})
        medians = {row["rival"]: row["median"] for row in found}
        for row in found:
            for ratio, base in {"to_reference": "reference", "to_ours": "pipeline"}.items():
                row[ratio] = row["median"] / medians[base] if base in medians else None
        return found

    @property
    def growth(self) -> dict[int, dict[str, float]]:
        """Ours for each M: median, minimum, maximum and, if measured, limit; empty unless it was asked for."""
        alone = [row["rate"] for row in self._runs("rivals") if row["rival"] == "limit"]
        found: dict[int, dict[str, float]] = {}
        for count in MICRO_BATCHES:
            rates = [row["rate"] for row in self._runs("growth") if row["micro_batches"] == count]
            if rates:
                found[count] = _middle(rates)
                found[count] |= {"limit": limit(statistics.median(alone), count)} if alone else {}
        return found

    @property
    def by_stages(self) -> dict[int, dict[str, float]]:
        """Ours for each P: median, minimum and maximum; empty unless it was asked for."""
        runs = self._runs("stages")
        counts = sorted({row["stages"] for row in runs})
        return {count: _middle([row["rate"] for row in runs if row["stages"] == count]) for count in counts}

    @property
    def loading(self) -> dict[str, float]:
        """Milliseconds to load an image at both ends of a pipeline, ``ours`` and ``reference``; empty if left out."""
        rates = {row["rival"]: row["median"] for row in self.summary}
        if not {"load", "load_reference"} <= set(rates):
            return {}
        return {"ours": 1e3 / rates["load"], "reference": 1e3 / rates["load_reference"]}

    @property
    def latency(self) -> dict[str, float]:
        """Seconds from the call of ``launch`` to the beginning of its first step; empty unless it was asked for."""
        found = [row["latency"] for row in self._runs("latency")]
        return _middle(found) if found else {}

    @property
    def others(self) -> float:
        """How many cores other programs kept busy during the run that they disturbed most."""
        return max(row["others"] for row in self._runs("rivals"))

    @property
    def wrong(self) -> list[str]:
        """The rivals whose losses are not those of the first."""
        return [row["rival"] for row in self.summary if (row["difference"] or 0.0) > TOLERANCE]

    def __str__(self) -> str:
        """Return the table, and what is to be said of it."""
        lines = [_HEAD, *(_line(row) for row in self.summary if not row["rival"].startswith("load"))]
        if found := self.loading:
            share = found["ours"] / found["reference"]
            both = f"{found['ours']:.2f} ms, the reference {found['reference']:.2f} ms"
            lines.append(f"loading an image: {both}: {share:.2f} of it")
        if self.left_out:
            lines.append(self.left_out)
        for count, row in self.growth.items():
            bound = f", limit {row['limit']:.1f}" if "limit" in row else ""
            lines.append(f"ours with M = {count:2}: {_range(row)} images/s{bound}")
        for count, row in self.by_stages.items():
            lines.append(f"ours with P = {count:2}: {_range(row)} images/s")
        if self.latency:
            lines.append(f"launch, from the call to the first step: {_range(self.latency)} s")
        if self.others > 0.1:
            lines.append(f"other programs kept up to {self.others:.1f} cores busy: measure again on a quiet machine")
        first = self.rows[0]["rival"]
        lines += [f"FAILED: the losses of {name} are not those of {first}" for name in self.wrong]
        return "\n".join(lines)


_HEAD = f"{'images/s':32} {'median':>7} {'min':>7} {'max':>7} {'/ reference':>12} {'/ ours':>7}   loss off by"


def _range(row: dict[str, float]) -> str:
    return f"{row['median']:.1f} ({row['minimum']:.1f} to {row['maximum']:.1f})"


def _line(row: dict[str, Any]) -> str:
    numbers = " ".join(f"{row[name]:7.1f}" for name in ("median", "minimum", "maximum"))
    ratios = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("to_reference", "to_ours")]
    difference = "-" if row["difference"] is None else f"{row['difference']:.1e}"
    return f"{row['title']:32} {numbers} {ratios[0]:>12} {ratios[1]:>7}   {difference}"


def bench(
    rivals: Sequence[str] = tuple(RIVALS),
    *,
    train_batch: int = 128,
    micro_batch: int = 8,
    steps: int = 10,
    repetitions: int = 3,
    more: bool = False,
    data_dir: str | Path = fetch.DATA_DIR,
    runs_dir: str | Path = "runs",
) -> Bench:
    """Let rivals train one after another, in processes of their own; nothing is left running.

    Args:
        rivals: names of ``benchmarks.contest.RIVALS``; the losses are compared with those of the first, where they
            are to be the same. ``bf16`` is left out, with a word, where the processor has no instructions for it.
        train_batch: images in a step.
        micro_batch: images in a micro-batch.
        steps: of the first repetition, whose losses are compared; the later ones are shorter.
        repetitions: how often each rival runs.
        more: also how ours grows with the number of micro-batches and of stages, and how long ``launch`` takes to
            start.
        data_dir: where the data is or will be.
        runs_dir: where the directory with ``bench.json`` is made.

    Returns:
        What was measured; print it for its table.

    Raises:
        ValueError: something asked for cannot work; nothing was started.
        RunFailed: a rival failed.

    >>> print(bench(["reference", "pipeline"]))  # doctest: +SKIP
    """
    check("rivals", rivals, list_of(named(RIVALS)))
    if len(set(rivals)) < len(rivals):
        raise ValueError(f"rivals are {', '.join(rivals)}, but each can take part once")
    kinds = {
        "repetitions": whole(1, example=3),
        "steps": whole(WARM_UP + 1, example=10),
        "more": "switch",
        "data_dir": "path",
        "runs_dir": "path",
    }
    given = locals()
    for name, kind in kinds.items():
        check(name, given[name], kind)
    left_out = ""
    if "bf16" in rivals and gpus(STAGES).count < STAGES and not machine.bf16_is_native():
        rivals, left_out = [name for name in rivals if name != "bf16"], SLOW_BF16
        if not rivals:
            raise ValueError(f"{SLOW_BF16}; compare other rivals: pipeline, say")
    config = {"train_batch_size": train_batch, "train_micro_batch_size_per_gpu": micro_batch}
    for stages in (STAGES, 0):  # a pipeline, and as many replicas
        options, world = Options(stages=stages, steps=steps, config=config), World(STAGES, STAGES, gpus(STAGES))
        preflight(options, world, describe(options.model, options.dataset))
    if train_batch // micro_batch < STAGES:
        raise ValueError(
            f"train batch {train_batch} is {train_batch // micro_batch} micro-batch of {micro_batch}, but torch's "
            f"1F1B needs one for each of {STAGES} stages: use a train batch of at least {STAGES * micro_batch}"
        )
    free = machine.memory().free / 2**30
    if free < GIGABYTES:
        raise ValueError(f"the bench takes {GIGABYTES:.0f} GiB of memory, and {free:.1f} are free: close programs")
    fetch.prepare("synthetic", data_dir)
    cuts = _cuts(micro_batch, GROWING_STAGES if more else (STAGES,), data_dir)
    directory = records.create(Path(runs_dir), "bench")
    asked = {
        "rivals": list(rivals),
        "train_batch": train_batch,
        "micro_batch": micro_batch,
        "steps": steps,
        "repetitions": repetitions,
        "more": more,
        "cuts": cuts,
    }
    total = repetitions * (len(rivals) + (len(MICRO_BATCHES) + len(GROWING_STAGES) + 1) * more)
    rows = run_job("benchmarks.contest", directory, asked, {fetch.VARIABLE: str(data_dir)}, total, "runs", _brief)
    found = Bench(list(rows), directory, left_out)
    names = ("summary", "growth", "by_stages", "loading", "latency", "others", "wrong", "left_out", "rows")
    measured = {name: getattr(found, name) for name in names}
    about = {"asked": asked, "machine": machine.check(), "warm_up": WARM_UP, "steps_of_later_repetitions": LATER}
    records.write_json(directory / FILE, about | measured)
    return found


def _cuts(micro_batch: int, numbers: Sequence[int], data_dir: str | Path) -> dict[str, str]:
    """Return the cut of ours for each number of stages: by measured costs, or on GPUs by parameters."""
    if gpus(STAGES).count >= STAGES:
        found = {stages: bounds_for(catalog()["alexnet"], stages, "parameters") for stages in numbers}
    else:
        costs = profile.costs_of("alexnet", micro_batch, STAGES, dropout=0.0, data_dir=data_dir)
        found = {stages: profile.choose(costs, stages) for stages in numbers}
    return {str(stages): ",".join(map(str, bounds)) for stages, bounds in found.items()}


def _brief(row: dict[str, Any]) -> str:
    if row["part"] == "latency":
        return f"launch {row['latency']:.1f} s"
    return f"{row['rival']} {row['rate']:.1f} images/s"


def main() -> None:
    """Run ``bench`` from the command line; status 1 if losses differ or a rival fails, 2 for bad input."""
    found = command(bench, "benchmarks")
    print(found)
    print(f"written to {found.directory / FILE}")
    sys.exit(1 if found.wrong else 0)
