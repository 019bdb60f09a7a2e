"""A model and a data set of one's own, from a file beside the notebook: trained, evaluated, exported, or refused."""

import textwrap

import pytest
import torch
from conftest import RankFailed, train
from torch import nn

from pipetutor import launch
from pipetutor.costs import measure
from pipetutor.processes.describe import describe, describe_here
from pipetutor.weights import export

MODULE = """
    import os
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    def mlp(hidden=16):
        return [nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, hidden), torch.tanh, nn.Linear(hidden, 3)]

    def points(train):
        generator = torch.Generator().manual_seed(int(train))
        x = torch.randn(64 if train else 21, 8, generator=generator)
        return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())

    def regression():
        return [nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0)], nn.MSELoss()

    def sums(train):
        x, _ = points(train).tensors
        return TensorDataset(x, x.sum(1))

    def misfit(): return [nn.Linear(8, 4), nn.Linear(5, 3)]
    def nothing(train): return []
    def words(train): return ["a", "b"]
    def alone(train): return [torch.zeros(8)]
    def texts(train): return [("abc", 1)]
    def triples(train): return [(torch.zeros(8), 1, 2)]
    def endless(train): return iter([])
    def narrow_test(train): return TensorDataset(torch.zeros(4, 8 if train else 7), torch.zeros(4, dtype=torch.long))
    def class_3(train): return TensorDataset(torch.zeros(4, 8), torch.full((4,), 3))
    def unseeded(train):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(torch.seed() % 1000 + os.getpid()))
        return TensorDataset(x, (x[:, 0] > 0).long())
    def breaks(train): raise OSError("no network")
"""
CONFIG = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}


@pytest.fixture
def own(runs, tmp_path):
    """The name of a module in the working directory, of which nobody has imported another version."""
    name = f"mine_{abs(hash(tmp_path)):x}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    runs.mkdir()
    (runs / "ranks").mkdir()
    (runs / "ranks" / f"{name}.py").write_text(textwrap.dedent(MODULE))
    return name


def test_an_mlp_of_ones_own_is_trained_in_three_stages_evaluated_and_exported(own, runs, tmp_path):
    asked = dict(model=f"{own}:mlp:hidden=12", dataset=f"{own}:points", config=CONFIG, runs_dir=runs)
    run = launch(stages=3, steps=3, eval_every=3, save_every=3, **asked)
    assert run.layers == ["Linear", "ReLU", "Linear", "tanh", "Linear"] and len(run.losses) == 3
    assert run.details["parameters"] == [108, 0, 156, 0, 39]
    state = torch.load(export(run.directory, tmp_path / "mlp.pt"), weights_only=True)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    net.load_state_dict(state)
    x = torch.randn(21, 8, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    assert run.evaluations[-1]["correct"] == (net(x).argmax(1) == labels).sum().item()


def test_a_loss_of_ones_own_is_trained_and_evaluated(own, runs):
    directory = runs / "ranks"
    words = ["--model", f"{own}:regression", "--dataset", f"{own}:sums", "-s", "4", "--eval-every", "2"]
    run = train(directory, *words, stages=2, config=CONFIG)
    assert [one["accuracy"] for one in run.evaluations] == [None, None]
    assert 0 < run.evaluations[1]["loss"] < 30
    with pytest.raises(ValueError, match="labels of this run are no classes"):
        _ = run.accuracy


def test_data_that_is_other_data_on_each_rank_is_refused(own, runs):
    words = ["--model", f"{own}:mlp", "--dataset", f"{own}:unseeded", "-s", "1"]
    with pytest.raises(RankFailed, match="has other labels on each rank: what"):
        train(runs / "ranks", *words, stages=2, config=CONFIG)


def test_costs_of_what_cannot_work_are_refused_in_one_line(own, runs):
    with pytest.raises(ValueError, match=r"layer 1 \(Linear\) does not take") as refusal:
        measure(f"{own}:misfit", 4, 1, dataset=f"{own}:points", runs_dir=runs)
    assert "\n" not in str(refusal.value) and [path.name for path in runs.iterdir()] == ["ranks"]


def test_what_cannot_work_is_said_before_ranks_start(own, runs, monkeypatch):
    monkeypatch.setattr("pipetutor.launcher.watch", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(ValueError, match=r"layer 1 \(Linear\) does not take \(64, 4\) float32 of layer 0") as refusal:
        launch(model=f"{own}:misfit", dataset=f"{own}:points", runs_dir=runs)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in runs.iterdir()] == ["ranks"]


@pytest.mark.parametrize(
    "dataset, words",
    [
        ("nothing", "returns a list for train=True that is empty"),
        ("words", r"whose items are no \(input, label\) pairs, but each a str"),
        ("alone", "but each a Tensor"),
        ("texts", "whose input is a tuple, and must be one tensor or a number"),
        ("breaks", "line 34: OSError: no network"),
        ("mlp", "TypeError: "),
        ("gone", "has no function gone; did you mean alone"),
        ("poins", "has no function poins; did you mean points"),
        ("triples", "but each a tuple of 3"),
        ("endless", "must return a data set with a length"),
        ("narrow_test", r"inputs to train and to test on differ: \(8,\) torch.float32 and \(7,\) torch.float32"),
        ("class_3", "Target 3 is out of bounds"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(own, dataset, words, tmp_path):
    with pytest.raises(ValueError, match=words) as refusal:
        describe_here(f"{own}:mlp", f"{own}:{dataset}", tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "model, dataset, words",
    [
        (
            "alexnett",
            "synthetic",
            r"unknown model 'alexnett': try 'alexnet' .*; or give a function of your own, module:function",
        ),
        ("alexnet:width=3", "synthetic", "alexnet takes no arguments"),
        ("gpt:layer=3", "sums", "unexpected keyword argument 'layer'; a gpt takes layers, width"),
        ("gpt:width=30", "sums", "width 30 is no multiple of heads 4"),
        ("gpt:vocabulary=5", "sums", "sums need a vocabulary of at least 12"),
        ("gpt:length=5", "sums", "sums need a length of at least 8"),
        ("gpt", "synthetic", r"gpt reads tokens, and synthetic holds images: give it sums"),
        ("resnet18", "sums", r"resnet18 reads images, and sums holds tokens: give it synthetic"),
        ("gpt", "imagenet", r"unknown dataset 'imagenet': try .* \(there is synthetic, cifar10, sums\)"),
        ("gpt", "sums:a=1", "sums takes no arguments"),
    ],
)
def test_models_and_data_of_ours_that_are_not_there_or_do_not_fit(model, dataset, words):
    with pytest.raises(ValueError, match=words) as refusal:
        describe(model, dataset)
    assert "\n" not in str(refusal.value)
