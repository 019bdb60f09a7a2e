"""The project's own files agree with one another."""

import re
import tomllib
from pathlib import Path

import nbformat
import pytest

import pipetutor
from pipetutor import machine

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


def test_modules_are_small_and_public_names_are_documented():
    for path in (ROOT / "pipetutor").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 320, path.name
    for name in pipetutor.__all__:
        assert getattr(pipetutor, name).__doc__


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_follows_the_rules(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert all(not c.get("outputs") for c in notebook.cells)
    source = "\n".join(c.source for c in notebook.cells)
    for heading in ("What you will learn", "Recap", "Exercises", "Further reading"):
        assert f"## {heading}" in source
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    assert not re.search(r"[\"'](/home|/root|/tmp|/work|~)", code), "absolute path"
    for name in pipetutor.__all__:
        assert not re.search(rf"^(def|class) {name}\b", code, re.MULTILINE)
