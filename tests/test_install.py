"""The environment that make makes: whole or made anew, and none but its own Python and packages in it.

Stand-ins take the place of Python's venv and pip, so that nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/bash
[ "$2" = venv ] || exec "{real}" "$@"
environment=${{@: -1}}
[[ "$*" != *--clear* ]] || rm -rf "$environment"
mkdir -p "$environment/bin" && touch "$environment/pyvenv.cfg"
cp in-venv "$environment/bin/python"
if [ -e no-ensurepip ]; then echo "ensurepip is not available"; exit 1; fi
touch "$environment/pip"
"""
IN_VENV = """#!/bin/bash
here=$(dirname "$0")/..
case "$*" in
    *"import pip"*) [ -e "$here/pip" ] ;;
    *"-m pip install"*) env > pip.env; install -m 755 /dev/null "$here/bin/deepspeed"; [ ! -e no-network ] ;;
    *) echo "ran $* at $HOME"; command -v deepspeed ;;
esac
"""
OLD = """#!/bin/bash
[[ "$*" != *version_info* ]]
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path):
    """A clone with a Makefile alone, and a Python that makes environments of nothing."""
    place = tmp_path / "a clone"
    place.mkdir()
    shutil.copy(ROOT / "Makefile", place)
    (place / "pyproject.toml").touch()
    executable(place / "in-venv", IN_VENV)
    executable(tmp_path / "bin" / "python3.11", PYTHON.format(real=sys.executable))
    return place


def make(clone, *words, **variables):
    env = {"PATH": f"{clone.parent / 'bin'}:/usr/bin:/bin", "HOME": str(clone)} | variables
    return subprocess.run(["make", "map", *words], cwd=clone, env=env, capture_output=True, text=True, timeout=60)


def made(said):
    assert said.returncode == 0 and "ran tools/course.py" in said.stdout, said.stdout + said.stderr
    return "-m pip install" in said.stdout


def test_an_environment_is_made_once(clone):
    assert made(make(clone))
    assert not made(make(clone))
    later = (clone / ".venv/.pipetutor-ready").stat().st_mtime + 10
    os.utime(clone / "pyproject.toml", (later, later))
    assert made(make(clone))


def test_its_programs_are_found_wherever_it_is(clone):
    for where in ("there", str(clone.parent / "elsewhere")):
        said = make(clone, f"VENV={where}")
        assert said.stdout.splitlines()[-1] == str(clone / where / "bin" / "deepspeed"), said.stderr


@pytest.mark.parametrize("home", ["home", "nowhere", ""])
def test_a_home_that_cannot_be_written_to_has_a_stand_in(clone, home):
    """JupyterLab does not start without."""
    (clone.parent / "home").mkdir()
    said = make(clone, HOME=str(clone.parent / home) if home else "")
    stand_in = clone / "build" / "home"
    at = clone.parent / "home" if home == "home" else stand_in
    assert made(said) and f"ran tools/course.py at {at}\n" in said.stdout
    assert stand_in.is_dir() == (at == stand_in)


def test_without_ensurepip_it_is_made_once_that_is_there(clone):
    (clone / "no-ensurepip").touch()
    for _ in range(2):
        said = make(clone)
        assert said.returncode and "ensurepip is not available" in said.stdout
    (clone / "no-ensurepip").unlink()
    assert made(make(clone))


def test_an_installation_that_was_interrupted_goes_on(clone):
    (clone / "no-network").touch()
    assert make(clone).returncode
    packages = clone / ".venv/lib/python3.11/site-packages"
    for name, files in {"half-1.0.dist-info": ["METADATA"], "whole-1.0.dist-info": ["METADATA", "RECORD"]}.items():
        (packages / name).mkdir(parents=True)
        for file in files:
            (packages / name / file).touch()
    (clone / "no-network").unlink()
    assert made(make(clone))
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"], "pip takes it for installed"


def test_an_environment_whose_python_is_gone_is_made_anew(clone):
    assert made(make(clone))
    python = clone / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/opt/python that is gone")
    assert made(make(clone))


def test_an_environment_of_somebody_else_is_never_cleared(clone):
    executable(clone / "theirs/bin/python", OLD)
    said = make(clone, "VENV=theirs")
    assert said.returncode and "theirs is an environment without pip, or of a Python before 3.11" in said.stderr
    assert (clone / "theirs/bin/python").exists()


def test_a_python_that_is_too_old_is_refused_in_one_line(clone):
    for name in ("python3.11", "python3"):
        executable(clone.parent / "bin" / name, OLD)
    for words, name in (([], "python3"), (["PYTHON=/opt/python3.9"], "/opt/python3.9")):
        said = make(clone, *words)
        line, *rest = said.stderr.splitlines()
        assert line == f"Python 3.11 or later is needed, and {name} is none: make run PYTHON=PATH"
        assert said.returncode and len(rest) == 1 and "Error 1" in rest[0] and not (clone / ".venv").exists()


def test_what_a_user_has_set_for_other_pythons_does_not_matter(clone):
    theirs = ["PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONHOME", "PYTHONPATH", "PYTHONOPTIMIZE", "PYTHONSAFEPATH"]
    assert made(make(clone, PIP_USER="1", PIP_INDEX_URL="http://here", **dict.fromkeys(theirs, "1")))
    found = dict(line.split("=", 1) for line in (clone / "pip.env").read_text().splitlines() if "=" in line)
    assert not found.keys() & set(theirs)
    assert (found["PIP_USER"], found["PIP_INDEX_URL"]) == ("0", "http://here")


def test_a_folder_called_pipetutor_is_not_taken_for_the_package(tmp_path):
    """As where the clone lies, for whoever starts Python in the directory above it."""
    clone, site = tmp_path / "pipetutor", tmp_path / "site"
    (clone / "pipetutor").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    (clone / "pipetutor" / "__init__.py").touch()
    build = f"from setuptools import build_meta; build_meta.build_editable({str(site)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True, timeout=60)
    (wheel,) = site.glob("*.whl")
    ZipFile(wheel).extractall(site)
    script = f"import site; site.addsitedir({str(site)!r}); import pipetutor; print(pipetutor.__file__)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = [sys.executable, "-Sc", script]
    found = subprocess.run(run, cwd=tmp_path, env=env, check=True, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == str(clone / "pipetutor" / "__init__.py")
