"""Every test image counts once, at any number of stages, replicas and images in a micro-batch."""

import pytest
import torch
from conftest import SMALL, train
from tiny import Tiny

from pipetutor import weights
from pipetutor.core.evaluate import share
from pipetutor.core.model import Model, build_model
from pipetutor.data import loader
from pipetutor.data.fetch import DATA_DIR

SIZE = 37


@pytest.mark.parametrize("size", [1, 7, 8, 37])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_every_image_is_in_one_share(size, micro_batch, replicas):
    shares = [share(size, micro_batch, replicas, replica) for replica in range(replicas)]
    assert len({tuple(indices.shape) for indices in shares}) == 1, "replicas of different length wait for ever"
    assert shares[0].shape[1] == micro_batch
    together = torch.cat([indices.flatten() for indices in shares])
    assert sorted(i for i in together.tolist() if i < size) == list(range(size))
    assert len(together) < size + micro_batch * replicas


def test_a_sum_is_right_when_all_of_its_answer_is(runs):
    """Each sum counts once, by its three digits together; the question is not asked for."""
    config = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 32}
    asked = ["--model", "gpt:layers=1,width=32", "--dataset", "sums", "-s", "20", "--save-every", "20"]
    run = train(runs / "a", *asked, "--eval-every", "20", stages=2, config=config)
    weights.export(run.directory, runs / "weights.pt")
    model = build_model("gpt:layers=1,width=32")
    weights.load_weights(model, runs / "weights.pt")
    testset = loader.load("sums", False, -1, DATA_DIR)
    with torch.no_grad():
        logits = model.whole.eval()(testset.inputs)
    asked_for = testset.targets[:, -3:]
    digits = logits.argmax(-1)[:, -3:] == asked_for
    found = run.evaluations[-1]
    assert found["images"] == len(testset) == 5000
    assert abs(found["correct"] - digits.all(1).sum().item()) <= 2, "rounding may decide one"
    assert digits.any(1).sum() > 100 + found["correct"], "many answers are right in part"
    loss = torch.nn.functional.cross_entropy(logits[:, -3:].flatten(0, 1), asked_for.flatten()).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-4)


def few_test_images():
    whole = loader.load

    def cut(dataset, train, *args):
        found = whole(dataset, train, *args)
        if not train:
            found.data, found.targets = found.data[:SIZE], found.targets[:SIZE]
        return found

    loader.load = cut


def test_every_topology_finds_the_number_that_one_process_finds(runs):
    """Nothing divides 37 images: not micro-batches of 4, not 2 replicas."""
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}
    common = dict(config=config, patch=few_test_images)
    first = ["-s", "6", "--dropout", "0", "--save-every", "6", "--eval-every", "3", "--model", "tiny"]
    trained = train(runs / "a", *first, **common)
    weights.export(trained.directory, runs / "weights.pt")
    model = Tiny().eval()
    weights.load_weights(Model.of(model), runs / "weights.pt")
    testset = loader.load("synthetic", False, -1, DATA_DIR)
    with torch.no_grad():
        logits = torch.cat([model(testset[i][0][None]) for i in range(SIZE)])
    labels = torch.tensor(testset.targets[:SIZE])
    correct = int((logits.argmax(1) == labels).sum())
    best, second = logits.topk(2).values.unbind(1)
    unsure = int((best - second < 1e-5).sum())  # rounding, which differs with the images beside it, decides these
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert 0 < correct < SIZE
    assert [e["step"] for e in trained.evaluations] == [3, 6]
    resumed = ["-s", "6", "--model", "tiny", "--resume", runs / "a", "--eval-every", "100"]
    for stages, replicas in ((0, 1), (0, 2), (1, 1), (2, 1), (4, 1), (2, 2)):
        run = train(runs / f"p{stages}r{replicas}", *resumed, stages=stages, replicas=replicas, **common)
        (found,) = run.evaluations
        assert (found["step"], found["images"]) == (6, SIZE), (stages, replicas)
        assert abs(found["correct"] - correct) <= unsure, (stages, replicas)
        torch.testing.assert_close(torch.tensor(found["loss"]), torch.tensor(loss))
        assert run.accuracy == found["correct"] / SIZE
    assert abs(trained.evaluations[-1]["correct"] - correct) <= unsure < SIZE / 4


@pytest.mark.parametrize("stages", [0, 2])
def test_replicas_normalise_by_what_a_checkpoint_keeps(runs, stages):
    """Each has seen images of its own; evaluated are the running statistics of the first."""
    arguments = ["-s", 2, "--model", "tiny_norm", "--dropout", 0, "--eval-every", 2]
    common = dict(config=SMALL, patch=few_test_images)
    two = train(runs / "two", *arguments, "--save-every", 2, stages=stages, replicas=2, **common)
    alone = train(runs / "alone", *arguments, "--resume", runs / "two", **common)
    (found,), (expected,) = two.evaluations, alone.evaluations
    torch.testing.assert_close(torch.tensor(found["loss"]), torch.tensor(expected["loss"]))


@pytest.mark.parametrize("stages", [0, 2])
def test_evaluation_does_not_disturb_training(runs, stages):
    """Dropout is on: evaluating must neither draw its random numbers nor leave the model in another mode."""
    plain = train(runs / "plain", "-s", 3, "--model", "tiny", stages=stages, config=SMALL, patch=few_test_images)
    often = ["-s", 3, "--model", "tiny", "--eval-every", 1]
    watched = train(runs / "watched", *often, stages=stages, config=SMALL, patch=few_test_images)
    assert watched.losses == plain.losses and len(watched.evaluations) == 3


def test_a_run_without_evaluation_has_no_accuracy(runs):
    run = train(runs, "-s", 1, "--model", "tiny")
    with pytest.raises(ValueError, match="eval_every=N"):
        _ = run.accuracy
