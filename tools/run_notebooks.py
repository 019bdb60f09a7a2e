r"""Execute the notebooks through papermill, one after the other, and say what became of each.

    python tools/run_notebooks.py                                       # all of them: make run
    python tools/run_notebooks.py 00_first_pipeline -p steps 4
    python tools/run_notebooks.py --smoke                               # quickly, and test the exercises: make smoke

What papermill alone does not do, and this does:

- A parameter that a notebook does not have, or has of another type, is an error, before anything starts.
- A failure does not keep the others from running. The status is 1 if any failed.
- A notebook that gets on is never cut off, however slow the machine; one whose cell says nothing for too long, no
  output and no change of its progress bar, is ended. Whatever it has started ends with it: this process adopts all
  orphans below it (prctl(2), PR_SET_CHILD_SUBREAPER), so none slips away.
- With ``--smoke`` the exercises are tested: after each check has accepted the given answer, it must accept every
  other right one, and refuse the unanswered cell and every wrong attempt, in the same kernel.

The executed copy is ``build/notebooks/NAME.ipynb``. It is written under a hidden name and moved when the notebook has
passed: the copy of an earlier pass stays until then. That of a notebook that failed is ``NAME.failed.ipynb`` until it
passes. With ``--smoke`` they are in ``build/smoke``.
"""

import argparse
import copy
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import nbformat
import papermill
import psutil
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

import course
from pipetutor.processes.children import adopt_orphans, descendants, end_with, kill_descendants, reap
from pipetutor.system import disk

JUPYTER = course.ROOT / "tools" / "jupyter"  # its kernel python3 is this Python, whatever the user's is
KERNEL_SECONDS = 600  # for a kernel to start, and for its last output to come once it says that a cell has ended
GRACE_SECONDS = 15.0  # for what a notebook has started to end of itself, once its kernel is gone
TELL_SECONDS = 30.0  # how often a log, which is no terminal, hears of a notebook that is running


# --- the exercises -----------------------------------------------------------------------------------------------


def _try(exercise, right, unanswered, wrong, check):  # its source is sent to the kernel
    """Fail unless the check accepts what is right, and refuses in the promised words what is wrong or unanswered."""
    from IPython import get_ipython
    from IPython.utils.capture import capture_output

    shell = get_ipython()

    def fault_of(*sources):
        """Run cells until one fails; return its number and its exception, without a traceback on the page."""
        shown = ("showtraceback", "showsyntaxerror", "showindentationerror")
        for name in shown:
            setattr(shell, name, lambda *args, **options: None)
        try:
            with capture_output():
                for number, source in enumerate(sources):
                    result = shell.run_cell(source, store_history=False)
                    if not result.success:
                        return number, result.error_before_exec or result.error_in_exec
        finally:
            for name in shown:
                delattr(shell, name)
        return None, None

    def fail(what, attempt):
        raise AssertionError(f"exercise {exercise}: {what}, after this attempt:\n{attempt}") from None

    for attempt in right:
        _, fault = fault_of(attempt, check)
        if fault is not None:
            fail(f"a right answer ends in {type(fault).__name__}: {fault}", attempt)
    _, fault = fault_of(unanswered, check)
    if fault is None:
        fail("the check accepts an answer that nobody gave", unanswered)
    if not isinstance(fault, (NotImplementedError, AssertionError)):
        fail(f"a cell without an answer ends in {type(fault).__name__}: {fault}", unanswered)
    for attempt, says in wrong:
        place, fault = fault_of(attempt, check)
        if fault is None:
            fail("the check accepts a wrong answer", attempt)
        if place == 0:
            fail(f"the attempt does not get as far as the check: {type(fault).__name__}: {fault}", attempt)
        if not isinstance(fault, AssertionError):
            fail(f"the check ends in {type(fault).__name__} ({fault}), and explains nothing", attempt)
        if " ".join(says.split()) not in " ".join(str(fault).split()):
            fail(f"the check should say {says!r}, and says {str(fault)!r}", attempt)
    print(f"exercise {exercise}: {len(right)} more right answers are accepted, {len(wrong)} wrong ones refused")


def with_attempts(notebook: NotebookNode) -> NotebookNode:
    """Return a copy of a notebook in which each exercise is followed by cells that test its check.

    Raises:
        ValueError: an exercise is not complete, or there is none.
    """
    from nbgrader.preprocessors import ClearSolutions

    exercises, problems = course.exercises(notebook)
    if problems or not exercises:
        raise ValueError("; ".join(problems) or "it has no exercise with an answer and a check")
    stripped, _ = ClearSolutions().preprocess(copy.deepcopy(notebook), {})
    unanswered = {cell.id: cell.source for cell in stripped.cells}
    tested = copy.deepcopy(notebook)
    tested.cells = []
    checks = {exercise.check.id: exercise for exercise in exercises}
    for cell in notebook.cells:
        tested.cells.append(cell)
        if one := checks.get(cell.id):
            wrong = [(each["attempt"], each["says"]) for each in one.wrong]
            source = (
                f"# Made by make smoke: what the check of exercise {one.name} must accept and refuse.\n\n"
                f"{inspect.getsource(_try)}\n\n"
                f"_try({one.name!r}, {one.right!r}, {unanswered[one.answer.id]!r}, {wrong!r}, {one.check.source!r})\n"
                "del _try"
            )
            note = "# Made by make smoke: as it was before.\n"  # later cells may use names of both
            texts = {"attempts": source, "answer": note + one.answer.source, "check": note + one.check.source}
            for suffix, text in texts.items():
                tested.cells.append(new_code_cell(text, id=f"{one.name}-{suffix}", metadata={"tags": [suffix]}))
    return tested


# --- one notebook ------------------------------------------------------------------------------------------------


class _Client(PapermillNotebookClient):
    """papermill's client, which notes when the kernel last said anything about the running cell."""

    def __init__(self, nb_man: Any, heard: Any, **traits: Any):
        super().__init__(nb_man, startup_timeout=KERNEL_SECONDS, iopub_timeout=KERNEL_SECONDS, **traits)
        self._heard = heard

    def process_message(self, *message: Any) -> NotebookNode | None:
        self._heard.value = time.monotonic()
        return super().process_message(*message)


class _Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, heard: Any, on_cell_execute: Callable, **_: Any
    ) -> None:
        _Client(nb_man, heard, kernel_name=kernel_name, on_cell_execute=on_cell_execute).execute()


papermill_engines.register("heard", _Engine)


def _execute(source: str, target: str, directory: str, parameters: dict, heard: Any, pipe: Connection) -> None:
    """Execute a notebook in a process of its own, which tells through the pipe what it does."""
    os.setsid()  # Ctrl-C in the terminal is for the parent alone
    end_with(parent_process().pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(JUPYTER), os.environ.get("JUPYTER_PATH")]))
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silent, descriptor)
    fault = ""

    def tell(cell: NotebookNode, cell_index: int) -> None:
        pipe.send(("cell", cell.id, _first_line(cell.source)))

    try:
        papermill.execute_notebook(
            source,
            target,
            parameters=parameters,
            cwd=directory,
            kernel_name="python3",
            progress_bar=False,
            engine_name="heard",
            heard=heard,
            on_cell_execute=tell,
        )
    except PapermillExecutionError as error:
        fault = f"{error.ename}: {' '.join(error.evalue.split())}"
    except Exception as error:  # whatever it is, it belongs into the table
        fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
    pipe.send(("ended", "", fault))


def _first_line(source: str) -> str:
    lines = [line for line in source.splitlines() if line.strip()]
    return lines[0] if lines else ""


def _end(worker: BaseProcess) -> list[str]:
    """End a notebook's process and its kernel; return the command lines of what did not end with them, and kill it.

    The kernel goes first: a supervisor of ``pipetutor`` sees that it is gone, ends its ranks and closes its record.
    """
    with suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(worker.pid).children(), psutil.Process(worker.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    end = time.monotonic() + GRACE_SECONDS
    while (left := _alive()) and time.monotonic() < end:
        time.sleep(0.05)
    said = []
    for process in left:
        with suppress(psutil.Error):
            said.append(" ".join(process.cmdline())[:60])
    kill_descendants()
    return said


def _alive() -> list[psutil.Process]:
    reap()
    return descendants()


class Line:
    """One line about what is running: rewritten in a terminal, now and then a new one in a log."""

    def __init__(self, name: str, cells: int):
        self._head, self._cells, self._begin = name, cells, time.monotonic()
        self._terminal, self._told = sys.stdout.isatty(), time.monotonic()
        self._seen: list[str] = []
        self._words = "starting a kernel"
        if not self._terminal:
            print(f"{name}: begins", flush=True)

    def cell(self, name: str, words: str) -> None:
        """Go on to the next cell."""
        self._seen.append(name)
        self._words = f"{name}: {words}"
        self.show()

    def show(self) -> None:
        """Tell how long it has been running, and which cell it is at."""
        now = time.monotonic()
        if not self._terminal and now - self._told < TELL_SECONDS:
            return
        self._told = now
        text = f"{self._head}: {now - self._begin:3.0f} s, code cell {len(self._seen)}/{self._cells}, {self._words}"
        if self._terminal:
            print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(text, flush=True)

    def close(self, verdict: str) -> None:
        """Say how it ended."""
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{self._head}: {time.monotonic() - self._begin:.0f} s, {verdict}", flush=True)


def run(lesson: course.Lesson, parameters: dict[str, Any], options: argparse.Namespace) -> str:
    """Execute one notebook and keep its executed copy.

    Returns:
        ``ok``, or in one line what went wrong.
    """
    output: Path = options.output
    target, hidden = output / f"{lesson.name}.ipynb", output / f".{lesson.name}.ipynb"
    failed, source = output / f"{lesson.name}.failed.ipynb", output / f".{lesson.name}.source.ipynb"
    for old in (hidden, source):  # of a run that was killed
        old.unlink(missing_ok=True)
    notebook = nbformat.read(lesson.path, as_version=4)
    if options.smoke:
        if lesson.smoke is None:
            return "its metadata has no pipetutor.smoke, the parameters of a quick pass"
        try:
            notebook = with_attempts(notebook)
        except ValueError as problem:
            return str(problem)
        nbformat.write(notebook, source)
    given = os.path.relpath(source if options.smoke else lesson.path)  # relative, for papermill notes it down
    line = Line(lesson.name, sum(cell.cell_type == "code" for cell in notebook.cells) + bool(parameters))
    forks = get_context("fork")
    pipe, end = forks.Pipe(duplex=False)
    heard = forks.RawValue("d", math.inf)  # when its kernel last said something; it is given time to start
    worker = forks.Process(
        target=_execute, args=(given, os.path.relpath(hidden), lesson.path.parent, parameters, heard, end)
    )
    place, verdict = "before the first cell", ""
    try:
        worker.start()
        end.close()
        try:
            while not verdict:
                if pipe.poll(1):
                    kind, name, words = pipe.recv()
                    if kind == "cell":
                        place = f"cell {name}"
                        line.cell(name, words)
                    else:
                        verdict = f"{place}: {words}" if words else "ok"
                        worker.join(GRACE_SECONDS)
                elif time.monotonic() - heard.value > options.patience:
                    verdict = f"{place}: nothing happened for {options.patience} s"
                line.show()
        except EOFError:
            verdict = "the process that executed it is gone; was it killed, for want of memory, say?"
    finally:
        with Unstoppable():
            left = _end(worker) if worker.pid else []
            pipe.close()
            source.unlink(missing_ok=True)
            if verdict == "ok" and left:
                verdict = f"left {len(left)} processes running: {left[0]} ..."
            if hidden.exists():
                hidden.rename(target if verdict == "ok" else failed)
            if verdict == "ok":
                failed.unlink(missing_ok=True)
    line.close("ok" if verdict == "ok" else "failed")
    return verdict


# --- all of them -------------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or a signal that asks to end."""


def _stop(number: int, frame: object) -> None:
    raise Stopped(signal.Signals(number).name)


class Unstoppable:
    """While it is entered, signals that ask to end are ignored: cleaning up is what they ask for."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self):
        """Ignore them."""
        self._handlers = {number: signal.signal(number, signal.SIG_IGN) for number in self.SIGNALS}

    def __exit__(self, *exception):
        """Listen to them again."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def value(text: str) -> Any:
    """Read a parameter from the command line: JSON where it is JSON, True, False and None, else a string."""
    words = {"True": True, "False": False, "None": None}
    words |= {name: name for name in ("NaN", "Infinity", "-Infinity")}  # which Python's JSON has, and JSON has not
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def stale(lesson: course.Lesson, output: Path) -> bool:
    """Tell whether a notebook has no executed copy, or one that is older than itself."""
    executed = output / lesson.path.name
    return not executed.exists() or executed.stat().st_mtime < lesson.path.stat().st_mtime


def summary(rows: Sequence[tuple[str, float | None, str]]) -> str:
    """Return the closing table: notebook, seconds, verdict."""
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'notebook':{width}}  seconds  verdict"]
    for name, seconds, verdict in rows:
        short = verdict if len(verdict) <= 240 else f"{verdict[:240]} ..."
        lines.append(f"{name:{width}}  {'-' if seconds is None else f'{seconds:.0f}':>7}  {short}")
    passed = sum(verdict == "ok" for *_, verdict in rows)
    total = sum(seconds or 0 for _, seconds, _ in rows)
    lines.append(f"{passed} of {len(rows)} notebooks passed, in {total:.0f} s")
    return "\n".join(lines)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NOTEBOOK", help="such as 00_first_pipeline; all without one")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--smoke", action="store_true", help="the parameters of pipetutor.smoke; test the exercises")
    parser.add_argument("--stale", action="store_true", help="only those without an executed copy that is up to date")
    parser.add_argument(
        "--patience", type=int, default=600, metavar="SECONDS", help="end a notebook that says nothing so long (600)"
    )
    parser.add_argument("--notebooks", type=Path, default=course.NOTEBOOKS, help="the directory that they are in")
    parser.add_argument("--output", type=Path, help="build/notebooks; with --smoke build/smoke")
    options = parser.parse_args(words)
    options.output = (options.output or course.ROOT / "build" / ("smoke" if options.smoke else "notebooks")).resolve()
    return options


def plan(options: argparse.Namespace) -> list[tuple[course.Lesson, dict[str, Any]]]:
    """Choose the notebooks and their parameters.

    Raises:
        ValueError: a notebook or a parameter is not there, or a parameter is of another type.
    """
    known = {lesson.name: lesson for lesson in course.lessons(options.notebooks)}
    names = [Path(name).name.removesuffix(".ipynb") for name in options.names] or list(known)
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"no notebook {' or '.join(missing)}; there are: {', '.join(known)}")
    given = {name: value(text) for name, text in options.parameter}
    chosen = []
    for lesson in (known[name] for name in names):
        parameters = ((lesson.smoke or {}) if options.smoke else {}) | given
        if problem := course.unfit(lesson.path, parameters):
            raise ValueError(problem)
        if not options.stale or stale(lesson, options.output):
            chosen.append((lesson, parameters))
    return chosen


def main(words: Sequence[str] | None = None) -> int:
    """Run the notebooks; return 0 if all passed, 1 if one failed, 2 for a wrong request, 130 if stopped."""
    options = parse(words)
    try:
        chosen = plan(options)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    if not chosen:
        print("every executed copy is up to date")
        return 0
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=options.output).close()
    except OSError as error:
        print(disk.cannot(f"write to {options.output}", error, "give another directory (--output)"), file=sys.stderr)
        return 2
    adopt_orphans()
    for number in Unstoppable.SIGNALS:
        signal.signal(number, _stop)
    rows: list[tuple[str, float | None, str]] = []
    stopped = False
    for lesson, parameters in chosen:
        begin = time.monotonic()
        if stopped:
            rows.append((lesson.name, None, "not run"))
            continue
        try:
            verdict = run(lesson, parameters, options)
        except Stopped as signal_name:
            stopped, verdict = True, f"stopped by {signal_name}"
        rows.append((lesson.name, time.monotonic() - begin, verdict))
    print(f"\n{summary(rows)}", flush=True)
    return 130 if stopped else int(any(verdict != "ok" for *_, verdict in rows))


if __name__ == "__main__":
    sys.exit(main())
