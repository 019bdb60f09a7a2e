"""The tools around the notebooks keep what they promise; each promise is seen to hold and to fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from conftest import HANGS, processes_of
from IPython.core.interactiveshell import InteractiveShell
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import build_html
import course
import fill_workbook
import run_notebooks

ROOT = Path(__file__).parents[1]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
GRADED = {"locked": True, "points": 1, "schema_version": 3, "task": False}
ANSWER = "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"
CHECK = "assert double(3) == 6, f'{double(3)} is not twice three'\nprint('right')"
RIGHT = ["def double(x):\n    return x + x", "def double(number):\n    return sum([number, number])"]
WRONG = [{"attempt": "def double(x):\n    return x + 2", "says": "5 is not twice"}]


def exercise(answer=ANSWER, check=CHECK, right=RIGHT, wrong=WRONG, name="00-1"):
    of_answer = GRADED | {"grade": False, "solution": True, "locked": False, "grade_id": f"{name}-answer"}
    of_check = GRADED | {"grade": True, "solution": False, "grade_id": f"{name}-check"}
    return [
        new_markdown_cell("**Exercise 1.** Define `double`.", id=f"{name}-task"),
        new_code_cell(answer, id=f"{name}-a", metadata={"nbgrader": of_answer}),
        new_code_cell(
            check, id=f"{name}-c", metadata={"nbgrader": of_check, "pipetutor": {"right": right, "wrong": wrong}}
        ),
    ]


def write(directory, name, *code, cells=(), parameters="steps = 3", smoke=None):
    head = [new_markdown_cell("# A title\n\nA promise.", id="head"), new_code_cell(f"# Parameters\n{parameters}")]
    head[1].metadata["tags"] = ["parameters"]
    numbered = [new_code_cell(source, id=f"c{number}") for number, source in enumerate(code, start=1)]
    about = {"kernelspec": KERNEL, "pipetutor": {"minutes": [1, 4], "smoke": smoke}}
    directory.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=[*head, *numbered, *cells], metadata=about), directory / f"{name}.ipynb")


IMPATIENT = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import run_notebooks
run_notebooks.GRACE_SECONDS = 2.0  # for what ignores every signal
sys.exit(run_notebooks.main())
"""


def tool(directory, *words):
    command = [sys.executable, "-c", IMPATIENT, "--notebooks", directory]
    return [*map(str, command), "--output", str(directory / "out"), *map(str, words)]


def run(directory, *words):
    return subprocess.run(
        tool(directory, *words), capture_output=True, text=True, cwd=directory.parent, timeout=HANGS
    )


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


def test_a_place_for_results_that_cannot_be_written_is_one_line(tmp_path):
    write(tmp_path / "n", "00_first")
    for place, why in (("/dev/null/out", "Not a directory"), ("/proc", "No such file or directory")):
        said = run(tmp_path / "n", "--output", place)
        assert said.returncode == 2 and not said.stdout
        assert said.stderr == f"cannot write to {place}: {why}; give another directory (--output)\n"


@pytest.fixture
def gone(tmp_path, monkeypatch):
    """A user whose kernel python3 is of an environment that is gone, and comes before that of any other."""
    kernel = tmp_path / "data" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    about = {"argv": ["/opt/gone/python", "-f", "{connection_file}"], "display_name": "Gone", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(about))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "data"))


def test_the_kernel_is_this_python_whatever_the_user_calls_python3(tmp_path, gone):
    write(tmp_path / "n", "00_first", "import sys\nprint(sys.executable)")
    said = run(tmp_path / "n")
    assert verdicts(said) == {"00_first": "ok"}
    executed = nbformat.read(tmp_path / "n" / "out" / "00_first.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == f"{sys.executable}\n"


def test_so_it_is_in_jupyterlab(tmp_path, gone):
    look = "from jupyter_client.kernelspec import KernelSpecManager as M; print(M().get_kernel_spec('python3').argv)"
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\n[[ "$*" != *jupyterlab* ]] || exec "{sys.executable}" -c "{look}"\n')
    python.chmod(0o755)
    (tmp_path / "venv" / ".pipetutor-ready").touch()
    lab = ["make", "--silent", "lab", f"VENV={tmp_path / 'venv'}"]
    said = subprocess.run(lab, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert said.stdout == "['python', '-m', 'ipykernel_launcher', '-f', '{connection_file}']\n", said.stderr


def test_nothing_starts_with_a_parameter_or_a_notebook_that_is_not_there(tmp_path):
    write(tmp_path / "n", "00_first", "print(steps)", parameters="steps = 3\nrate = 1e-4")
    for words, said in (
        (("-p", "stepps", "4"), "00_first has no parameter stepps; it has: steps (3), rate (1e-4)"),
        (("01_second",), "no notebook 01_second; there are: 00_first"),
        (("-p", "steps", "four"), "00_first: steps is 'four', but must be a whole number: 3, say"),
    ):
        refused = run(tmp_path / "n", *words)
        assert refused.returncode == 2 and said in refused.stderr and not (tmp_path / "n" / "out").exists()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("steps", "4"), ""),
        (("steps", "4.5"), "steps is 4.5, but must be a whole number: 3, say"),
        (("steps", "True"), "steps is True, but must be a whole number: 3, say"),
        (("steps", "None"), "steps is None, but must be a whole number: 3, say"),
        (("rate", "1"), ""),
        (("rate", "NaN"), "rate is 'NaN', but must be a number: 1e-4, say"),
        (("test", "0"), "test is 0, but must be True or False: True, say"),
        (("model", "vgg11"), ""),
        (("model", "7"), "model is 7, but must be a string: 'alexnet', say"),
        (("counts", "[3]"), ""),
        (("counts", "3"), "counts is 3, but must be a list, in brackets, of the same type: [1, 2], say"),
        (("counts", '["3"]'), "counts is ['3'], but must be a list, in brackets, of the same type: [1, 2], say"),
        (("cores", '"any"'), ""),
        (("limit", "8"), ""),
    ],
)
def test_a_parameter_of_another_type_is_refused(tmp_path, given, problem):
    cell = "steps = 3\nrate = 1e-4\ntest = True\nmodel = 'alexnet'\ncounts = [1, 2]\n"
    write(tmp_path, "00_first", parameters=f"{cell}cores = os.cpu_count()\nlimit = None")
    name, text = given
    said = course.unfit(tmp_path / "00_first.ipynb", {name: run_notebooks.value(text)})
    assert said == (f"00_first: {problem}" if problem else "")


def test_the_copy_of_a_pass_stays_until_the_next_one(tmp_path):
    out = tmp_path / "n" / "out"
    write(tmp_path / "n", "00_first", "assert steps < 5", "print('passed with', steps)")

    def kept():
        return sorted(path.name for path in out.iterdir())

    assert run(tmp_path / "n", "-p", "steps", 3).returncode == 0 and kept() == ["00_first.ipynb"]
    assert run(tmp_path / "n", "-p", "steps", 9).returncode == 1
    assert kept() == ["00_first.failed.ipynb", "00_first.ipynb"]
    (executed,) = (cell for cell in nbformat.read(out / "00_first.ipynb", as_version=4).cells if cell.id == "c2")
    assert executed.outputs[0].text == "passed with 3\n"
    assert run(tmp_path / "n", "-p", "steps", 4).returncode == 0 and kept() == ["00_first.ipynb"]
    assert "steps = 4" in source_of(out / "00_first.ipynb")


ORPHAN = """
import subprocess, sys
sleep = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; time.sleep(1000)"
start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}], start_new_session=True)"
subprocess.run([sys.executable, "-c", start])
"""


PRINTS = "import time\nend = time.monotonic() + 12\nwhile time.monotonic() < end:\n    time.sleep(0.1)\n    "
CHANGES = f"from IPython.display import display\nbar = display(0, display_id=True)\n{PRINTS}bar.update(1)"


def test_a_notebook_that_is_silent_for_too_long_is_ended_with_all_that_it_started(tmp_path):
    """However long one takes that gets on, and whether it prints or changes what it shows."""
    write(tmp_path / "n", "00_silent", ORPHAN, "import time\ntime.sleep(100)")
    write(tmp_path / "n", "01_prints", f"{PRINTS}print(1)")
    write(tmp_path / "n", "02_changes", CHANGES)
    names = ["00_silent", "01_prints", "02_changes"]
    with ThreadPoolExecutor() as pool:
        common = (run, tmp_path / "n", "--patience", 8, "--output")
        at_once = [pool.submit(*common, tmp_path / name, name) for name in names]
    told = {name: words for said in at_once for name, words in verdicts(said.result()).items()}
    assert told == dict(zip(names, ("cell c2: nothing happened for 8 s", "ok", "ok"), strict=True))
    assert not processes_of(tmp_path)
    assert "time.sleep" in source_of(tmp_path / "00_silent" / "00_silent.failed.ipynb")


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
    said, _ = running.communicate(timeout=HANGS)
    end = time.monotonic() + (HANGS if number == signal.SIGKILL else 0)  # then the kernel has to notice by itself
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
    write(tmp_path / "n", "01_lenient", cells=lenient, smoke={})
    write(tmp_path / "n", "02_untested", cells=exercise(wrong=[]), smoke={})
    write(tmp_path / "n", "03_unknown", cells=exercise())
    strict = exercise(check=f"import inspect\nassert 'x + x' in inspect.getsource(double), 'add'\n{CHECK}")
    strict[1].source = ANSWER.replace("2 * x", "x + x")
    write(tmp_path / "n", "04_strict", cells=strict, smoke={})
    said = run(tmp_path / "n", "--smoke")
    told = verdicts(said)
    assert said.returncode == 1 and told["00_good"] == "ok"
    assert "AssertionError: exercise 00-1: the check accepts a wrong answer" in told["01_lenient"]
    assert (
        f"a right answer ends in AssertionError: add, after this attempt: {' '.join(RIGHT[1].split())}"
        in told["04_strict"]
    )
    assert told["03_unknown"].startswith("its metadata has no pipetutor.smoke")
    assert told["02_untested"].startswith("exercise 00-1: the check has no wrong attempt")
    executed = nbformat.read(tmp_path / "n" / "out" / "00_good.ipynb", as_version=4)
    outputs = [output.text for cell in executed.cells for output in cell.get("outputs", [])]
    tried = "exercise 00-1: 2 more right answers are accepted, 1 wrong ones refused\n"
    assert outputs == ["right\n", tried, "right\n"]


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
        (UNANSWERED, [HALF], "assert double(3) == 7", "a right answer ends in AssertionError"),
        (UNANSWERED, [HALF], "double(number=3)", "a right answer ends in TypeError"),
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
        run_notebooks._try("00-1", RIGHT, unanswered, wrong, check)
        assert f"2 more right answers are accepted, {len(wrong)} wrong ones refused" in capsys.readouterr().out
    else:
        with pytest.raises(AssertionError, match="exercise 00-1: ") as refusal:
            run_notebooks._try("00-1", RIGHT, unanswered, wrong, check)
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
        (exercise(right=RIGHT[:1]), "needs two right answers"),
        (exercise(right=[RIGHT[0], RIGHT[0]]), "needs two right answers"),
        (exercise(right=[RIGHT[0], ANSWER]), "needs two right answers"),
        (exercise(wrong=[]), "has no wrong attempt"),
        (exercise(wrong=[{"attempt": "x = 1"}]), "needs both, attempt and says"),
        ([new_code_cell(ANSWER)], "a solution in a cell that nbgrader does not know"),
    ],
)
def test_exercises_are_complete(cells, problem):
    found, problems = course.exercises(new_notebook(cells=cells))
    if problem is None:
        assert not problems and [one.name for one in found] == ["00-1"]
        assert (found[0].right, found[0].wrong) == (RIGHT, WRONG)
    else:
        assert any(problem in said for said in problems), problems


# --- pages ----------------------------------------------------------------------------------------------------------

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGETS = "application/vnd.jupyter.widget-state+json"


@pytest.fixture
def course_pages(tmp_path):
    """Two lessons that were executed, a map and a glossary: the sources and the executed copies."""
    sources, executed = tmp_path / "n", tmp_path / "x"
    write(sources, "00_one", "print(1)", cells=[*exercise(), new_markdown_cell("## Recap\n\n## Recap\n\n## More")])
    link = "See [the first](00_one.ipynb#Recap), [a word](glossary.md#Micro-batch) and [a file](../README.md)."
    write(sources, "01_two", cells=[new_markdown_cell(link)])
    (sources / "index.md").write_text(
        f"# The map\n\n{course.BEGIN}\n{course.END}\n\n[1](00_one.ipynb) [2](01_two.ipynb)"
    )
    (sources / "glossary.md").write_text("# Glossary\n\n## Micro-batch\n\nA part of a batch.")
    executed.mkdir()
    for path in sources.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[1].outputs = [
            new_output("stream", name="stdout", text="one\n"),
            new_output("stream", name="stdout", text="two --a-flag\n"),
            new_output("display_data", {"image/png": PIXEL}, metadata={"image/png": {"alt": 'Loss "falls" <fast>'}}),
            new_output("display_data", {WIDGET: {"model_id": "m"}, "text/plain": "interactive(children=())"}),
            new_output("display_data", {"application/javascript": "alert(1)"}),
        ]
        notebook.metadata.widgets = {WIDGETS: {"state": {"m": {}}, "version_major": 2, "version_minor": 0}}
        nbformat.write(notebook, executed / path.name)
    return sources, executed


def test_pages_are_linked_and_need_nothing_from_elsewhere(course_pages, tmp_path):
    sources, executed = course_pages
    assert build_html.build(executed, sources, tmp_path / "html") == []
    names = ["00_one.html", "01_two.html", "glossary.html", "index.html"]
    assert sorted(path.name for path in (tmp_path / "html").iterdir()) == names
    soups = {name: BeautifulSoup((tmp_path / "html" / name).read_text(), "html.parser") for name in names}
    one, two = soups["00_one.html"], soups["01_two.html"]
    assert {a["href"] for a in one.find_all("a", rel="next")} == {"01_two.html"} and not one.find("a", rel="prev")
    assert {a["href"] for a in two.find_all("a", rel="prev")} == {"00_one.html"} and not two.find("a", rel="next")
    for name, soup in soups.items():
        assert name == "index.html" or soup.select('nav a[href="index.html"]')
        assert soup.html["lang"] == "en-GB" and soup.body.find("a")["href"] == "#content" and soup.find(id="content")
        style = soup.find("style").get_text()
        assert "prefers-color-scheme: dark" in style and "@media print" in style
        assert "http" not in style.replace('a[href^="http"]', "")
    links = [a["href"] for a in two.find("main").find_all("a") if "anchor-link" not in a.get("class", [])]
    assert links == ["00_one.html#Recap", "glossary.html#Micro-batch"] and "a file" in two.get_text()
    assert one.find("img")["alt"] == 'Loss "falls" <fast>'
    assert "one\ntwo" in one.select_one(".output_subarea pre").get_text(), "one stream, one block"
    assert [word.get_text() for word in one.select("pre .word")] == ["--a-flag"], "not broken after a hyphen"
    assert "interactive(" not in one.get_text() and "alert(1)" not in str(one)
    assert "return 2 * x" in one.find("details", class_=None).get_text(), "the answer is folded away"
    assert [li.get_text() for li in one.select(".contents li")] == ["Recap", "Recap", "More"]
    assert [li.a["href"] for li in one.select(".contents li")] == ["#Recap", "#Recap-2", "#More"]


def test_pages_of_what_was_not_executed_are_refused(course_pages, tmp_path):
    sources, executed = course_pages
    (executed / "01_two.ipynb").unlink()
    with pytest.raises(ValueError, match="no executed copy of 01_two: make run"):
        build_html.build(executed, sources, tmp_path / "html")


STYLE = '<style>a { color: red; background: url("data:,") }</style>'
GOOD = f'<html lang="en">{STYLE}<h1 id="a">A</h1><a href="#a">a</a>ADDED</html>'


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("", None),
        ('<a href="https://example.org">elsewhere</a>', None),
        ("<script>let x;</script>", "holds a script"),
        ('<script src="https://cdn.example/x.js"></script>', "fetches https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "fetches //cdn.example/x.css"),
        ('<img alt="a" src="https://example.org/a.png">', "fetches https://example.org/a.png"),
        (
            '<img alt="a" src="data:," srcset="data:, 1x, https://example.org/b.png 2x">',
            "fetches https://example.org/b.png",
        ),
        ('<iframe src="https://example.org"></iframe>', "fetches https://example.org"),
        ("<style>@import 'https://example.org/x.css';</style>", "fetches https://example.org/x.css"),
        ("<p style=\"background: url('https://example.org/p.png')\">", "fetches https://example.org/p.png"),
        ('<img src="data:,">', "a picture without words"),
        ('<img src="data:," alt="">', "a picture without words"),
        ('<h1 id="b">B</h1>', "2 headings of the first order"),
        ("<h2>B</h2>", "the heading 'B' has no id"),
        ('<p id="a">', "the id a twice"),
        ('<a href="#b">b</a>', "a link that leads nowhere: #b"),
        ('<a href="other.html">b</a>', "a link that leads nowhere: other.html"),
    ],
)
def test_what_is_wrong_with_a_page_is_told(wrong, problem):
    said = build_html.problems({"x.html": BeautifulSoup(GOOD.replace("ADDED", wrong), "html.parser")})
    assert said == [] if problem is None else any(problem in one for one in said), said


def test_an_ordinary_page_of_nbconvert_would_not_pass(course_pages):
    body, _ = HTMLExporter().from_filename(course_pages[1] / "00_one.ipynb")
    said = build_html.problems({"x.html": BeautifulSoup(body, "html.parser")})
    assert any("fetches https://cdnjs" in one for one in said) and any("holds a script" in one for one in said)


# --- the workbook, the map and nbgrader -----------------------------------------------------------------------------


def test_the_workbook_has_no_answers_and_is_never_overwritten(tmp_path):
    write(tmp_path / "n", "00_one", cells=exercise())
    (tmp_path / "n" / "index.md").write_text("# The map")
    assert fill_workbook.fill(tmp_path / "n", tmp_path / "w") == (["00_one.ipynb", "index.md"], [])
    text = source_of(tmp_path / "w" / "00_one.ipynb")
    assert "raise NotImplementedError()" in text and "2 * x" not in text and CHECK in text
    (tmp_path / "w" / "00_one.ipynb").write_text("mine")
    write(tmp_path / "n", "01_two")
    assert fill_workbook.fill(tmp_path / "n", tmp_path / "w") == (["01_two.ipynb"], ["00_one.ipynb", "index.md"])
    assert (tmp_path / "w" / "00_one.ipynb").read_text() == "mine"


def test_the_map_is_made_between_its_marks():
    page = f"# Title\n\n{course.BEGIN}\noutdated\n{course.END}\n\nMore."
    made = course.with_map(page, "notebooks/")
    assert made.startswith("# Title") and made.endswith("More.") and "outdated" not in made
    assert "(notebooks/00_first_pipeline.ipynb)" in made and course.with_map(made, "notebooks/") == made
    with pytest.raises(ValueError, match="a place is marked by"):
        course.with_map("# Title", "")


def test_nbgrader_takes_the_notebooks_as_they_are(tmp_path):
    """The command of README.md."""
    write(tmp_path / "notebooks", "00_one", cells=exercise())
    readme = (ROOT / "README.md").read_text()
    words = re.search(r"nbgrader (generate_assignment .*?)\n\n", readme, re.DOTALL)[1].replace("\\\n", " ").split()
    (tmp_path / "build").mkdir()
    command = [sys.executable, "-m", "nbgrader", *words]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert said.returncode == 0, said.stderr
    released = source_of(tmp_path / "build" / "release" / "notebooks" / "00_one.ipynb")
    assert "raise NotImplementedError()" in released and "2 * x" not in released and CHECK in released
    assert (tmp_path / "build" / "gradebook.db").exists()
