"""One way into every command, whose flags are the arguments of the function behind it."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import HANGS

from pipetutor.__main__ import COMMANDS
from pipetutor.system.command import call


def run(*words):
    command = [sys.executable, "-m", "pipetutor", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS)


@pytest.mark.parametrize(
    "words, status, begin",
    [
        ([], 2, "pipetutor: which command?\n"),
        (["trian"], 2, "pipetutor: no command is called 'trian'\n"),
        (["--help"], 0, "python -m pipetutor COMMAND, where COMMAND is one of\n"),
    ],
)
def test_without_a_command_there_is_a_list_of_them(words, status, begin):
    done = run(*words)
    assert done.returncode == status and (done.stdout + done.stderr).startswith(begin)
    assert all(f"\n    {name} " in done.stdout + done.stderr for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_page_of_help(name):
    done = run(name, "--help")
    assert done.returncode == 0 and "usage: " in done.stdout and done.stdout.count("show this help") == 1


def test_a_command_ends_as_its_module_does():
    done = run("weights", "nowhere", "a.pt")
    assert done.returncode == 2 and done.stderr.startswith("pipetutor: nowhere holds no checkpoint")


def example(
    place: str | Path,
    numbers: Sequence[int] = (1, 2),
    share: float | None = None,
    *,
    names: Sequence[str] = ("a",),
    more_of_it: bool = False,
) -> dict:
    """Give back what it was given; 100 % of it.

    Args:
        place: where, in ``a`` line
            that goes on.
        numbers: of it.
        share: of all.
        names: more.
        more_of_it: whether.
    """
    return locals()


def test_a_function_is_called_with_what_its_command_line_says(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example", "here"])
    assert call(example, "example") == example("here")
    words = "here --numbers 3,4 --share 0.5 --names b,c --more-of-it"
    monkeypatch.setattr(sys, "argv", ["example", *words.split()])
    assert call(example, "example") == example("here", [3, 4], 0.5, names=["b", "c"], more_of_it=True)


def test_the_help_of_a_command_is_its_functions(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example", "--help"])
    with pytest.raises(SystemExit):
        call(example, "example")
    said = " ".join(capsys.readouterr().out.split())
    assert "Give back what it was given; 100 % of it." in said and "place where, in a line that goes on" in said
    assert "--numbers NUMBERS of it (default 1,2)" in said and "--share SHARE of all --names" in said


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "the following arguments are required: place"),
        ("here --numbers 1,x", "--numbers: '1,x' must be whole numbers and commas: 1,2, say"),
        ("here --number 1", "unrecognized arguments: --number 1; did you mean --numbers? (--help lists every flag)"),
        ("here there", "unrecognized arguments: there (--help"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(line, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example", *line.split()])
    with pytest.raises(ValueError) as refused:
        call(example, "example")
    assert words in str(refused.value) and "\n" not in str(refused.value)
