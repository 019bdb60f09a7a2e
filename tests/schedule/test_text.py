"""Schedules as people write them: what is read, what is written, and what is no schedule."""

import numpy
import pytest
from random_schedules import accepted
from torch.distributed.pipelining import schedules as runtime

from pipetutor.schedule import orders, text
from pipetutor.schedule.orders import SCHEDULES, Instruction, build
from pipetutor.schedule.rules import ScheduleError, check, picture, placement

every = pytest.mark.parametrize("name", SCHEDULES)


def passes(streams):
    return [[instruction for instruction in stream if instruction.micro_batch is not None] for stream in streams]


@every
def test_what_is_drawn_and_what_is_written_is_read_again(name):
    streams = build(name, 3, *accepted(name, 3, 6, 2))
    for written in (picture(streams), text.csv(streams), text.csv(streams).replace("\n", " / ")):
        assert passes(text.parse(written)) == passes(streams)
    check(text.parse(picture(streams)))


@every
def test_torch_reads_what_is_written(name):
    micro_batches, chunks = accepted(name, 2, 4, 2)
    streams = build(name, 2, micro_batches, chunks)
    holders = placement(streams)
    rows = [[runtime._Action.from_str(cell) for cell in row.split(",")] for row in text.csv(streams).splitlines()]
    held = runtime._validate_schedule(dict(enumerate(rows)), 2, len(holders), micro_batches)
    assert held == dict(enumerate(holders))


def test_words_by_hand():
    wanted = [
        [Instruction("ForwardPass", 0, 0), Instruction("ForwardPass", 2, 0), Instruction("BackwardInput", 2, 0)],
        [Instruction("ForwardPass", 1, 0), Instruction("BackwardPass", 1, 0)],
    ]
    for written in ("F0 2F0 . 2I0\nF0 B0", "rank 0: 0F0 . . 2f0,2i0 / 1: f0 ;B0", ",0F0,2F0,,2I0\r\n1F0,1B0,,\r\n\n"):
        assert passes(text.parse(written)) == wanted
    assert passes(text.parse("0F1,(0F2;1B0)OVERLAP_F_B"))[0] == passes(text.parse("0F1 0F2 1B0"))[0]
    assert [i.name for i in text.parse("F0 B0 F1 B1 W0")[0]][1::2][:2] == ["BackwardInput", "BackwardPass"]


def by_words(ranks, micro_batches, rank):
    yield from (f"{letter}{number}" for letter in "FB" for number in range(micro_batches))


def by_numpy(ranks, micro_batches, rank):
    for name in ("ForwardPass", "BackwardPass"):
        yield from (Instruction(name, rank, number) for number in numpy.arange(micro_batches))
    yield from (Instruction("ReduceGrads", rank), Instruction("OptimizerStep", rank))


def test_functions_lists_and_texts_give_streams():
    wanted = build("gpipe", 2, 3)
    given = [
        orders.gpipe,
        by_words,
        by_numpy,
        wanted,
        text.csv(wanted),
        [list(by_words(2, 3, 0)), "F0 F1 F2 B0 B1 B2"],
    ]
    for schedule in given:
        found = text.streams_of(schedule, 2, 3)
        assert found == wanted
        assert all(type(i.micro_batch) in (int, type(None)) for stream in found for i in stream)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("F0 X0", ["rank 0: 'X0' is no pass", "F0, B0, I0 or W0"]),
        ("F0 B0 / F0 B-1", ["rank 1: 'B-1' is no pass"]),
        ("F9999999", ["no pass"]),
        (" \n ", ["without a row"]),
        (lambda ranks: [], ["must be a function of ranks, micro_batches and rank"]),
        (lambda *_: None, ["rank 0 has None", "words such as 'F0'"]),
        (lambda *_: [("ForwardPass", 0, 0)], ["rank 0 has ('ForwardPass', 0, 0)"]),
        (lambda *_: [Instruction("ForwardPass", 0, "0")], ["rank 0 has Instruction", "micro_batch='0'"]),
        ([0], ["rank 0 has 0"]),
        (None, ["None is no schedule", "a text such as 'F0 B0 / F0 B0'"]),
        (3, ["3 is no schedule"]),
    ],
)
def test_what_is_no_schedule_is_refused_in_a_line(schedule, words):
    with pytest.raises(ScheduleError) as caught:
        text.streams_of(schedule, 2, 2)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
