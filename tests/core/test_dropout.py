"""Replicas hold the same weights and drop activations of their own; a run stays reproducible."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL_SGD, train

from pipetutor.core.checkpoint import find

NET = ["--model", "tiny", "-s", 2]


def note_masks_and_weights():
    """Have each rank note a digest of every mask that dropout draws, and of its weights at the end."""
    from pipetutor.core import loop

    rank, train_steps = loop.dist.get_rank, loop.Loop.run

    def digest(tensor):
        return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()

    def drop(self, values):
        if not self.training:
            return values
        mask = torch.nn.functional.dropout(torch.ones_like(values), self.p)
        with Path(f"masks{rank()}").open("a") as file:
            file.write(json.dumps(digest(mask)) + "\n")
        return values * mask

    def run(self, one_step):
        train_steps(self, one_step)
        weights = {name: digest(t) for name, t in self.engine.state().items() if t.requires_grad}
        Path(f"weights{rank()}").write_text(json.dumps(weights))

    torch.nn.Dropout.forward, loop.Loop.run = drop, run


def noted(directory, stages, replicas):
    """Return the masks and the weights of each replica."""
    names = [list(range(r, max(stages, 1) * replicas, replicas)) for r in range(replicas)]
    masks = [
        [line for rank in ranks for path in directory.glob(f"masks{rank}") for line in path.read_text().splitlines()]
        for ranks in names
    ]
    weights = [
        {k: v for rank in ranks for k, v in json.loads((directory / f"weights{rank}").read_text()).items()}
        for ranks in names
    ]
    return masks, weights


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_each_replica_draws_masks_of_its_own_and_all_keep_the_same_weights(stages, runs):
    common = dict(stages=stages, config=SMALL_SGD, patch=note_masks_and_weights)
    for name, replicas in (("one", 1), ("two", 2), ("again", 2)):
        train(runs / name, *NET, replicas=replicas, **common)
    (alone,), _ = noted(runs / "one", stages, 1)
    masks, weights = noted(runs / "two", stages, 2)
    assert len(masks[0]) == len(masks[1]) == 2 and len(set(masks[0] + masks[1])) == 4, "a mask twice"
    assert masks[0] == alone[:2], "the first replica draws what one process draws"
    assert weights[0] == weights[1] and len(weights[0]) == 10
    assert noted(runs / "again", stages, 2) == (masks, weights)


@pytest.mark.parametrize("stages", [0, 1, 2])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_replicas_draw_masks_of_their_own_after_a_change_of_topology(before, after, stages, runs):
    """And none that was drawn before."""
    common = dict(config=SMALL_SGD | {"train_batch_size": 8}, patch=note_masks_and_weights)
    train(runs / "first", *NET, "--save-every", 2, stages=1, replicas=before, **common)
    then = [*NET[:2], "-s", 3, "--resume", find(runs / "first")]
    train(runs / "then", *then, stages=stages, replicas=after, **common)
    old, (new, weights) = noted(runs / "first", 1, before)[0], noted(runs / "then", stages, after)
    drawn = [mask for of_replica in (*old, *new) for mask in of_replica]
    assert len(drawn) == 2 * 4 + 4 and len(set(drawn)) == len(drawn), "a mask twice"
    assert all(of_replica == weights[0] for of_replica in weights)
