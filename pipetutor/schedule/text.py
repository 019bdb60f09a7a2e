"""Schedules as text: as people write them, as ``rules.picture`` draws them, and as torch's compute-only CSV.

Read here is what a learner types, a file, or the rows of torch's own orders; written is the CSV, which
``torch.distributed.pipelining`` loads (``_PipelineScheduleRuntime._load_csv``). Standard library alone.
"""

import inspect
import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from pipetutor.schedule.orders import PASS_OF, Instruction, step_end
from pipetutor.schedule.rules import ScheduleError

__all__ = ["LETTER", "csv", "parse", "streams_of", "word"]

LETTER = {name: letter for letter, name in PASS_OF.items()}
PASS = re.compile(r"(\d{0,6})([FBIW])(\d{1,6})")
OVERLAPPED = re.compile(r"\((\w+);(\w+)\)OVERLAP_F_B")
LABEL = re.compile(r"\s*(?:rank\s*)?\d+\s*:")


def parse(text: str) -> list[list[Instruction]]:
    """Read a schedule: a row for each rank, and in it its passes in their order.

    ``F0`` is the forward pass of micro-batch 0, ``B0`` its backward pass; ``I0`` and ``W0`` are the halves of one,
    for the stage's input and for its weights. ``5F3`` is on stage 5 of the model; without a number the stage is that
    of the row, 0 in the first. A rank holds the stages that stand in its row. Between passes there are blanks or
    commas; a dot or an empty cell is a slot of waiting, and need not be there, for a pass begins as soon as it can.
    A ``B`` with a ``W`` of the same micro-batch and stage in its row is the half, as ``rules.picture`` draws it.
    ``(0F1;1B0)OVERLAP_F_B``, as torch writes two passes at once, is the one and then the other. Small
    letters do as well.

    Args:
        text: rows, ended by line breaks or by "/". A row may begin with ``rank 0:``.

    Returns:
        A stream for each rank: its passes, ``ReduceGrads`` and ``OptimizerStep``; not yet checked.

    Raises:
        ScheduleError: a word is no pass.

    >>> from pipetutor.schedule.rules import picture
    >>> print(picture(parse("F0 F1 B0 B1 / F0 B0 F1 B1")))
    F0 F1 .  B0 .  B1
    .  F0 B0 F1 B1 .
    """
    rows = [row for row in re.split(r"[\n/]", text) if row.strip()]
    if not rows:
        raise ScheduleError("a schedule without a row: write one for each rank, such as F0 F1 B0 B1")
    return [_stream(rank, row) for rank, row in enumerate(rows)]


def _stream(rank: int, row: str) -> list[Instruction]:
    passes: list[tuple[str, int, int]] = []
    words = OVERLAPPED.sub(r"\1 \2", LABEL.sub("", row, count=1))
    for word in re.split(r"[\s,;|]+", words):
        if not word.strip("."):
            continue
        found = PASS.fullmatch(word.upper())
        if not found:
            raise ScheduleError(
                f"rank {rank}: {word[:40]!r} is no pass: write F0, B0, I0 or W0 (forward, backward, the halves of a "
                "backward pass for input and weights) with the number of the micro-batch, and the stage ahead of it "
                "where it is another than the row's, as in 5F0"
            )
        stage, letter, micro_batch = found.groups()
        passes.append((letter, int(stage or rank), int(micro_batch)))
    weights = {(stage, number) for letter, stage, number in passes if letter == "W"}
    inputs = {(stage, number) for letter, stage, number in passes if letter == "I"}
    stream = []
    for letter, stage, number in passes:
        half = letter == "B" and (stage, number) in weights - inputs
        stream.append(Instruction("BackwardInput" if half else PASS_OF[letter], stage, number))
    return [*stream, *step_end(rank)]


def word(one: Instruction, numbered: bool = True) -> str:
    """Write a pass, with the number of its stage or without.

    >>> word(Instruction("BackwardInput", 5, 3)), word(Instruction("ForwardPass", 0, 1), numbered=False)
    ('5I3', 'F1')
    """
    return f"{one.stage if numbered else ''}{LETTER[one.name]}{one.micro_batch}"


def csv(streams: Sequence[Iterable[Instruction]]) -> str:
    r"""Write the passes of a schedule as torch's compute-only CSV: a row for each rank, a cell for each pass.

    >>> csv(parse("F0 B0 / F0 B0"))
    '0F0,0B0\n1F0,1B0\n'
    """
    rows = ([word(one) for one in stream if one.name in LETTER] for stream in streams)
    return "".join(",".join(row) + "\n" for row in rows)


def streams_of(schedule: Any, ranks: int, micro_batches: int) -> list[list[Instruction]]:
    """Return the streams of a schedule that a learner wrote.

    Args:
        schedule: a function of ranks, micro_batches and rank, such as ``orders.gpipe``, that yields the rank's
            instructions, or words such as F0; a text, see ``parse``; or a list with a stream for each rank.
        ranks: P.
        micro_batches: M.

    Raises:
        ScheduleError: it gives something else.
    """
    if isinstance(schedule, str):
        return parse(schedule)
    if callable(schedule):
        name = getattr(schedule, "__name__", "the schedule")
        try:
            inspect.signature(schedule).bind(ranks, micro_batches, 0)
        except (TypeError, ValueError):
            raise ScheduleError(
                f"{name} must be a function of ranks, micro_batches and rank: def {name}(ranks, micro_batches, rank)"
            ) from None
        schedule = [schedule(ranks, micro_batches, rank) for rank in range(ranks)]
    if not isinstance(schedule, Iterable):
        raise ScheduleError(
            f"{schedule!r:.60} is no schedule: give a text such as 'F0 B0 / F0 B0', a function of ranks, "
            "micro_batches and rank, or a list with a stream for each rank"
        )
    return [_checked(rank, stream) for rank, stream in enumerate(schedule)]


def _checked(rank: int, given: Any) -> list[Instruction]:
    """Return a rank's instructions, made of words where there are words."""
    if isinstance(given, str):
        return _stream(rank, given)
    stream = list(given) if isinstance(given, Iterable) else [given]
    if all(isinstance(word, str) for word in stream):
        return _stream(rank, " ".join(stream))
    found = []
    for one in stream:
        if not isinstance(one, Instruction) or not _whole(one.stage) or not _whole(one.micro_batch or 0):
            raise ScheduleError(
                f"rank {rank} has {one!r:.60}: its passes are wanted, words such as 'F0', or each an "
                "Instruction(name, stage, micro_batch)"
            )
        found.append(Instruction(one.name, int(one.stage), None if one.micro_batch is None else int(one.micro_batch)))
    return found


def _whole(number: object) -> bool:
    return isinstance(number, Integral)  # numpy's, too
