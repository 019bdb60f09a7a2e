"""Answers to puzzles in a file that a class can collect: ``python -m pipetutor scores DIRECTORY``.

A file keeps the schedules, and no verdict on them: whoever collects grades each anew, with the simulator. So nobody
gains by a quick machine, or by editing a number. A run that trained with the schedule stands beside it as evidence.
"""

import getpass
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pipetutor.core import records
from pipetutor.core.records import Run
from pipetutor.processes.entry import command
from pipetutor.schedule.puzzles import PUZZLES, Score, grade
from pipetutor.schedule.text import csv, streams_of
from pipetutor.system.kinds import check, named

__all__ = ["collect", "submit"]

FILE = "scores.json"


class Entry(NamedTuple):
    """One answer of one learner."""

    puzzle: str
    name: str
    score: Score
    run: dict[str, Any] | None

    @property
    def rank(self) -> tuple[Any, ...]:
        """What entries are sorted by: solved ones first, then the smaller bubble, then the fewer in flight."""
        score = self.score
        if score.bubble is None:
            return (list(PUZZLES).index(self.puzzle), 2, 0.0, 0, self.name)
        return (list(PUZZLES).index(self.puzzle), 1 - score.solved, round(score.bubble, 9), score.peak, self.name)


def submit(
    puzzle: str, schedule: Any, run: Run | None = None, *, name: str = "", directory: str | Path = "."
) -> Score:
    """Grade an answer, and keep it in ``scores.json`` if it is better than the one there.

    Args:
        puzzle: a key of ``PUZZLES``.
        schedule: see ``pipetutor.schedule.text.streams_of``.
        run: a run that trained with the schedule.
        name: yours; by default that of your account.
        directory: where ``scores.json`` is or will be.

    Returns:
        The score.

    Raises:
        ValueError: there is no such puzzle, the run played another schedule, or the file cannot be written.

    >>> print(submit("twelve slots", "F0 B0 / F0 B0 / F0 B0"))
    micro-batches: it has 1, and 4 are wanted
    """
    check("puzzle", puzzle, named(PUZZLES))
    score = grade(PUZZLES[puzzle], schedule)
    if score.slots is None:
        return score
    written = csv(streams_of(schedule, PUZZLES[puzzle].ranks, PUZZLES[puzzle].micro_batches))
    evidence = _evidence(run, written) if run else None
    path = Path(directory, FILE)
    content = _read(path) if path.exists() else {"answers": {}}
    before = next((entry for entry in _entries(path, content) if entry.puzzle == puzzle), None)
    entry = Entry(puzzle, name or content.get("name") or getpass.getuser(), score, evidence)
    content["name"] = entry.name
    if before is None or entry.rank[:-1] < before.rank[:-1] or (entry.rank[:-1] == before.rank[:-1] and evidence):
        content["answers"][puzzle] = {"schedule": written, "run": evidence}
    try:
        records.write_json(path, content)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}): give another directory") from None
    return score


def _evidence(run: Run, written: str) -> dict[str, Any]:
    if run.details.get("schedule") != written:
        raise ValueError(
            f"run {run.directory} played another schedule than the one that you submit: launch(engine='torch', "
            "schedule=...) with it"
        )
    return {
        "directory": str(run.directory),
        "steps": len(run.losses),
        "loss": run.losses[-1],
        "examples_per_second": run.samples_per_second,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        assert isinstance(content, dict) and isinstance(content["answers"], dict)
        return content
    except (OSError, ValueError, AssertionError, KeyError) as error:
        raise ValueError(f"{path} is no file of scores ({error!r}): move it away, or mend it") from None


def _entries(path: Path, content: dict[str, Any]) -> Iterable[Entry]:
    for puzzle, answer in content["answers"].items():
        if puzzle in PUZZLES:
            score = grade(PUZZLES[puzzle], answer["schedule"])
            yield Entry(puzzle, str(content.get("name") or path.parent.name), score, answer.get("run"))


class Scores(list[Entry]):
    """Entries, best first; printed as a table for each puzzle."""

    def __str__(self) -> str:
        lines = []
        for puzzle in PUZZLES:
            rows = [entry for entry in self if entry.puzzle == puzzle]
            if rows:
                lines += ["", f"{puzzle}: {PUZZLES[puzzle].task}"]
                lines += [f"  {entry.name:20} {entry.score}{_ran(entry.run)}" for entry in rows]
        return "\n".join(lines).strip() or f"no {FILE} with an answer is there"


def _ran(run: dict[str, Any] | None) -> str:
    if not run:
        return ""
    return f"; ran {run['steps']} steps, {run['examples_per_second']:.1f} examples/s"


def collect(directory: str | Path) -> Scores:
    """Collect the answers of a class, and grade them: under each puzzle the smallest bubble first, ties by memory.

    Args:
        directory: that holds a directory for each learner, with ``scores.json`` in it or below.

    Raises:
        ValueError: a file is damaged.
    """
    paths = sorted(Path(directory).rglob(FILE))
    return Scores(sorted((one for path in paths for one in _entries(path, _read(path))), key=lambda one: one.rank))


def main() -> None:
    """Run ``collect`` from the command line."""
    print(command(collect, "python -m pipetutor scores"))


if __name__ == "__main__":
    main()
