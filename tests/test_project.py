"""The project's own files agree with one another."""

import ast
import configparser
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import mutations
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

import course
import pipetutor
from pipetutor import options
from pipetutor.system import machine

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_dependency_is_pinned_exactly():
    listed = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", requirement) for requirement in listed)
    assert {r.split("==")[0] for r in PROJECT["dependencies"]} >= set(machine.PINNED)


def test_the_conda_environment_installs_this_project():
    text = (ROOT / "environment.yml").read_text()
    entries = re.findall(r"^\s*- (.+?):?$", text, re.MULTILINE)
    assert entries == ["conda-forge", "python=3.11", "pip", "cxx-compiler", "make", "pip", "-e .[test]"]
    assert PROJECT["requires-python"] == ">=3.11"


def test_public_names_are_documented():
    for name in pipetutor.__all__:
        assert getattr(pipetutor, name).__doc__


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def headings(text):
    """The headings of a markdown text, without those in blocks of code."""
    return re.findall(
        r"^(#+ .+?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_a_notebook_is_stripped_and_has_unique_ids(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))


def test_a_notebook_has_the_parts_of_a_lesson(path, notebook):
    assert course.lesson(path).promise.startswith("You ")
    found = headings(prose(notebook))
    assert [heading for heading in found if heading.startswith("# ")] == found[:1], "one title, at the top"
    sections = [heading for heading in found if heading.startswith("## ")]
    assert sections[0] == "## What you will learn"
    assert sections[-3:] == ["## Recap", "## Exercises", "## Further reading"]
    assert len(sections) >= 6 and len(sections) == len(set(sections))
    tagged = [place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [2], "the parameters follow what you will learn"
    assert notebook.cells[2].source.startswith("# Parameters: papermill replaces these.\n")


def test_a_notebook_says_how_long_it_takes(path, notebook):
    lesson = course.lesson(path)
    fast, slow = lesson.minutes
    assert 1 <= fast < slow
    assert re.findall(r"It takes .*?minutes", prose(notebook)) == [f"It takes {fast} to {slow} minutes"]
    assert isinstance(lesson.smoke, dict) and not course.unfit(path, lesson.smoke)


def test_exercises_have_answers_checks_and_wrong_attempts(path, notebook):
    exercises, problems = course.exercises(notebook)
    assert not problems
    assert [one.name for one in exercises] == [f"{path.name[:2]}-{n}" for n in range(1, len(exercises) + 1)]
    assert 2 <= len(exercises) <= 4
    for number, one in enumerate(exercises, start=1):
        assert one.answer.metadata.nbgrader == ANSWER | {"grade_id": f"{one.name}-answer"}
        assert one.check.metadata.nbgrader == CHECK | {"grade_id": f"{one.name}-check"}
        task = notebook.cells[notebook.cells.index(one.answer) - 1]
        assert task.cell_type == "markdown" and task.source.lstrip().startswith(f"**Exercise {number}.**")


ANSWER = {"grade": False, "locked": False, "schema_version": 3, "solution": True, "task": False}
CHECK = {"grade": True, "locked": True, "points": 1, "schema_version": 3, "solution": False, "task": False}


def test_no_grade_id_is_used_twice():
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    names = [cell.metadata.nbgrader.grade_id for cell in cells if "nbgrader" in cell.metadata]
    assert len(names) == len(set(names))


def test_code_is_imported_and_no_path_is_absolute(notebook):
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert not re.search(r"[\"'](/home|/root|/tmp|/work|~)", code), "absolute path"
    used = re.findall(r"^(?:from|import) pipetutor\.(\w+)", code, re.MULTILINE)
    used += re.findall(r"\w+", " ".join(re.findall(r"^from pipetutor import (.+)$", code, re.MULTILINE)))
    modules = [path for name in used if (path := ROOT / "pipetutor" / f"{name}.py").exists()]
    public = {name for path in modules for name in re.findall(DEFINED, path.read_text(), re.MULTILINE)}
    redefined = (public | set(pipetutor.__all__)) & set(re.findall(DEFINED, code, re.MULTILINE))
    assert not redefined, "names of pipetutor, in modules that this notebook imports"


DEFINED = r"^(?:def|class) ([A-Za-z]\w*)"
PAGES = [*NOTEBOOKS, *sorted((ROOT / "notebooks").glob("*.md")), ROOT / "README.md"]


def read(page):
    return prose(nbformat.read(page, as_version=4)) if page.suffix == ".ipynb" else page.read_text()


def anchors(page, on_github):
    """What a link to a heading of a page ends in: GitHub and JupyterLab do not agree."""
    words = [re.sub(r"[`*_]", "", heading.lstrip("# ")) for heading in headings(read(page))]
    if on_github:
        return [re.sub(r"[^\w-]", "", word.lower().replace(" ", "-")) for word in words]
    return [word.replace(" ", "-") for word in words]


def test_what_a_notebook_names_of_the_code_is_there(notebook):
    _, _, listed = prose(notebook).partition("### In the code")
    named = re.findall(r"`([\w/]+\.py)`", listed.partition("\n#")[0])
    assert named and all((ROOT / name).is_file() for name in named), named


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def taken(code):
    """Yield (module, name) for what code imports from modules of the package, and for what it looks up in them."""
    modules = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipetutor":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if is_module(whole):
                    modules[alias.asname or alias.name] = whole
                else:
                    yield node.module, alias.name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


def code_of(path):
    if path.suffix == ".py":
        return path.read_text()
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return TransformerManager().transform_cell("\n".join(cells))


def test_a_notebook_gives_no_module_of_ours_away_to_a_variable(path):
    tree = ast.parse(code_of(path))
    imported = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    ours = {a.asname or a.name for node in imported for a in node.names if is_module(f"{node.module}.{a.name}")}
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    assert not ours & {name.id for name in names if isinstance(name.ctx, ast.Store)}


MODULES = [path for path in sorted((ROOT / "pipetutor").rglob("*.py")) if path.stem != "__main__"]
USERS = [*NOTEBOOKS, *MODULES, *sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_taken_from_a_room_is_offered_there(path):
    """A private name may only be looked at: inspect.getsource shows how something is done."""
    for module, name in taken(code_of(path)):
        place = ROOT.joinpath(*module.split("."))
        within = path.is_relative_to(place.parent) and place.parent != ROOT / "pipetutor"
        offered = importlib.import_module(module).__all__
        assert within or name.startswith("_") or name in offered, f"{module} does not offer {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_module_offers_is_there(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    assert path.stem == "__init__" or all(hasattr(module, name) for name in module.__all__)


def test_each_mistake_of_the_mutations_can_be_tried():
    assert not [f"{one.file}: {one.old}: {why}" for one in mutations.MUTATIONS if (why := mutations.misfit(one))]


def test_the_house_is_small():
    rules = configparser.ConfigParser()
    rules.read(ROOT / ".importlinter")
    floors = [floor.split("|") for floor in rules["importlinter:contract:floors"]["layers"].split("\n") if floor]
    assert len(floors) <= 7 and sum(map(len, floors)) <= 16


@pytest.mark.parametrize("module", ["pipetutor", "pipetutor.preflight", "pipetutor.schedule.orders"])
def test_what_a_kernel_loads_first_is_light(module):
    script = f"import sys, time; began = time.process_time(); import {module}; print(time.process_time() - began); "
    script += "assert not {'torch', 'deepspeed', 'numpy'} & {*sys.modules}"
    tried = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in range(3)]
    assert not tried[0].returncode, tried[0].stderr
    assert min(float(one.stdout) for one in tried) < 0.3, "seconds of the processor: other work does not count"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", read(page))):
        if link.startswith(("https://", "http://")):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert not path.startswith("/") and target.exists(), f"no file {path}"
        assert target.is_relative_to(ROOT)
        if fragment:
            known = anchors(target, on_github=page.name == "README.md")
            assert fragment in known, f"{link}: no such heading; there are {known}"


TERMS = {
    r"micro ?batch|Micro ?batch": "micro-batch",
    r"[Dd]ata parallel(?!ism)": "data-parallel",
    r"1f1b|1F1b|1f1B": "1F1B",
    r"gpipe|Gpipe|GPIPE": "GPipe",
    r"deepspeed|Deepspeed|Deep ?Speed(?<!DeepSpeed)": "DeepSpeed",
    r"pytorch|Pytorch|Py Torch": "PyTorch",
    r"\$[^$\n]+\$|\\\(": "no formula: the pages show them without MathJax",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_terms_are_spelled_in_one_way(page):
    read_aloud = read(page).replace(options.table(), "")  # whose words stand as they are typed
    text = re.sub(r"^```.*?^```|^    .*?$|<!--.*?-->", "", read_aloud, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|<[^>]+>", " ", text)
    before, heading, reading = text.partition("## Further reading")
    text = before + heading + re.sub(r"\*[^*]+\*", " ", reading)  # a title is spelled as its authors spell it
    for wrong, right in TERMS.items():
        found = re.search(rf".{{0,30}}({wrong}).{{0,30}}", text)
        assert not found, f"{found[0]!r}: {right}"


@pytest.mark.parametrize("page", course.PAGES, ids=lambda page: page.name)
def test_the_map_of_the_course_is_up_to_date(page):
    text = page.read_text()
    assert text == course.with_map(text, course.PAGES[page]), "make map"
    for lesson in course.lessons():
        assert lesson.title in text and lesson.promise in text and lesson.path.name in text


def test_test_files_have_names_of_their_own():
    """Pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
