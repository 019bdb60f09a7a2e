"""What the notebooks say about themselves: the lessons of the course, their parameters and their exercises.

The notebooks are the only place where this is written down. The map of the course, in README.md and in
notebooks/index.md, is made from it, and the README's table of flags from ``pipetutor.options``, by

    python tools/course.py      # or: make map

An exercise is two code cells, as nbgrader has them: the answer, whose solution stands between two markers, and the
check, whose assertions explain a wrong answer. The metadata of the check holds attempts, which ``make smoke`` tries:
right answers in other forms than the given one (``pipetutor.right``), and wrong ones with words of the message that
each must get (``pipetutor.wrong``).
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from papermill import inspect_notebook

from pipetutor import options

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
README = ROOT / "README.md"
BEGIN, END = "<!-- map: made by tools/course.py -->", "<!-- end of the map -->"
FLAGS_BEGIN, FLAGS_END = "<!-- flags: made by tools/course.py -->", "<!-- end of the flags -->"
MARKERS = ("### BEGIN SOLUTION", "### END SOLUTION")


@dataclass(frozen=True)
class Lesson:
    """A notebook of the course.

    Attributes:
        path: of the notebook.
        title: its first heading.
        promise: the sentence below the title.
        minutes: how long it takes with its default parameters on two fast cores, and on two slow ones; None where
            it does not say.
        smoke: the parameters of a quick pass; None where it does not say.
    """

    path: Path
    title: str
    promise: str
    minutes: tuple[int, int] | None
    smoke: dict[str, Any] | None

    @property
    def name(self) -> str:
        """Of the file, without its suffix."""
        return self.path.stem


@dataclass(frozen=True)
class Exercise:
    """An answer and its check.

    Attributes:
        name: such as ``00-1``.
        answer: the cell with the given answer.
        check: the cell after it.
        right: whole answers in other forms than the given one, which the check must accept.
        wrong: attempts that the check must refuse, each with ``says``, words of the message.
    """

    name: str
    answer: NotebookNode
    check: NotebookNode
    right: list[str]
    wrong: list[dict[str, str]]


def lesson(path: Path) -> Lesson:
    """Read what a notebook says about itself."""
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0].source if notebook.cells else ""
    found = re.match(r"# (.+)\n+(.+)", first)
    if not found:
        raise ValueError(f"{path.name}: the first cell is not a title with a promise below it")
    about = notebook.metadata.get("pipetutor", {})
    minutes = tuple(about["minutes"]) if "minutes" in about else None
    return Lesson(path, found[1].strip(), found[2].strip(), minutes, about.get("smoke"))


def lessons(directory: Path = NOTEBOOKS) -> list[Lesson]:
    """Read all notebooks of a directory, in their order."""
    return [lesson(path) for path in sorted(directory.glob("*.ipynb"))]


def unfit(path: Path, parameters: Mapping[str, Any]) -> str:
    """Say which parameters a notebook does not have, or has of another type; nothing if all of them fit."""
    there = inspect_notebook(str(path))
    if missing := [name for name in parameters if name not in there]:
        words = ", ".join(f"{name} ({about['default']})" for name, about in there.items())
        return f"{path.stem} has no parameter {' or '.join(missing)}; it has: {words or 'none'}"
    for name, value in parameters.items():
        text = there[name]["default"]
        try:
            default = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # computed: any type may be right
            continue
        if not _alike(value, default):
            kind = TYPES.get(type(default), f"a {type(default).__name__}")
            return f"{path.stem}: {name} is {value!r}, but must be {kind}: {text}, say"
    return ""


TYPES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list, in brackets, of the same type",
}


def _alike(value: Any, default: Any) -> bool:
    """Say whether a value is of its default's type; an item of a list may be of that of any item of the default."""
    if default is None:
        return True
    if isinstance(default, list):
        return isinstance(value, list) and all(any(_alike(item, one) for one in default) for item in value)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)


def exercises(notebook: NotebookNode) -> tuple[list[Exercise], list[str]]:
    """Find the exercises of a notebook.

    Returns:
        The complete ones, and what is wrong with the others, in words that name the cell.
    """
    found, problems = [], []
    roles = [(cell, cell.metadata.get("nbgrader", {})) for cell in notebook.cells]
    checks = [(cell, about) for cell, about in roles if about.get("grade")]
    for index, (cell, about) in enumerate(roles):
        if not about.get("solution"):
            if any(marker in cell.source for marker in MARKERS) and not about.get("grade"):
                problems.append(f"{cell.id}: a solution in a cell that nbgrader does not know as an answer")
            continue
        name = about["grade_id"].removesuffix("-answer")
        check, rule = roles[index + 1] if index + 1 < len(roles) else (None, {})
        attempts = check.metadata.get("pipetutor", {}) if check else {}
        right, wrong = attempts.get("right", []), attempts.get("wrong", [])
        places = [cell.source.find(marker) for marker in MARKERS]
        if [cell.source.count(marker) for marker in MARKERS] != [1, 1] or places[0] > places[1]:
            problems.append(f"exercise {name}: the answer must hold one solution, between {' and '.join(MARKERS)}")
        elif check is None or not rule.get("grade") or rule["grade_id"] != f"{name}-check":
            problems.append(f"exercise {name}: no check with the grade_id {name}-check follows the answer")
        elif len(set(right) - {cell.source}) < 2:
            problems.append(f"exercise {name}: the check needs two right answers in other forms than the given one")
        elif not wrong:
            problems.append(f"exercise {name}: the check has no wrong attempt, so nobody knows that it can fail")
        elif not all(isinstance(w, dict) and w.get("attempt") and w.get("says") for w in wrong):
            problems.append(f"exercise {name}: a wrong attempt needs both, attempt and says")
        else:
            found.append(Exercise(name, cell, check, right, wrong))
    paired = {exercise.check.id for exercise in found}
    complained = " ".join(problems)
    for cell, about in checks:
        name = about["grade_id"].removesuffix("-check")
        if cell.id not in paired and f"exercise {name}:" not in complained:
            problems.append(f"exercise {name}: the check does not follow an answer")
    return found, problems


def table(directory: str) -> str:
    """Return the map of the course as a markdown table, with links that begin with ``directory``."""
    rows = ["| Notebook | What you do | Time |", "|---|---|---|"]
    for one in lessons():
        time = "" if one.minutes is None else "{}\u00a0to\u00a0{}\u00a0min".format(*one.minutes)
        rows.append(f"| [{one.name[:2]} {one.title}]({directory}{one.path.name}) | {one.promise} | {time} |")
    return "\n".join(rows)


def placed(text: str, begin: str, end: str, content: str) -> str:
    """Return a page with this content in the place of what stands between two comments."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"a place is marked by {begin} and {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def with_map(text: str, directory: str) -> str:
    """Return a page with its map made anew."""
    return placed(text, BEGIN, END, table(directory))


def with_flags(text: str) -> str:
    """Return the README with its table of flags made anew."""
    return placed(text, FLAGS_BEGIN, FLAGS_END, options.table())


PAGES = {README: "notebooks/", NOTEBOOKS / "index.md": ""}  # page -> how its links begin

if __name__ == "__main__":
    for page, directory in PAGES.items():
        page.write_text(with_map(page.read_text(), directory))
        print(f"{page.relative_to(ROOT)}: the map is up to date")
    README.write_text(with_flags(README.read_text()))
    print("README.md: the table of flags is up to date")
