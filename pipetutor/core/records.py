"""The run directory: what a run was, and what happened in it.

    runs/20261124-101502-p2r1/
        run.json         command, topology, config, bounds, layers, versions, status
        steps.jsonl      one line a step: step, loss, seconds, images_per_second
        evaluations.jsonl    one line an evaluation: step, correct, images, accuracy, loss
        config.json      the DeepSpeed config, of a run of launch alone
        failure_rank1.json   written by a rank that raised: when, what, where
        logs/            what each rank printed, one file a rank; of a run of launch alone
        checkpoints/     what was saved; see pipetutor.core.checkpoint
        heartbeat_rank0.json, stack_rank0.txt    see pipetutor.processes.heartbeat
        trace_rank0.jsonl, trace.json            of a traced run; see pipetutor.tracing

The ranks and the supervisor write it; the launcher, the figures and the tests read it. What is JSON of one object,
run.json say, appears whole or not at all; lines (steps, evaluations, traces) and logs grow. A directory belongs to
one run: another one is refused it, unless it goes on from a checkpoint in it. JSON has no word for NaN and infinity:
they are written as null, and a loss that is null is read as NaN. Standard library only.
"""

import contextlib
import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pipetutor.system import disk
from pipetutor.system.kinds import counted

__all__ = [
    "STEPS",
    "Run",
    "StepWriter",
    "append",
    "close",
    "create",
    "forget",
    "held",
    "log_path",
    "lost_in",
    "marks",
    "number",
    "read",
    "read_failures",
    "read_lines",
    "to_json",
    "update",
    "write_failure",
    "write_json",
]

STEPS, EVALUATIONS = "steps.jsonl", "evaluations.jsonl"


def to_json(content: Any, indent: int | None = None) -> str:
    """Return ``content`` as JSON, with null for each float that is no number or infinite.

    >>> to_json({"loss": float("nan")})
    '{"loss": null}'
    """
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def number(value: float | None) -> float:
    """Return a float that was read from JSON: NaN for null."""
    return math.nan if value is None else value


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` so that ``path`` holds all of it or does not change, even when the disk is full."""
    _write(path, to_json(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def create(parent: Path, name: str) -> Path:
    """Make a new, empty run directory under ``parent``.

    Raises:
        ValueError: the directory cannot be made or written to; the message says where and why.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ValueError("the working directory was deleted: change to one that is there (cd, os.chdir)") from None
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    try:
        for attempt in range(1, 1000):
            directory = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
            try:
                directory.mkdir(parents=True)
            except FileExistsError:
                if not directory.is_dir():  # a file stands where a directory must go
                    raise
                continue
            write_json(directory / "run.json", {"status": "starting"})
            return directory.resolve()
    except OSError as error:
        raise ValueError(disk.cannot(f"write runs to {parent}", error, "give another runs_dir")) from None
    raise ValueError(f"cannot find a free name for a run in {parent}")


def read(directory: Path) -> dict[str, Any]:
    """Return what ``run.json`` holds so far; nothing where there is none."""
    path = directory / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def update(directory: Path, **values: Any) -> None:
    """Add or replace fields of ``run.json``. One process at a time writes: launcher, rank 0, supervisor."""
    write_json(directory / "run.json", read(directory) | values)


def close(directory: Path, status: str, **values: Any) -> None:
    """Say in ``run.json`` how a run ended, and in ``done`` which step was its last complete one."""
    steps = _undamaged(directory / STEPS)
    done = {"done": steps[-1]["step"]} if steps else {}
    update(directory, status=status, **done, **values)


def held(directory: Path) -> str:
    """Say in a few words what run a directory holds; nothing where there is none, or one that came to nothing.

    >>> held(Path("runs/20261124-101502-p2r1"))  # doctest: +SKIP
    'status finished, 20 steps, checkpoint step-000020'
    """
    try:
        status = read(directory).get("status", "starting")
    except ValueError:
        status = "unknown, for run.json is damaged"
    found = []
    if steps := len(_undamaged(directory / STEPS)):
        found.append(f"{counted(steps, 'step')}")
    if saved := sorted(path.name for path in directory.glob("checkpoints/step-*")):
        found.append(f"checkpoint {saved[-1]}")
    if not found and status in ("starting", "failed", "interrupted"):
        return ""
    return ", ".join([f"status {status}{', unless it was killed' * (status == 'running')}", *found])


def forget(directory: Path, rank: int, ranks: int) -> None:
    """Remove what ranks of an earlier run said of themselves: failures, heartbeats, stacks and traces.

    Each rank removes its own, before it writes any, and the first one also those of ranks that are no more.

    Args:
        directory: the run directory.
        rank: whose files go.
        ranks: how many the run has now.
    """
    for path in directory.glob("*_rank*"):
        number = re.search(r"^(?:failure|heartbeat|stack|trace)_rank(\d+)\.", path.name)
        if number and (int(number[1]) == rank or (rank == 0 and int(number[1]) >= ranks)):
            path.unlink(missing_ok=True)
    if rank == 0:
        for name in ("trace.json", "end"):
            (directory / name).unlink(missing_ok=True)


def keep_until(directory: Path, step: int) -> None:
    """Drop the steps and evaluations after ``step``: a run goes on from there, and will have them again."""
    for path in (directory / STEPS, directory / EVALUATIONS):
        if path.exists():
            kept = [line for line in _undamaged(path) if line["step"] <= step]
            _write(path, "".join(to_json(line) + "\n" for line in kept))


def write_failure(directory: Path, rank: int, error: BaseException, trace: str) -> None:
    """Keep what a rank raised, with the time, so that the first failure can be told from its consequences."""
    record = {
        "rank": rank,
        "time": time.time(),
        "error": f"{type(error).__name__}: {error}",
        "traceback": trace,
    }
    write_json(directory / f"failure_rank{rank}.json", record)


def read_failures(directory: Path) -> list[dict[str, Any]]:
    """Return what ranks raised, the first first."""
    found = [json.loads(path.read_text()) for path in directory.glob("failure_rank*.json")]
    return sorted(found, key=lambda failure: failure["time"])


def append(path: Path, content: Any) -> None:
    """Add one line to a file of JSON lines; a reader sees all of it or nothing."""
    with path.open("a") as file:
        file.write(to_json(content) + "\n")


class StepWriter:
    """Adds one line a step to ``steps.jsonl``; a reader sees every step as soon as it is done."""

    def __init__(self, directory: Path | None, train_batch: int):
        self._train_batch = train_batch
        self._file = (directory / STEPS).open("a", buffering=1) if directory else None

    def write(self, step: int, loss: float, seconds: float) -> None:
        """Write one step.

        Args:
            step: counted from 1.
            loss: mean over the whole train batch, all micro-batches and replicas.
            seconds: wall time of the step.
        """
        if self._file:
            rate = self._train_batch / seconds
            line = {"step": step, "loss": loss, "seconds": seconds, "images_per_second": rate}
            self._file.write(to_json(line) + "\n")


def read_lines(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a file of JSON lines after the first ``start``, also while it is written."""
    if path.exists():
        for line in path.read_text().splitlines(keepends=True)[start:]:
            if line.endswith("\n"):
                yield json.loads(line)


def _undamaged(path: Path) -> list[dict[str, Any]]:
    """Return the lines up to the first that is damaged, as a full disk or a power cut may leave one."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(ValueError):
        for line in read_lines(path):
            found.append(line)
    return found


def lost(step: int) -> str:
    """Say what it means that a step's loss is no number, and what to do."""
    return (
        f"the loss of step {step} is no number: something in the model has become too large, and nothing is learned "
        "from there on; use a lower learning rate, or gradient_clipping in the config, and bf16 rather than fp16"
    )


def marks(evaluation: dict[str, Any]) -> str:
    """Say in a few words what an evaluation found."""
    loss, size = f"loss {number(evaluation['loss']):.4f}", evaluation["images"]
    if evaluation["accuracy"] is None:
        return f"{loss} on {size} test examples"
    return f"{evaluation['correct']} of {size} test examples are right ({evaluation['accuracy']:.1%}), {loss}"


def lost_in(directory: Path) -> str:
    """Say so of the first step of a run whose loss is no number; nothing where there is none."""
    steps = _undamaged(directory / STEPS)
    first = next((line["step"] for line in steps if not math.isfinite(number(line["loss"]))), None)
    return "" if first is None else lost(first)


def log_path(directory: Path, rank: int) -> Path:
    """Return the log of one rank; it is there once the rank was started.

    DeepSpeed's launcher puts the time before its name.
    """
    name = f"rank{rank}.log"
    return next(directory.glob(f"logs/*_{name}"), directory / "logs" / name)


@dataclass(frozen=True)
class Run:
    """A finished run, read from its directory.

    >>> Run.load("runs/20261124-101502-p2r1").losses[-1]  # doctest: +SKIP
    2.17

    Attributes:
        directory: where it is kept.
        command: the terminal command that does the same work, into a directory of its own.
        stages: pipeline stages P; 0 for the data-parallel baseline.
        replicas: data-parallel copies.
        losses: mean loss of each step, over the whole train batch; NaN where it was no number.
        seconds: wall time of each step.
        first_step: the number of the first of these steps; 1, unless the run was resumed into a new directory.
        evaluations: a dict for each: step, correct, images, accuracy, loss.
        train_batch: images a step, all replicas together.
        micro_batch: images a micro-batch.
        micro_batches: M, micro-batches a step and replica.
        bounds: partition bounds, a layer index for each stage and one for the end; empty for the baseline.
        layers: class name of each layer of the flat model; empty for the baseline.
        status: ``finished``, ``failed``, ``interrupted``, or ``running`` when nothing closed the record.
        details: all of run.json: config, versions, machine.
    """

    directory: Path
    command: str
    stages: int
    replicas: int
    losses: list[float] = field(repr=False)
    seconds: list[float] = field(repr=False)
    first_step: int
    evaluations: list[dict[str, Any]] = field(repr=False)
    train_batch: int
    micro_batch: int
    micro_batches: int
    bounds: list[int]
    layers: list[str] = field(repr=False)
    status: str
    details: dict[str, Any] = field(repr=False)

    @property
    def samples_per_second(self) -> float:
        """Examples, such as images, a second, from the median step; the first step, which warms up, is left out."""
        return self.train_batch / statistics.median(self.seconds[1:] or self.seconds or [float("inf")])

    @property
    def accuracy(self) -> float:
        """Share of the test set that the last evaluation found right.

        Raises:
            ValueError: the run never evaluated, or its labels are no classes.
        """
        if not self.evaluations:
            raise ValueError("this run was never evaluated: launch it with eval_every=N")
        if self.evaluations[-1]["accuracy"] is None:
            raise ValueError(
                "the labels of this run are no classes, of which one is right: see evaluations for the loss"
            )
        return self.evaluations[-1]["accuracy"]

    @classmethod
    def load(cls, directory: str | Path) -> "Run":
        """Read a run back.

        Raises:
            ValueError: the directory holds no run, or its record is damaged.
        """
        directory = Path(directory)
        try:
            details = json.loads((directory / "run.json").read_text())
            steps, evaluations = (list(read_lines(directory / name)) for name in (STEPS, EVALUATIONS))
            made: dict[str, Any] = {
                "directory": directory,
                "losses": [number(step["loss"]) for step in steps],
                "seconds": [step["seconds"] for step in steps],
                "first_step": steps[0]["step"] if steps else details.get("done", 0) + 1,
                "evaluations": [line | {"loss": number(line["loss"])} for line in evaluations],
                "details": details,
            }
            kept = {one.name: details[one.name] for one in fields(cls) if one.name not in made}
            return cls(**made, **kept)
        except FileNotFoundError:
            raise ValueError(f"{directory} holds no run: run.json is missing") from None
        except OSError as error:
            raise ValueError(disk.cannot(f"read run {directory}", error)) from None
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{directory} holds a damaged or unfinished record: {error!r}") from None
