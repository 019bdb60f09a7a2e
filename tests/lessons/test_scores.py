"""A class's answers to puzzles: kept, collected, graded anew and ranked."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipetutor.lessons.scores import collect, submit
from pipetutor.schedule.orders import build
from pipetutor.schedule.puzzles import PUZZLES
from pipetutor.schedule.text import csv

GPIPE, ONE, NAIVE = (build(name, 3, 4) for name in ("gpipe", "1f1b", "naive"))


def run_of(schedule, directory="runs/one"):
    details = {"schedule": csv(schedule)}
    return SimpleNamespace(directory=directory, losses=[2.0, 1.5], samples_per_second=12.0, details=details)


def test_a_class_is_ranked_by_bubble_and_then_by_memory(tmp_path):
    for name, schedule in {"Ada": NAIVE, "Ben": GPIPE, "Cy": ONE}.items():
        (tmp_path / name).mkdir()
        submit("twelve slots", schedule, name=name, directory=tmp_path / name)
    submit("three in flight", GPIPE, name="Ben", directory=tmp_path / "Ben")
    found = collect(tmp_path)
    assert [(one.puzzle, one.name) for one in found] == [
        ("twelve slots", "Cy"),
        ("twelve slots", "Ben"),
        ("twelve slots", "Ada"),
        ("three in flight", "Ben"),
    ]
    table = str(found)
    assert table.index(PUZZLES["twelve slots"].task) < table.index("Cy") < table.index("Ada")
    assert "3 are allowed" in table.splitlines()[-1]
    done = subprocess.run([sys.executable, "-m", "pipetutor", "scores", tmp_path], capture_output=True, text=True)
    assert done.stdout.strip() == table and done.returncode == 0, done.stderr


def test_the_better_answer_stays_and_evidence_is_added(tmp_path):
    submit("twelve slots", ONE, name="Ada", directory=tmp_path)
    assert not submit("twelve slots", NAIVE, directory=tmp_path).solved
    (entry,) = collect(tmp_path)
    assert entry.name == "Ada" and entry.score.solved and entry.run is None
    submit("twelve slots", ONE, run_of(ONE), directory=tmp_path)
    (entry,) = collect(tmp_path)
    assert "ran 2 steps, 12.0 examples/s" in str(collect(tmp_path)) and entry.run["loss"] == 1.5
    with pytest.raises(ValueError, match="played another schedule"):
        submit("twelve slots", ONE, run_of(GPIPE), directory=tmp_path)


def test_what_is_collected_is_graded_anew(tmp_path):
    submit("twelve slots", NAIVE, name="Ada", directory=tmp_path)
    content = json.loads((tmp_path / "scores.json").read_text())
    content["answers"]["twelve slots"]["solved"] = True
    content["answers"]["three in flight"] = {"schedule": "F0 X0"}
    (tmp_path / "scores.json").write_text(json.dumps(content))
    assert [one.score.solved for one in collect(tmp_path)] == [False, False]
    assert "'X0' is no pass" in str(collect(tmp_path))


SCHEDULE = csv(ONE)
DAMAGED = {
    "no text": (b"\xff\xfe{}", "is no JSON text:"),
    "half": (b'{"answers": {', "is no JSON text, from line 1 on"),
    "deep": (b"[" * 100_000, "is no JSON text:"),
    "list": (b"[]", 'is no file of scores: it has no "answers"'),
    "no answers": (b"{}", 'it has no "answers"'),
    "answers": (b'{"answers": []}', 'it has no "answers"'),
    "answer": (b'{"answers": {"twelve slots": "F0"}}', "the answer to 'twelve slots' has no \"schedule\""),
    "schedule": (b'{"answers": {"twelve slots": {"schedule": 3}}}', "the answer to 'twelve slots' has no"),
    "name": (b'{"name": ["Ada"], "answers": {}}', '"name" is no name in one line'),
    "lines": (b'{"name": "A\\nB", "answers": {}}', '"name" is no name in one line'),
    "run": (
        json.dumps({"answers": {"twelve slots": {"schedule": SCHEDULE, "run": {"steps": 2}}}}).encode(),
        'has no "steps" or no "examples_per_second"',
    ),
}


def test_a_damaged_file_is_named_and_the_others_are_graded(tmp_path):
    for name in ("Ada", "Zoe"):
        (tmp_path / name).mkdir()
        submit("twelve slots", ONE, name=name, directory=tmp_path / name)
    for name, (content, _) in DAMAGED.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_bytes(content)
    (tmp_path / "directory" / "scores.json").mkdir(parents=True)
    done = subprocess.run([sys.executable, "-m", "pipetutor", "scores", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["Ada", "Zoe"]
    said = {line.split(str(tmp_path))[1].split("/")[1]: line for line in done.stderr.splitlines()}
    assert said.keys() == {*DAMAGED, "directory"} and len(done.stderr.splitlines()) == len(said)
    for name, (_, words) in DAMAGED.items():
        path = tmp_path / name / "scores.json"
        assert said[name].startswith(f"pipetutor: left out: {path} is no ") and words in said[name]
        assert said[name].endswith("move it away, or mend it") and "Error" not in said[name]
    assert "cannot read" in said["directory"] and "Is a directory" in said["directory"]
    found = collect(tmp_path)
    assert [one.name for one in found] == ["Ada", "Zoe"] and str(found).count("\nleft out: ") == len(said)


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "nosuch", tmp_path / "file"):
        done = subprocess.run([sys.executable, "-m", "pipetutor", "scores", place], capture_output=True, text=True)
        words = f"pipetutor: {place} is no directory: give the one that holds a directory for each learner\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", words)


def test_bad_input_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="puzzle is 'twelve', but must be one of"):
        submit("twelve", ONE, directory=tmp_path)
    with pytest.raises(ValueError, match="cannot be written"):
        submit("twelve slots", ONE, directory=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"name is 'A\\nB', but must be a string in one line"):
        submit("twelve slots", ONE, name="A\nB", directory=tmp_path)
    assert str(collect(tmp_path)) == "no scores.json with an answer is there"
    (tmp_path / "scores.json").write_text("[]")
    with pytest.raises(ValueError, match="is no file of scores"):
        submit("twelve slots", ONE, directory=tmp_path)
    assert not submit("twelve slots", "nothing", directory=tmp_path).solved, "and nothing is written"
