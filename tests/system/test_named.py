"""A name is taken apart, and a function of one's own is found, or it is said in a line why not."""

import sys

import pytest

from pipetutor.system.named import Named


@pytest.mark.parametrize(
    "text, module, name, arguments",
    [
        ("alexnet", "", "alexnet", {}),
        ("gpt:layers=8,width=256", "", "gpt", {"layers": 8, "width": 256}),
        ("a.b:c", "a.b", "c", {}),
        ("a:b:x=0.5,y=relu,z=True", "a", "b", {"x": 0.5, "y": "relu", "z": True}),
    ],
)
def test_a_name_is_taken_apart(text, module, name, arguments):
    found = Named.parse(text)
    assert (found.module, found.name, found.arguments, found.is_own) == (module, name, arguments, bool(module))


@pytest.mark.parametrize(
    "text",
    ["", ":", "a:", ":b", "a:b:c", "a b", "../a:b", "a/b", "gpt:layers", "gpt:=3", "gpt:a=", "gpt:a=1,a=2", "1a"],
)
def test_what_is_no_name_is_refused(text):
    if text == "gpt:layers":  # a function of a module, for all that a name says
        assert Named.parse(text).is_own
        return
    with pytest.raises(ValueError) as refusal:
        Named.parse(text)
    assert "\n" not in str(refusal.value) and repr(text) in str(refusal.value)


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A file beside a notebook, which no test before has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside_me", raising=False)
    (tmp_path / "beside_me.py").write_text(
        "def twice(number, by=2): return by * number\ndef fails(): return 1 / 0\n"
        "word = 'no function'\ndef leaves(): raise SystemExit(3)\n"
    )
    (tmp_path / "statistics.py").write_text("def mean(): pass\n")
    (tmp_path / "broken_file.py").write_text("def f(:\n")
    (tmp_path / "needs_more.py").write_text("import nowhere_to_be_found\n")


def test_a_function_beside_is_called_with_its_arguments(beside):
    assert Named.parse("beside_me:twice").call(3) == 6
    assert Named.parse("beside_me:twice:by=5").call(3) == 15


@pytest.mark.parametrize(
    "text, given, words",
    [
        ("not_there:f", [], r"there is no module not_there: neither .*not_there.py nor an installed one"),
        ("beside_me:f", [], r"beside_me has no function f; it has twice, fails"),
        ("beside_me:twic", [], r"has no function twic; did you mean twice"),
        ("beside_me:word", [], r"has word, but that is a str"),
        ("beside_me.py:twice", [], r"a module is named without .py: beside_me:twice"),
        ("beside_me:leaves", [], r"beside_me.py, line 4: SystemExit: 3"),
        ("statistics:mean", [], r"statistics is .*, which Python takes before .*statistics.py: rename yours"),
        ("__main__:f", [], r"write it into a file"),
        ("beside_me:twice", [], r"twice\(number, by=2\): missing a required argument: 'number'"),
        ("beside_me:twice:to=3", [1], r"got an unexpected keyword argument 'to'"),
        ("beside_me:fails", [], r"beside_me.py, line 2: ZeroDivisionError: division by zero"),
        ("broken_file:f", [], r"broken_file.py, line 1: "),
        ("needs_more:f", [], r"needs_more.py, line 1: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    ],
)
def test_what_cannot_be_called_is_said_in_a_line(beside, text, given, words):
    with pytest.raises(ValueError, match=words) as refusal:
        Named.parse(text).call(*given)
    assert "\n" not in str(refusal.value)


def test_a_digest_changes_with_the_file_and_runs_nothing(beside, tmp_path):
    named = Named.parse("broken_file:f")
    before = named.source_digest()
    (tmp_path / "broken_file.py").write_text("def f(): pass\n")
    assert named.source_digest() != before
    with pytest.raises(ValueError, match="there is no module"):
        Named.parse("not_there.at_all:f").source_digest()
