"""Every par is reached, and by no schedule that the puzzle forbids."""

import pytest

from pipetutor.schedule.orders import build
from pipetutor.schedule.puzzles import PUZZLES, grade
from pipetutor.schedule.text import csv

GPIPE = build("gpipe", 3, 4)
SOLUTIONS = {
    "twelve slots": GPIPE,
    "three in flight": build("1f1b", 3, 4),
    "two chunks": build("interleaved_1f1b", 2, 4, chunks=2),
    "a V": """
        0F0 0F1 0F2 3F0 3B0 3F1 3B1 0B0 0F3 0B1 3F2 3B2 3F3 3B3 0B2 0B3
        1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1 1F2 2F2 1F3 2F3 2B2 1B2 2B3 1B3
    """,
    "beat 1F1B": build("zero_bubble", 3, 5),
    "a slow stage": """
        F0 F1 B0 F2 B1 F3 B2 B3
        F0 F1 B0 B1 F2 F3 B2 B3
        F0 B0 F1 B1 F2 B2 F3 B3
    """,
    "a slow link": """
        F0 F1 F2 F3 B0 B1 B2 B3
        F0 F1 F2 F3 B0 B1 B2 B3
        F0 B0 F1 B1 F2 B2 F3 B3
    """,
}
ATTEMPTS = {
    "twelve slots": ("naive", 24, 1, "12 are possible"),
    "three in flight": ("gpipe", 12, 4, "3 are allowed"),
    "a slow stage": ("1f1b", 18, 3, "2 are allowed"),
    "a slow link": ("1f1b", 20, 3, "16 are possible"),
    "beat 1F1B": ("1f1b", 21, 3, "17 are possible"),
}


@pytest.mark.parametrize("name", PUZZLES)
def test_every_par_is_reached_and_not_beaten_by_the_solution(name):
    puzzle = PUZZLES[name]
    for schedule in (SOLUTIONS[name], csv(SOLUTIONS[name]) if isinstance(SOLUTIONS[name], list) else SOLUTIONS[name]):
        score = grade(puzzle, schedule)
        assert score.solved and score.slots == puzzle.par and str(score).endswith("in flight: solved"), score


@pytest.mark.parametrize("name", ATTEMPTS)
def test_the_numbers_of_the_tasks_are_those_of_known_schedules(name):
    schedule, slots, peak, reason = ATTEMPTS[name]
    score = grade(PUZZLES[name], build(schedule, 3, PUZZLES[name].micro_batches))
    assert (score.slots, score.peak, score.solved, score.reason) == (slots, peak, False, reason)
    assert reason in str(score)
    if schedule == "1f1b":
        assert f"1F1B takes {slots} slots" in PUZZLES[name].task or f"1F1B needs {slots} slots" in PUZZLES[name].task
    if name == "a slow link":
        assert grade(PUZZLES[name], GPIPE).slots == 22 and "GPipe 22" in PUZZLES[name].task


@pytest.mark.parametrize(
    ("name", "schedule", "words"),
    [
        ("twelve slots", "F0 B1 / F0 / F0", ["rank 0 never runs BackwardPass 0"]),
        ("twelve slots", "", ["nothing is placed yet"]),
        ("twelve slots", ".\n.\n.", ["nothing is placed yet"]),
        ("twelve slots", build("interleaved_1f1b", 2, 4, chunks=2), ["stages: it has 4, and 3 are wanted"]),
        ("twelve slots", "nothing", ["'nothing' is no pass"]),
        ("twelve slots", build("gpipe", 3, 5), ["it has 5, and 4 are wanted"]),
        (
            "twelve slots",
            build("gpipe", 2, 4),
            ["are (0, 1), and should be (0, 1, 2)", "2F0, say, is on stage 2", "row of rank 2"],
        ),
        ("two chunks", build("gpipe", 2, 4), ["are (0, 1), and should be (0, 1, 0, 1)", "2F0, say", "row of rank 0"]),
        ("twelve slots", build("zero_bubble", 3, 4), ["splits backward passes"]),
        ("a V", build("zbv", 2, 4), ["splits backward passes"]),
        (
            "a V",
            build("interleaved_1f1b", 2, 4, chunks=2),
            ["are (0, 1, 0, 1), and should be (0, 1, 1, 0)", "row of rank 1"],
        ),
    ],
)
def test_what_is_no_answer_is_told(name, schedule, words):
    score = grade(PUZZLES[name], schedule)
    assert not score.solved and score.slots is None and all(word in str(score) for word in words)


def test_only_a_puzzle_is_graded():
    with pytest.raises(ValueError, match="give a puzzle, such as PUZZLES"):
        grade("twelve slots", GPIPE)
