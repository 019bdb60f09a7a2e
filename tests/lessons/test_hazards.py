"""The hazards of reading data are real, and what the lesson says of them is what happens."""

import pytest
from conftest import processes_of

from pipetutor.lessons import hazards


def test_the_order_of_steps_decides_whether_a_race_does_harm():
    assert [move.did for move in hazards.play("AAAABB")][-3:] == [
        "reads 2,000 labels",
        "looks: the folder is there",
        "reads 2,000 labels",
    ]
    half = hazards.play("AABBB")
    assert [(move.who, move.failed) for move in half] == [("A", False)] * 2 + [
        ("B", False),
        ("B", True),
        ("B", False),
    ]
    assert str(half[3]) == "B fails: FileNotFoundError, No such file or directory: data_batch_1"


def test_turns_are_letters():
    with pytest.raises(ValueError, match="a letter for each step"):
        hazards.play("A B")


def test_behind_the_barrier_one_rank_draws_and_all_read(runs):
    found = hazards.barrier(ranks=3, runs_dir=runs)
    assert [rank["drew"] for rank in found] == [1, 0, 0]
    assert [rank["images"] for rank in found] == [2000] * 3
    assert not processes_of(runs)


def test_a_pipeline_that_drops_nothing_ends_at_the_ragged_micro_batch(runs):
    first, last = hazards.ragged(runs_dir=runs)
    assert last == "step 3: ValueError: Expected input batch_size (8) to match target batch_size (4)."
    assert first.startswith("step 3: ")
