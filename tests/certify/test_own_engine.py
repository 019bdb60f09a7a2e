"""The certificate of a learner's engine: right ones pass, and each wrong one is told what is wrong with it."""

import inspect
import re

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

from pipetutor.certify.own import certify_engine


def gpipe(rank, ranks, stage, inputs, targets):
    count, last, total = len(inputs), ranks - 1, 0.0
    in_flight, sent = {}, []
    for m in range(count):
        x = inputs[m]
        if rank > 0:
            x = torch.empty_like(inputs[m])
            dist.recv(x, rank - 1)
            x.requires_grad_()
        y = stage(x)
        if rank == last:
            y = mse_loss(y, targets[m]) / count
            total += y.item()
        else:
            sent.append(dist.isend(y.detach(), rank + 1))
        in_flight[m] = x, y
    for m in range(count):
        x, y = in_flight.pop(m)
        gradient = None
        if rank < last:
            gradient = torch.empty_like(y)
            dist.recv(gradient, rank + 1)
        y.backward(gradient)
        if rank > 0:
            sent.append(dist.isend(x.grad, rank - 1))
    for sending in sent:
        sending.wait()
    return total


def one_f_one_b(rank, ranks, stage, inputs, targets):
    count, last, total = len(inputs), ranks - 1, torch.zeros(())
    in_flight, sent = {}, []
    ahead = min(last - rank, count)
    for number in range(count + ahead):
        if number < count:
            x = inputs[number]
            if rank > 0:
                x = torch.empty_like(inputs[number])
                dist.recv(x, rank - 1)
                x.requires_grad_()
            y = stage(x)
            if rank == last:
                y = mse_loss(y, targets[number]) / count
                total += y.detach()
            else:
                sent.append(dist.isend(y.detach(), rank + 1))
            in_flight[number] = x, y
        if number >= ahead:
            x, y = in_flight.pop(number - ahead)
            gradient = None
            if rank < last:
                gradient = torch.empty_like(y)
                dist.recv(gradient, rank + 1)
            y.backward(gradient)
            if rank > 0:
                sent.append(dist.isend(x.grad, rank - 1))
    for sending in sent:
        sending.wait()
    return total


@pytest.mark.parametrize("engine, order", [(gpipe, "gpipe"), (one_f_one_b, "1f1b")])
def test_a_right_engine_passes_and_its_controls_are_found_out(engine, order, capsys):
    certificate = certify_engine(engine, order)
    assert certificate.passed, str(certificate)
    sizes = [(row["stages"], row["micro_batches"]) for row in certificate.rows if not row["control"]]
    assert sizes == [(p, m) for p in (1, 2, 3) for m in (1, 2, 4)]
    for row in certificate.rows[:9]:
        assert row["gradient"]["absolute"] == 0.0, "the same operations in the same order"
    assert {row["control"]: row["reason"] for row in certificate.rows[9:]} == {
        "summed": "gradients of stage 0, 1, 2 are 4 times what they should be",
        "scaled": "gradients of stage 0 are 0.25 times what they should be",
        "weights": "stage 2 did not begin with the reference's weights",
    }
    assert certificate.verdict.startswith("PASSED: 9 of 9 pipelines equal one process, 3 of 3 controls were found")


def test_the_order_of_additions_is_nobodys_fault():
    backwards = changed(gpipe, "in_flight.pop(m)", "in_flight.pop(count - 1 - m)")
    certificate = certify_engine(backwards, "gpipe", [2], [4])
    assert certificate.passed and certificate.rows[0]["gradient"]["absolute"] > 0, str(certificate)


def changed(engine, old, new):
    """The engine with a mistake in it, as a learner's, who has it in the notebook alone."""
    source = inspect.getsource(engine)
    assert source.count(old) == 1
    names = {"torch": torch, "dist": dist, "mse_loss": mse_loss, "__name__": "__main__"}
    exec(source.replace(old, new), names)
    return names[engine.__name__]


WRONG = {
    "summed": (
        *(gpipe, None, "targets[m]) / count", "targets[m])"),
        "gradients of stage 0, 1 are 4 times what they should be: they are the sum over 4 micro-batches, and the",
    ),
    "divided twice": (
        *(gpipe, None, "isend(x.grad,", "isend(x.grad / count,"),
        "gradients of stage 0 are 0.25 times what they should be: they are divided by the 4 micro-batches once too",
    ),
    "received gradient ignored": (
        *(gpipe, None, "y.backward(gradient)", "y.backward(torch.ones_like(y))"),
        "those of stage 1 are right: look at the gradient that stage 0 receives",
    ),
    "another's target": (
        *(gpipe, None, "targets[m]", "targets[0]"),
        "gradients of stage 0, 1 are not those of one process, nor a multiple of them: does every micro-batch come",
    ),
    "no gradient wanted": (
        *(gpipe, None, "x.requires_grad_()", "pass"),
        "rank 1 raised TypeError: Invalid function argument. Expected parameter `tensor` of type torch.Tensor but",
    ),
    "no backward pass": (
        *(gpipe, None, "y.backward(gradient)", "rank and y.backward(gradient)"),
        "stage 0 has weights without a gradient: no backward pass came to them",
    ),
    "last loss alone": (
        *(gpipe, None, "total +=", "total ="),
        "the gradients are right, and the loss is not: rank 1 returned 0.245",
    ),
    "no loss": (
        *(gpipe, None, "return total", "return"),
        "rank 1 returned None, and the mean over micro-batches is 1.",
    ),
    "gpipe for 1f1b": (
        *(gpipe, "1f1b", "count, last", "count, last"),
        "rank 0 keeps 4 micro-batches in flight, and 1F1B at most 2 there: its passes are F F F F B B B B, and those "
        "of 1F1B F F B F B F B B",
    ),
    "one at a time": (
        *(one_f_one_b, "gpipe", "last - rank", "last - rank"),
        "rank 0 does not keep to GPipe: its passes are F F B F B F B B, and those of GPipe F F F F B B B B",
    ),
    "never freed": (
        *(one_f_one_b, "1f1b", "in_flight.pop(number - ahead)", "in_flight[number - ahead]"),
        "rank 1 still holds the inputs of 4 micro-batches at once, and 1 is in flight",
    ),
    "weights stepped": (
        *(gpipe, None, "return total", "[p.data.sub_(0.1 * p.grad) for p in stage.parameters()]; return total"),
        "the engine changed the weights of stage 0, 1; it should leave gradients in .grad and nothing else",
    ),
    "weights stepped and gradients cleared": (
        *(
            gpipe,
            None,
            "return total",
            "torch.optim.SGD(stage.parameters(), 1).step(); stage.zero_grad(); return total",
        ),
        "the engine changed the weights of stage 0, 1; it should leave gradients in .grad and nothing else",
    ),
    "gradients kept from step to step": (
        *(gpipe, None, "return total", "stage.more = getattr(stage, 'more', 0) + 1; return total * stage.more"),
        "the first step is right, and the second is not. What does the engine keep",
    ),
}


@pytest.mark.parametrize("engine, order, old, new, reason", WRONG.values(), ids=WRONG)
def test_a_wrong_engine_is_told_why(engine, order, old, new, reason):
    certificate = certify_engine(changed(engine, old, new), order, [2], [4])
    assert not certificate.passed and "FAILED: 0 of 1 pipelines" in certificate.verdict
    assert reason in str(certificate.rows[0]["reason"]), certificate.rows[0]["reason"]
    assert reason in str(certificate)


def test_an_engine_that_hangs_is_a_row_that_says_where():
    stuck = changed(gpipe, "sent.append(dist.isend(y.detach(), rank + 1))", "pass")
    certificate = certify_engine(stuck, None, [1, 2], [4], deadline=3)
    assert [row["equal"] for row in certificate.rows] == [True, False] and len(certificate.skipped) == 3
    reason = certificate.rows[1]["reason"]
    assert reason.startswith("no rank has returned within 3 s") and not certificate.passed
    for rank in (0, 1):
        assert re.search(rf"rank {rank} stands at: .*\(line \d+ of the cell, in gpipe\)", reason)
    said = str(certificate)
    assert said.count("FAILED (1)") == 1 and said.count("skipped (2)") == 3 and "controls were found" not in said
    assert said.count("no rank has returned") == 1
    assert said.count("(2) not tried after a row that could not be computed") == 1


@pytest.mark.parametrize(
    "asked, words",
    [
        ((7,), "function is 7, but must be a function"),
        (
            (lambda stage: None,),
            "with its number, their count and 3 more arguments, which does not fit <lambda>(stage)",
        ),
        ((gpipe, "1F1B"), "unknown order '1F1B': try '1f1b'"),
        (
            (gpipe, None, [7]),
            "ranks is [7], but must be a list, each item a whole number of at least 1 and at most 6",
        ),
        ((gpipe, None, [1], [0]), "micro_batches is [0], but must be a list"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(asked, words, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(ValueError, match=re.escape(words)):
        certify_engine(*asked)
