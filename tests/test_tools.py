"""The tools around the notebooks keep what they promise; each promise is seen to hold and to fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import processes_of
from IPython.core.interactiveshell import InteractiveShell
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import course
import run_notebooks

ROOT = Path(__file__).parents[1]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
GRADED = {"locked": True, "points": 1, "schema_version": 3, "task": False}
ANSWER = "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"
CHECK = "assert double(3) == 6, f'{double(3)} is not twice three'\nprint('right')"
WRONG = [{"attempt": "def double(x):\n    return x + 2", "says": "5 is not twice"}]


def exercise(answer=ANSWER, check=CHECK, wrong=WRONG, name="00-1"):
    of_answer = GRADED | {"grade": False, "solution": True, "locked": False, "grade_id": f"{name}-answer"}
    of_check = GRADED | {"grade": True, "solution": False, "grade_id": f"{name}-check"}
    return [
        new_markdown_cell("**Exercise 1.** Define `double`.", id=f"{name}-task"),
        new_code_cell(answer, id=f"{name}-a", metadata={"nbgrader": of_answer}),
        new_code_cell(check, id=f"{name}-c", metadata={"nbgrader": of_check, "pipetutor": {"wrong": wrong}}),
    ]


def write(directory, name, *code, cells=(), parameters="steps = 3", smoke=None):
    head = [new_markdown_cell("# A title\n\nA promise.", id="head"), new_code_cell(f"# Parameters\n{parameters}")]
    head[1].metadata["tags"] = ["parameters"]
    numbered = [new_code_cell(source, id=f"c{number}") for number, source in enumerate(code, start=1)]
    about = {"kernelspec": KERNEL, "pipetutor": {"minutes": 1, "smoke": smoke or {}}}
    directory.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=[*head, *numbered, *cells], metadata=about), directory / f"{name}.ipynb")


def tool(directory, *words):
    command = [sys.executable, ROOT / "tools" / "run_notebooks.py", "--notebooks", directory]
    return [*map(str, command), "--output", str(directory / "out"), *map(str, words)]


def run(directory, *words):
    return subprocess.run(tool(directory, *words), capture_output=True, text=True, cwd=directory.parent, timeout=100)


def verdicts(said):
    table = said.stdout.split("verdict\n")[1].splitlines()[:-1]
    return {line.split()[0]: line.split(maxsplit=2)[2] for line in table}


def source_of(path):
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


def test_a_failure_is_told_and_kept_and_stops_no_other(tmp_path):
    write(tmp_path / "n", "00_fails", "print('before')", "1 / 0", "print('after')")
    write(tmp_path / "n", "01_dies", "import os\nos._exit(3)")
    write(tmp_path / "n", "02_passes", "assert steps == 4\nprint(steps)")
    said = run(tmp_path / "n", "-p", "steps", "4")
    assert said.returncode == 1
    told = verdicts(said)
    assert told["00_fails"] == "cell c2: ZeroDivisionError: division by zero"
    assert told["01_dies"].startswith("cell c1: DeadKernelError")
    assert told["02_passes"] == "ok" and said.stdout.endswith("s\n") and "1 of 3 notebooks passed" in said.stdout
    kept = sorted(path.name for path in (tmp_path / "n" / "out").iterdir())
    assert kept == ["00_fails.failed.ipynb", "01_dies.failed.ipynb", "02_passes.ipynb"]
    executed = nbformat.read(tmp_path / "n" / "out" / "02_passes.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "4\n"
    assert str(tmp_path) not in json.dumps(executed.metadata), "no absolute path"


def test_nothing_starts_with_a_parameter_or_a_notebook_that_is_not_there(tmp_path):
    write(tmp_path / "n", "00_first", "print(steps)", parameters="steps = 3\nrate = 1e-4")
    for words, said in (
        (("-p", "stepps", "4"), "00_first has no parameter stepps; it has: steps (3), rate (1e-4)"),
        (("01_second",), "no notebook 01_second; there are: 00_first"),
    ):
        refused = run(tmp_path / "n", *words)
        assert refused.returncode == 2 and said in refused.stderr and not (tmp_path / "n" / "out").exists()


ORPHAN = """
import subprocess, sys
sleep = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; time.sleep(1000)"
start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}], start_new_session=True)"
subprocess.run([sys.executable, "-c", start])
"""


def test_a_notebook_over_its_limit_is_ended_with_all_that_it_started(tmp_path):
    write(tmp_path / "n", "00_slow", ORPHAN, "import time\ntime.sleep(1000)")
    write(tmp_path / "n", "01_slow_cell", "import time\ntime.sleep(1000)")
    write(tmp_path / "n", "02_passes")
    begin = time.monotonic()
    said = run(tmp_path / "n", "--limit", 7, "--cell-limit", 300, "00_slow")
    assert verdicts(said) == {"00_slow": "takes more than 7 s, the limit for a notebook"}
    assert not processes_of(tmp_path) and time.monotonic() - begin < 60
    said = run(tmp_path / "n", "--cell-limit", 2, "01_slow_cell", "02_passes")
    assert verdicts(said) == {"01_slow_cell": "cell c1: takes more than 2 s, the limit for a cell", "02_passes": "ok"}
    assert "time.sleep" in source_of(tmp_path / "n" / "out" / "01_slow_cell.failed.ipynb")


def test_a_notebook_that_leaves_a_process_behind_has_failed(tmp_path):
    write(tmp_path / "n", "00_leaves", ORPHAN)
    said = run(tmp_path / "n")
    assert said.returncode == 1 and verdicts(said)["00_leaves"].startswith("left 1 processes running: ")
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_being_stopped_leaves_nothing(tmp_path, number):
    write(tmp_path / "n", "00_slow", "open('begun', 'w').close()\nimport time\ntime.sleep(1000)")
    write(tmp_path / "n", "01_next")
    running = subprocess.Popen(tool(tmp_path / "n"), stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    while not (tmp_path / "n" / "begun").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(number)
    said, _ = running.communicate(timeout=30)
    end = time.monotonic() + (10 if number == signal.SIGKILL else 0)  # then the kernel has to notice by itself
    while processes_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_of(tmp_path)
    if number != signal.SIGKILL:
        assert running.returncode == 130 and "0 of 2 notebooks passed" in said
        assert f"stopped by {number.name}" in said and "not run" in said


def test_only_what_is_out_of_date_is_run(tmp_path):
    write(tmp_path / "n", "00_first")
    (lesson,) = course.lessons(tmp_path / "n")
    (tmp_path / "out").mkdir()
    assert run_notebooks.stale(lesson, tmp_path / "out")
    executed = tmp_path / "out" / "00_first.ipynb"
    executed.touch()
    assert not run_notebooks.stale(lesson, tmp_path / "out")
    os.utime(executed, (0, 0))
    assert run_notebooks.stale(lesson, tmp_path / "out")


def test_values_of_the_command_line():
    given = ("4", "1e-4", "[1, 2]", "True", "None", "0,16,22", "1f1b")
    assert [run_notebooks.value(text) for text in given] == [4, 1e-4, [1, 2], True, None, "0,16,22", "1f1b"]


def test_smoke_runs_the_attempts_and_gives_the_answer_back(tmp_path):
    after = new_code_cell("assert double(4) == 8 and steps == 1", id="after")
    write(tmp_path / "n", "00_good", cells=[*exercise(), after], smoke={"steps": 1})
    lenient = exercise(check="assert double(3) >= 5")
    write(tmp_path / "n", "01_lenient", cells=lenient)
    write(tmp_path / "n", "02_untested", cells=exercise(wrong=[]))
    said = run(tmp_path / "n", "--smoke")
    told = verdicts(said)
    assert said.returncode == 1 and told["00_good"] == "ok"
    assert "AssertionError: exercise 00-1: the check accepts a wrong answer" in told["01_lenient"]
    assert told["02_untested"].startswith("exercise 00-1: the check has no wrong attempt")
    executed = nbformat.read(tmp_path / "n" / "out" / "00_good.ipynb", as_version=4)
    outputs = [output.text for cell in executed.cells for output in cell.get("outputs", [])]
    assert outputs == ["right\n", "exercise 00-1: the check refuses the unanswered cell and 1 wrong answers\n"]


@pytest.fixture
def shell(monkeypatch):
    """A shell as a kernel has it, in this process."""
    made = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: made)
    return made


UNANSWERED = "def double(x):\n    # YOUR CODE HERE\n    raise NotImplementedError()"
HALF = ("def double(x):\n    return x + 2", "5 is not twice")


@pytest.mark.parametrize(
    ("unanswered", "wrong", "check", "complaint"),
    [
        (UNANSWERED, [HALF], CHECK, None),
        ("raise NotImplementedError()", [HALF], CHECK, None),
        (UNANSWERED, [HALF], "pass", "accepts an answer that nobody gave"),
        ("doubel", [HALF], CHECK, "a cell without an answer ends in NameError"),
        (UNANSWERED, [("def double(x):\n    return 6", "twice")], CHECK, "accepts a wrong answer"),
        (UNANSWERED, [HALF, ("def double(x)", "twice")], CHECK, "does not get as far as the check: SyntaxError"),
        (UNANSWERED, [("1 / 0", "twice")], CHECK, "does not get as far as the check: ZeroDivisionError"),
        (UNANSWERED, [("def double(x):\n    return y", "twice")], CHECK, "ends in NameError"),
        (UNANSWERED, [(HALF[0], "add it up")], CHECK, "should say 'add it up', and says '5 is not twice three'"),
    ],
)
def test_a_check_is_tested(shell, capsys, unanswered, wrong, check, complaint):
    shell.run_cell(ANSWER)
    if complaint is None:
        run_notebooks._refuse("00-1", unanswered, wrong, check)
        assert f"refuses the unanswered cell and {len(wrong)} wrong" in capsys.readouterr().out
    else:
        with pytest.raises(AssertionError, match="exercise 00-1: ") as refusal:
            run_notebooks._refuse("00-1", unanswered, wrong, check)
        assert complaint in str(refusal.value)
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        (exercise(), None),
        (exercise(answer="double = 1"), "the answer must hold one solution"),
        (exercise(answer=f"{ANSWER}\n{ANSWER}"), "the answer must hold one solution"),
        (exercise()[:2], "no check with the grade_id 00-1-check follows"),
        ([*exercise()[:2], exercise(name="00-2")[2]], "no check with the grade_id 00-1-check follows"),
        ([exercise()[2]], "exercise 00-1: the check does not follow an answer"),
        (exercise(wrong=[]), "has no wrong attempt"),
        (exercise(wrong=[{"attempt": "x = 1"}]), "needs both, attempt and says"),
        ([new_code_cell(ANSWER)], "a solution in a cell that nbgrader does not know"),
    ],
)
def test_exercises_are_complete(cells, problem):
    found, problems = course.exercises(new_notebook(cells=cells))
    if problem is None:
        assert not problems and [one.name for one in found] == ["00-1"] and found[0].wrong == WRONG
    else:
        assert any(problem in said for said in problems), problems
