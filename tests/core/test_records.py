"""What is written in a run directory is JSON, whatever the numbers are."""

import ast
import json
import math
from pathlib import Path

import pytest
from conftest import SMALL, in_ranks

from pipetutor import Run, launch
from pipetutor.certify.certificate import Certificate, _read
from pipetutor.core import records
from pipetutor.costs.table import FILE, LayerCosts
from pipetutor.figures.plots import certificate
from pipetutor.processes.diagnosis import diagnose

ROOT = Path(__file__).parents[2]


def strict(path: Path) -> list:
    """Read a file as JSON, or as lines of JSON, by the letter of its standard."""

    def refuse(word):
        raise AssertionError(f"{path} has {word}, which is no JSON")

    text = path.read_text()
    parts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [json.loads(part, parse_constant=refuse) for part in parts]


def test_a_loss_that_is_no_number_is_told_and_is_null_in_json(runs, monkeypatch, capsys):
    """A learning rate far too high: the run ends, its files are JSON, and the reader hears why it learned nothing."""
    in_ranks(
        runs.parent,
        monkeypatch,
        """
        from pipetutor.data import loader
        whole = loader.load
        def cut(*which):
            found = whole(*which)
            found.data, found.targets = found.data[:16], found.targets[:16]
            return found
        loader.load = cut
        """,
    )
    config = SMALL | {"optimizer": {"type": "SGD", "params": {"lr": 9e14}}}
    options = dict(eval_every=3, trace=True, config=config, runs_dir=runs)
    run = launch(stages=2, steps=3, model="mobilenet_v3_small", **options)
    files = [path for path in run.directory.rglob("*.json*") if path.is_file()]
    assert len(files) >= 7 and all(strict(path) for path in files)
    assert math.isfinite(run.losses[0]) and math.isnan(run.losses[-1]) and math.isnan(run.evaluations[-1]["loss"])
    lost = next(step for step, loss in enumerate(run.losses, start=1) if math.isnan(loss))
    words = f"the loss of step {lost} is no number"
    log = records.log_path(run.directory, 0)
    assert log and log.read_text().count(words) == 1 and log.read_text().count("is no number") == 1
    assert capsys.readouterr().out.count(words) == 1
    said = diagnose(run.directory, {"cancelled": False, "stalled": None, "ended": [], "code": 1})
    assert said.splitlines()[1].startswith(words) and "use a lower learning rate" in said


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_can_be_read_again(tmp_path, loss):
    about = {name: 1 for name in ("stages", "replicas", "train_batch", "micro_batch", "micro_batches")}
    about |= {"command": "", "bounds": [], "layers": [], "result": {"loss": loss, "of": [(loss, 1.5)]}}
    records.write_json(tmp_path / "run.json", about | {"status": "finished"})
    writer = records.StepWriter(tmp_path, 4)
    writer.write(1, 2.5, 0.1)
    writer.write(2, loss, 0.1)
    records.append(tmp_path / "evaluations.jsonl", {"step": 2, "loss": loss})
    records.keep_until(tmp_path, 2)
    (content,) = strict(tmp_path / "run.json")
    assert content["result"] == {"loss": None, "of": [[None, 1.5]]}
    assert [step["loss"] for step in strict(tmp_path / "steps.jsonl")] == [2.5, None]
    run = Run.load(tmp_path)
    assert run.losses[0] == 2.5 and math.isnan(run.losses[1]) and math.isnan(run.evaluations[0]["loss"])


def test_a_damaged_line_hides_neither_a_failure_nor_the_steps_before_it(tmp_path):
    """As a full disk leaves it: who closes the record, explains it or goes on with it reads what comes before."""
    steps = "".join(records.to_json({"step": step, "loss": 2.0}) + "\n" for step in (1, 2, 3))
    (tmp_path / "steps.jsonl").write_text(steps + '{"step": 4, "lo{"step": 5, "loss": 1.0}\n')
    records.close(tmp_path, "failed")
    assert records.read(tmp_path) == {"status": "failed", "done": 3}
    assert records.held(tmp_path) == "status failed, 3 steps"
    report = {"cancelled": False, "stalled": None, "ended": [{"rank": 0, "time": 1.0, "code": 1}], "code": 1}
    assert diagnose(tmp_path, report).startswith("rank 0 failed first")
    records.keep_until(tmp_path, 2)
    assert [step["step"] for step in strict(tmp_path / "steps.jsonl")] == [1, 2]
    (tmp_path / "run.json").write_text('{"status": "fini')
    assert records.held(tmp_path) == "status unknown, for run.json is damaged, 2 steps"


def test_a_difference_without_bound_is_one_in_a_certificate_that_was_read(tmp_path):
    worst = {"absolute": float("inf"), "relative": float("inf")}
    row = {"model": "vgg", "stages": 2, "micro_batches": 4, "replicas": 1, "control": "", "way": "", "equal": False}
    row |= {"reason": "NaN"} | {part: worst for part in ("initial", "gradient", "final", "loss")}
    records.append(tmp_path / "rows.jsonl", row)
    assert strict(tmp_path / "rows.jsonl")
    (read,) = (_read(row) for row in records.read_lines(tmp_path / "rows.jsonl"))
    found = Certificate([read], [], tmp_path)
    assert read == row and not found.passed and "inf" in str(found)
    certificate([read], 1e-5)._repr_png_()


def test_costs_of_one_rank_which_sends_nothing_can_be_read_again(tmp_path):
    fields = {name: 1.0 for name in ("load_images", "load_labels", "copy", "optimizer", "latency")}
    fields |= {"model": "alexnet", "micro_batch": 8, "ranks": 1, "threads": 1, "layers": [], "input_bytes": 1}
    records.write_json(tmp_path / FILE, fields | {"bandwidth": float("inf")})
    assert strict(tmp_path / FILE) and LayerCosts.load(tmp_path).bandwidth == float("inf")


def test_nothing_else_writes_json():
    """Each ``json.dumps`` of the project refuses what is no JSON; ``records.to_json`` makes it null."""
    for path in [*(ROOT / "pipetutor").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                strictly = any(
                    word.arg == "allow_nan" and ast.unparse(word.value) == "False" for word in node.keywords
                )
                assert strictly, f"{path.name}, line {node.lineno}: without allow_nan=False"
