"""The certificate passes for DeepSpeed as it is, and for no pipeline that computes something else."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import HANGS, processes_of

from pipetutor.certify.certificate import CONTROLS, WAYS, Certificate, _brief, certify
from pipetutor.certify.proof import MARGIN, STEPS, TOLERANCE, Case, compare, judge, model_of

CASE = Case("vgg", stages=2, micro_batches=4, replicas=1)
CONTROL = Case("vgg", stages=2, micro_batches=4, replicas=1, control="summed")


def found(case=CASE, **changed):
    """The row of two ranks that agree with the reference, with some of what they report changed on stage 1."""
    same = {"absolute": 0.0, "relative": 0.0, "factor": 1.0}
    ranks = [
        {"stage": stage, "losses": [2.0] * STEPS} | {part: dict(same) for part in ("initial", "gradient", "final")}
        for stage in (0, 1)
    ]
    for part, value in changed.items():
        ranks[1][part] = value if part == "losses" else same | value
    return judge(case, ranks, [2.0] * STEPS)


def test_equal_is_equal():
    row = found()
    assert row["equal"] and row["reason"] == "" and row["loss"] == {"absolute": 0.0, "relative": 0.0}


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"initial": {"absolute": 1e-9, "relative": 1e-9}}, "stage 1 did not begin with the reference's weights"),
        ({"gradient": {"relative": 3.0, "factor": 4.0}}, "gradients of stage 1 are 4 times what they should be"),
        ({"gradient": {"relative": 1.0}}, "gradients of stage 1 are wrong, and as long as they should be"),
        ({"final": {"relative": 2e-5}}, "the gradients agree, and the updated parameters do not"),
        ({"losses": [2.0, 2.0, 2.1]}, "the parameters agree, and the losses do not"),
        ({"losses": [2.0, 2.0, float("nan")]}, "the parameters agree, and the losses do not"),
    ],
)
def test_what_differs_is_named(changed, reason):
    row = found(**changed)
    assert not row["equal"] and row["reason"] == reason


def test_a_certificate_without_a_pipeline_does_not_pass(tmp_path):
    """All of them skipped for want of memory, say: controls alone prove nothing."""
    control = found(CONTROL, gradient={"relative": 3.0, "factor": 4.0})
    assert Certificate([found(), control], [], tmp_path).passed
    assert not Certificate([control], [], tmp_path).passed


def test_rounding_is_no_difference():
    assert found(gradient={"absolute": 1e-7, "relative": 9e-6}, final={"relative": 9e-6})["equal"]


def test_what_passes_is_a_thousandth_of_what_a_control_must_be_wrong_by():
    """A control that is only just beyond the tolerance shows nothing: rounding may come as far."""
    assert MARGIN == 1000
    for part in ("initial", "gradient", "final"):
        assert not found(**{part: {"relative": 2 * TOLERANCE}})["equal"]
        assert found(CONTROL, **{part: {"relative": 2 * TOLERANCE}})["equal"], "found out by little"
        assert not found(CONTROL, **{part: {"relative": 2 * MARGIN * TOLERANCE}})["equal"]


def test_a_control_that_could_not_run_is_not_found_out(tmp_path):
    crashed = vars(CONTROL) | {"equal": False, "reason": "RuntimeError: rank 0 is gone"}
    certificate = Certificate([found(), crashed], [], tmp_path)
    assert not certificate.passed and "0 of 1 controls were found out" in certificate.verdict
    assert "FAILED (1)" in str(certificate) and "\n(1) RuntimeError: rank 0 is gone\n" in str(certificate)
    assert "FAILED: RuntimeError: rank 0 is gone" in _brief(crashed)


def test_a_table_has_short_rows_and_below_them_each_reason_once():
    wrong, other = found(losses=[2.0, 2.0, 2.1]), found(initial={"absolute": 1e-9, "relative": 1e-9})
    left = vars(CASE) | {"reason": "no memory"}
    said = str(Certificate([found(), wrong, other, wrong], [left, left], None)).splitlines()
    assert max(map(len, said)) <= 110
    assert [line.split("   ")[-1].strip() for line in said[2:8]] == [
        "equal",
        "FAILED (1)",
        "FAILED (2)",
        "FAILED (1)",
        "skipped (3)",
        "skipped (3)",
    ]
    assert said[8:] == [
        "(1) the parameters agree, and the losses do not",
        "(2) stage 1 did not begin with the reference's weights",
        "(3) no memory",
        "FAILED: 1 of 4 pipelines equal one process; 2 rows were skipped",
    ]


def test_the_bar_says_of_a_control_that_it_was_found_out():
    """It is the last thing that the bar says, above a table that passed."""
    control = found(CONTROL, gradient={"relative": 3.0, "factor": 4.0})
    assert _brief(control) == "vgg P=2 M=4 R=1 control summed: found out"
    assert _brief(found()) == "vgg P=2 M=4 R=1 equal"


def test_one_wrong_entry_among_many_tensors_is_found():
    expected = {"a": torch.ones(1000), "b": torch.full((10,), 1e-3)}
    wrong = {name: tensor.clone() for name, tensor in expected.items()}
    wrong["b"][7] += 1e-6
    difference = compare(wrong, expected)
    assert difference.absolute == pytest.approx(1e-6, rel=1e-3) and difference.relative == pytest.approx(
        1e-3, rel=1e-3
    )
    wrong["a"][3] = float("nan")
    assert compare(wrong, expected).relative == float("inf")
    assert compare(expected, wrong).relative == float("inf"), "nor does anything equal a reference that has one"


def test_the_models_begin_the_same_and_have_no_dropout():
    first, second, other = (model_of("vgg", seed).whole for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    images = torch.randn(2, 3, 224, 224)
    assert torch.equal(first(images), second(images)), "dropout is on"


def test_the_pipeline_is_right_and_the_controls_are_not(runs):
    """From a cell; AlexNet and all of the topologies are in the default set, which `make prove` runs."""
    certificate = certify(["vgg"], stages=[1, 3], micro_batches=[1, 4], replicas=[1, 2], ways=[], runs_dir=runs)
    assert certificate.passed, str(certificate)
    assert [row["equal"] for row in certificate.rows] == [True] * 8 + [False] * 3
    for row in certificate.rows[:8]:
        assert row["initial"]["absolute"] == 0.0, "the initial weights depend on the number of stages"
        assert max(row[part]["relative"] for part in ("gradient", "final", "loss")) <= TOLERANCE
        if row["micro_batches"] == 1:
            assert row["gradient"]["absolute"] == 0.0, "one micro-batch a replica: nothing is added in another order"
    by_topology = {(row["micro_batches"], row["replicas"]): row["gradient"] for row in certificate.rows[:8]}
    for row in certificate.rows[:8]:
        same = by_topology[row["micro_batches"], row["replicas"]]
        assert row["gradient"] == same, "the number of stages changes no bit of a gradient"
    reasons = {row["control"]: row["reason"] for row in certificate.rows[8:]}
    assert reasons == {
        "summed": "gradients of stage 0, 1 are 4 times what they should be",
        "scaled": "gradients of stage 0 are 0.25 times what they should be",
        "weights": "stage 1 did not begin with the reference's weights",
    }
    assert json.loads((certificate.directory / "certificate.json").read_text())["passed"] is True
    said = str(certificate)
    assert "PASSED: 8 of 8 pipelines equal one process, 3 of 3 controls were found out" in said
    assert not processes_of(runs.parent)


def test_tied_weights_both_engines_clipping_and_zero_are_right_and_their_controls_are_not(runs):
    certificate = certify(["gpt:layers=2,width=32"], [2], [4], [2], runs_dir=runs)
    assert certificate.passed, str(certificate)
    pipelines = [row for row in certificate.rows if not row["control"]]
    assert [row["way"] for row in pipelines] == ["", *WAYS]
    for row in pipelines:
        assert row["initial"]["absolute"] == 0.0 < row["final"]["absolute"]
        assert max(row[part]["relative"] for part in ("gradient", "final", "loss")) <= TOLERANCE
    reasons = {row["control"]: row["reason"] for row in certificate.rows if row["control"]}
    assert reasons.keys() == CONTROLS.keys()
    assert "gradients of rank 0 are" in reasons["cleared"]
    for control in ("stagewise", "untied"):
        assert "gradients of stage 0 are" in reasons[control] and "gradients of stage 1 are" in reasons[control]
    assert reasons["apart"] == "stage 1 did not begin with the reference's weights"


NOISY = """
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset
    def noisy(): return [nn.Linear(4, 4), lambda x: x + torch.rand_like(x), nn.Linear(4, 2)]
    def short(): return [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)]
    def data(train): return TensorDataset(torch.ones(32, 4), torch.zeros(32, dtype=torch.long))
"""


def test_a_model_that_draws_as_it_computes_is_said_to_have_nothing_to_compare(runs, tmp_path):
    (tmp_path / "noisy_model.py").write_text(textwrap.dedent(NOISY))
    with pytest.raises(ValueError, match=r"noisy_model:noisy is a model of your own: say what it reads, too"):
        certify(["noisy_model:noisy"], runs_dir=runs)
    asked = dict(ways=[], dataset="noisy_model:data", runs_dir=runs)
    certificate = certify(["noisy_model:noisy"], [2], [1], [1], **asked)
    assert not certificate.passed
    assert "draws random numbers as it computes" in certificate.rows[0]["reason"]


def test_a_model_too_short_for_two_stages_a_rank_leaves_those_rows_out(runs, tmp_path):
    (tmp_path / "noisy_model.py").write_text(textwrap.dedent(NOISY))
    ways = ["torch", "torch DualPipeV", "DualPipeV"]
    certificate = certify(["noisy_model:short"], [2], [1], [1], ways=ways, dataset="noisy_model:data", runs_dir=runs)
    assert certificate.passed, str(certificate)
    assert [row["way"] for row in certificate.skipped] == ways[1:]
    assert {row["reason"] for row in certificate.skipped} == {"4 stages, and the model has 3 layers"}
    assert "cleared" not in {row["control"] for row in certificate.rows}


BROKEN = """
    import functools, json, sys
    from pathlib import Path
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from pipetutor.certify import proof
    from pipetutor.certify.proof import Case, prove

    {patch}
    if __name__ == "__main__":
        print(json.dumps(list(prove([{cases}], Path(sys.argv[1])))))
"""


def broken(folder, monkeypatch, patch, cases='Case("vgg", 2, 4, 1), Case("vgg", 1, 1, 2)'):
    """The rows of some cases, with something changed before the ranks are forked."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (folder / "broken.py").write_text(textwrap.dedent(BROKEN).format(patch=patch, cases=cases))
    command = [sys.executable, str(folder / "broken.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "patch, reasons",
    [
        (
            "DeepSpeedEngine.backward = functools.partialmethod(DeepSpeedEngine.backward, scale_wrt_gas=False)",
            ["gradients of stage 0, 1 are 4 times what they should be", ""],
        ),
        (
            "DeepSpeedEngine.allreduce_gradients = lambda self, bucket_size=0: None",
            ["", "gradients of stage 0 are"],
        ),
    ],
    ids=["not averaged over micro-batches", "not averaged over replicas"],
)
def test_it_fails_without_deepspeeds_averaging(tmp_path, monkeypatch, patch, reasons):
    for row, reason in zip(broken(tmp_path, monkeypatch, patch), reasons, strict=True):
        assert row["reason"].startswith(reason) and row["equal"] == (not reason)


CLONE = """model.layers[bounds[1] - 1].register_forward_hook(lambda layer, inputs, x: (x.clone(), 8 * x * x)),
        model.layers[bounds[1]].register_forward_pre_hook(lambda layer, inputs: sum(inputs[0])),"""


@pytest.mark.parametrize(
    "patch", ["proof._clear = lambda engine: None", f"proof._fork = lambda model, bounds: ({CLONE})"]
)
def test_what_deepspeed_sends_may_be_used_if_it_is_not_cleared_or_a_copy_is_sent(tmp_path, monkeypatch, patch):
    """So the control differs for nothing but the fault of its name, and the cure is the documentation's."""
    (row,) = broken(tmp_path, monkeypatch, patch, 'Case("vgg", 2, 4, 1, "cleared", "DualPipeV")')
    assert row["equal"], row["reason"]
    assert max(row[part]["relative"] for part in ("gradient", "final", "loss")) <= TOLERANCE


def test_a_rank_that_fails_is_a_row_that_says_so(tmp_path, monkeypatch):
    rows = broken(tmp_path, monkeypatch, "PipelineEngine.train_batch = lambda self, data_iter: 1 / 0")
    assert [row["equal"] for row in rows] == [False, False]
    assert "ZeroDivisionError: division by zero" in rows[0]["reason"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--models", "alexnot"], "unknown model 'alexnot': try 'alexnet'"),
        (
            ["--ways", "clippd"],
            "ways is ['clippd'], but must be a list, each item one of torch, clipped, torch clipped",
        ),
        (["--models", "gpt:layers=2,width=30"], "width 30 is no multiple of heads 4"),
        (
            ["--stages", "0,1"],
            "stages is [0, 1], but must be a list, each item a whole number of at least 1 and at most 4",
        ),
    ],
)
def test_the_command_refuses_bad_input_with_status_2(arguments, words, tmp_path):
    command = [sys.executable, "-m", "pipetutor.certify", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 2 and words in done.stderr and not list(tmp_path.iterdir())
