"""The certificate: see that the pipeline computes what one process computes.

    python -m pipetutor.certify

Each row compares DeepSpeed's pipeline with a plain PyTorch loop: every initial weight, every gradient, every
updated parameter, every loss. The last rows are controls: pipelines that are made wrong on purpose, which the
comparison must find out. What is compared, and how, is in ``pipetutor.certify.proof``.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipetutor.core import records
from pipetutor.core.partition import check_stages
from pipetutor.data import fetch
from pipetutor.processes.describe import describe
from pipetutor.processes.entry import briefly, command
from pipetutor.processes.environment import cpu_environment
from pipetutor.processes.job import run_job
from pipetutor.system import machine
from pipetutor.system.kinds import KINDS, Kind, check, list_of, named, whole
from pipetutor.system.named import Named
from pipetutor.system.network import check_network

__all__ = ["CONTROLS", "Certificate", "certify"]

NARROW = "vgg"  # no name of torchvision
MODELS = ("alexnet", NARROW, "gpt")
CONTROLS = {
    "summed": "gradients are summed over micro-batches, not averaged",
    "scaled": "the gradients of stage 0 are divided by M once more",
    "weights": "the last stage begins with other weights",
    "stagewise": "each stage clips its gradients by their own norm",
    "untied": "the gradients of tied weights are not added up",
    "apart": "the copies of tied weights begin apart",
    "cleared": "what a stage has sent is cleared, and goes back through what it made of that",
}
TIED = ("untied", "apart")  # for models that have something tied
OTHERWISE = {"stagewise": "clipped", "cleared": "DualPipeV"}  # controls of these ways
WAYS = {  # in which two stages train, and with how many replicas
    "torch": 1,
    "clipped": 1,
    "torch clipped": 1,
    "ZeRO-1": 2,
    "ZeRO-1 clipped": 2,
    "DualPipeV": 1,
    "torch DualPipeV": 1,
}
TWO_STAGES_A_RANK = ("DualPipeV", "torch DualPipeV")
GIGABYTES_A_RANK = 0.5  # measured: 8 ranks of AlexNet share what they can, and take 3.7 together


@dataclass(frozen=True)
class Certificate:
    """What was compared, and what came out.

    Attributes:
        rows: a dict for each comparison; see ``pipetutor.certify.proof.judge``.
        skipped: rows that this machine has no memory for.
        directory: where ``certificate.json`` holds the same; None where nothing is kept.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    skipped: list[dict[str, Any]]
    directory: Path | None

    @property
    def passed(self) -> bool:
        """Whether every pipeline equals the reference, and every control does not."""
        compared = any(not row["control"] for row in self.rows)
        return compared and all(map(_as_it_should, self.rows))

    def __str__(self) -> str:
        """Return the table, largest differences and a verdict a row, and below it each reason once."""
        notes: dict[str, int] = {}
        lines = [_line(row, notes) for row in [*self.rows, *self.skipped]]
        reasons = [f"({number}) {reason}" for reason, number in notes.items()]
        controls = [
            f"control {row['control']}: {row['reason']}" for row in self.rows if row["control"] and "gradient" in row
        ]
        return "\n".join([_HEAD, *lines, *reasons, *controls, self.verdict])

    @property
    def verdict(self) -> str:
        """One line that says what the rows come to."""
        pipelines = [_as_it_should(row) for row in self.rows if not row["control"]]
        controls = [_as_it_should(row) for row in self.rows if row["control"]]
        found = f", {sum(controls)} of {len(controls)} controls were found out" if controls else ""
        left = f"; {len(self.skipped)} rows were skipped" if self.skipped else ""
        return (
            f"{'PASSED' if self.passed else 'FAILED'}: {sum(pipelines)} of {len(pipelines)} pipelines equal one "
            f"process{found}{left}"
        )


_HEAD = (
    f"{'model':8} {'P':>2} {'M':>2} {'R':>2} {'way':15}  {'gradients':>17} {'parameters':>17} {'loss':>8}   verdict\n"
    f"{'':8} {'':>2} {'':>2} {'':>2} {'':15}  {'abs.':>8} {'rel.':>8} {'abs.':>8} {'rel.':>8} {'rel.':>8}"
)


def _as_it_should(row: dict[str, Any]) -> bool:
    """Say whether a pipeline equals the reference, or a control ran, and does not."""
    return "gradient" in row and row["equal"] != bool(row["control"])


def _verdict(row: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict of a row in a word or two, and the reason if it is not what one hopes for."""
    if "gradient" not in row:
        return "FAILED" if "equal" in row else "skipped", row["reason"]
    if row["control"]:
        return f"control {row['control']}: {'NOT FOUND OUT' if row['equal'] else 'found out'}", ""
    return ("equal", "") if row["equal"] else ("FAILED", row["reason"])


def _line(row: dict[str, Any], notes: dict[str, int]) -> str:
    """Return a line of the table, with the number of its reason in the notes, which gain it if it is new."""
    verdict, reason = _verdict(row)
    if reason:
        verdict += f" ({notes.setdefault(reason, len(notes) + 1)})"
    case = f"{row['model']:8} {row['stages']:2} {row['micro_batches']:2} {row['replicas']:2} {row['way']:15}  "
    if "gradient" not in row:
        return f"{case}{'':44}   {verdict}"
    numbers = [row[part][kind] for part in ("gradient", "final") for kind in ("absolute", "relative")]
    numbers.append(row["loss"]["relative"])
    return case + " ".join(f"{number:8.1e}" for number in numbers) + f"   {verdict}"


@briefly
def certify(
    models: Sequence[str] = MODELS,
    stages: Sequence[int] = (1, 2, 3, 4),
    micro_batches: Sequence[int] = (1, 4),
    replicas: Sequence[int] = (1, 2),
    *,
    ways: Sequence[str] = tuple(WAYS),
    dataset: str | None = None,
    data_dir: str | Path = fetch.DATA_DIR,
    runs_dir: str | Path = "runs",
) -> Certificate:
    """Compare pipelines with one process, in processes of their own; nothing is left running.

    Args:
        models: as in ``launch``; or ``vgg``, a VGG11 an eighth as wide or less. The last one is trained in all ways,
            and is what the controls make wrong. Dropout is off.
        stages: numbers of pipeline stages P, 1 to 4.
        micro_batches: numbers of micro-batches M, in each step and replica.
        replicas: numbers of copies of the pipeline.
        ways: other ways in which two stages train four micro-batches, of ``WAYS``: with torch's engine, with clipped
            gradients, with an optimizer that two replicas share, with two stages on each rank; none is fine.
        dataset: as in ``launch``; by default ``sums`` for a gpt, and ``synthetic`` for other models of ours.
        data_dir: where the data is or will be.
        runs_dir: where the directory with ``certificate.json`` is made.

    Returns:
        The certificate; print it for its table.

    Raises:
        ValueError: there is no such model or a number is out of range; nothing was started.
        RunFailed: the comparison itself ended early.

    >>> print(certify(models=["vgg"], stages=[1, 2]))  # doctest: +SKIP
    """
    check("models", models, list_of(replace(KINDS["text"], example="'gpt'")))
    check(
        "ways", ways, (ways and list_of(named(WAYS))) or Kind("a list", lambda value: isinstance(value, list | tuple))
    )
    check("dataset", dataset, "text?")
    data = {model: dataset or _usual(model) for model in models}
    check("stages", stages, list_of(whole(1, 4)))
    check("micro_batches", micro_batches, list_of(whole(1, 16)))
    check("replicas", replicas, list_of(whole(1, 4)))
    check("data_dir", data_dir, "path")
    check("runs_dir", runs_dir, "path")
    check_network("gloo")
    about = {model: describe(model, data[model], data_dir).layers for model in models if model != NARROW}
    for layers in about.values():
        check_stages(layers, max(stages))
    room = max(2, int(machine.memory().free / 2**30 / GIGABYTES_A_RANK))
    plain: dict[str, Any] = {"control": "", "way": ""}
    cases = [
        plain | {"model": model, "dataset": data[model], "stages": p, "micro_batches": m, "replicas": r}
        for model, m, r, p in itertools.product(models, micro_batches, replicas, stages)
    ]
    last = plain | {"model": models[-1], "dataset": data[models[-1]], "stages": 2, "micro_batches": 4, "replicas": 1}
    cases += [last | {"way": way, "replicas": WAYS[way]} for way in ways]
    skipped = [case for case in cases if case["stages"] * case["replicas"] > room]
    for case in skipped:
        case["reason"] = f"{case['stages'] * case['replicas']} ranks, and there is memory for {room}"
    if models[-1] in about and len(about[models[-1]]) < 2 * last["stages"]:
        short = [case for case in cases if case["way"] in TWO_STAGES_A_RANK and case not in skipped]
        for case in short:
            case["reason"] = f"{2 * last['stages']} stages, and the model has {len(about[models[-1]])} layers"
        skipped += short
    chosen = [case for case in cases if case not in skipped]
    ties = any(layer.tied for layer in about.get(models[-1], ()))
    ran = {"", *(case["way"] for case in chosen)}
    controls = {one: OTHERWISE.get(one, "") for one in CONTROLS if ties or one not in TIED}
    chosen += [last | {"control": one, "way": way} for one, way in controls.items() if way in ran]
    for name in set(data.values()):
        fetch.prepare(name, data_dir)
    directory = records.create(Path(runs_dir), "certificate")
    # One thread, so that both sides add up in the same order and forks are safe.
    env = cpu_environment(1) | {"OMP_NUM_THREADS": "1", fetch.VARIABLE: str(data_dir)}
    rows = run_job("pipetutor.certify.proof", directory, chosen, env, len(chosen), "rows", _brief)
    certificate = Certificate([_read(row) for row in rows], skipped, directory)
    content = {"passed": certificate.passed, "rows": certificate.rows, "skipped": skipped}
    records.write_json(directory / "certificate.json", content)
    return certificate


def _usual(model: str) -> str:
    """Return the data set that a model is compared on where none is given."""
    named = Named.parse(model)
    if named.is_own:
        raise ValueError(f"{model} is a model of your own: say what it reads, too (dataset, --dataset)")
    return "sums" if named.name == "gpt" else "synthetic"


def _read(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its infinite differences, for which JSON has null."""
    for part in ("initial", "gradient", "final", "loss"):
        if part in row:
            row[part] = {kind: math.inf if value is None else value for kind, value in row[part].items()}
    return row


def _brief(row: dict[str, Any]) -> str:
    case = f"{row['model']} P={row['stages']} M={row['micro_batches']} R={row['replicas']}"
    return " ".join(filter(None, [case, row["way"], ": ".join(filter(None, _verdict(row)))[:60]]))


def main() -> None:
    """Run ``certify`` from the command line; status 1 if it does not pass, 2 for bad input."""
    certificate = command(certify, "pipetutor.certify")
    print(certificate)
    assert certificate.directory
    print(f"written to {certificate.directory / 'certificate.json'}")
    sys.exit(0 if certificate.passed else 1)
