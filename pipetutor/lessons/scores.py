"""Answers to puzzles in a file that a class can collect: ``python -m pipetutor scores DIRECTORY``.

A file keeps the schedules, and no verdict on them: whoever collects grades each anew, with the simulator. So nobody
gains by a quick machine, or by editing a number. A run that trained with the schedule stands beside it as evidence.
"""

import getpass
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipetutor.core import records
from pipetutor.core.records import Run
from pipetutor.processes.entry import command
from pipetutor.schedule.puzzles import PUZZLES, Score, grade
from pipetutor.schedule.text import csv, streams_of
from pipetutor.system import disk
from pipetutor.system.kinds import KINDS, check, named

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
    if name:
        check("name", name, "text")
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
    """Return what a file of scores holds; raise ValueError, in plain words, if it is none."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(disk.cannot(f"read {path}", error, "move it away, or mend it")) from None
    except (ValueError, RecursionError) as error:  # of bytes as well that are no text
        where = f", from line {error.lineno} on" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path} is no JSON text{where}: move it away, or mend it") from None
    if wrong := _wrong(content):
        raise ValueError(f"{path} is no file of scores: {wrong}; move it away, or mend it")
    return content


def _wrong(content: Any) -> str:
    """Say what a file of scores lacks; empty where it can be graded."""
    if not isinstance(content, dict) or not isinstance(content.get("answers"), dict):
        return 'it has no "answers", an object with an answer for each puzzle'
    if content.get("name") and not KINDS["text"].fits(content["name"]):
        return '"name" is no name in one line'
    for puzzle, answer in content["answers"].items():
        if not isinstance(answer, dict) or not isinstance(answer.get("schedule"), str):
            return f'the answer to {puzzle!r} has no "schedule", a text'
        run = answer.get("run")
        numbers = [run.get("steps"), run.get("examples_per_second")] if isinstance(run, dict) else [None]
        if run and not all(map(KINDS["number"].fits, numbers)):
            return f'"run" of the answer to {puzzle!r} has no "steps" or no "examples_per_second"'
    return ""


def _entries(path: Path, content: dict[str, Any]) -> Iterable[Entry]:
    for puzzle, answer in content["answers"].items():
        if puzzle in PUZZLES:
            score = grade(PUZZLES[puzzle], answer["schedule"])
            yield Entry(puzzle, str(content.get("name") or path.parent.name), score, answer.get("run"))


class Scores(list[Entry]):
    """Entries, best first; printed as a table for each puzzle.

    Attributes:
        damaged: a line for each file that is left out: what is wrong with it.
    """

    def __init__(self, entries: Iterable[Entry], damaged: Sequence[str] = ()):
        super().__init__(sorted(entries, key=lambda one: one.rank))
        self.damaged = list(damaged)

    def __str__(self) -> str:
        return "\n".join([self.table, *(f"left out: {words}" for words in self.damaged)])

    @property
    def table(self) -> str:
        """The entries alone."""
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

    Returns:
        The entries, and what is wrong with each file that cannot be read, which is left out.

    Raises:
        ValueError: there is no such directory.
    """
    if not Path(directory).is_dir():
        raise ValueError(f"{directory} is no directory: give the one that holds a directory for each learner")
    entries: list[Entry] = []
    damaged = []
    for path in sorted(Path(directory).rglob(FILE)):
        try:
            entries += _entries(path, _read(path))
        except ValueError as error:
            damaged.append(str(error))
    return Scores(entries, damaged)


def main() -> None:
    """Run ``collect`` from the command line; the status is 1 where a file is left out."""
    found = command(collect, "python -m pipetutor scores")
    print(found.table, flush=True)
    for words in found.damaged:
        print(f"pipetutor: left out: {words}", file=sys.stderr)
    sys.exit(1 if found.damaged else 0)


if __name__ == "__main__":
    main()
