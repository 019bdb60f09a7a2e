"""The board: a schedule that a learner places by hand, in a notebook and on a web page.

board.js draws it and knows its rules. In a notebook anywidget shows it, and what is placed there can be read here. A
web page has it without a kernel: beside the widget goes a plain figure, which the module takes the place of where
scripts run. Every such output holds the module, for cells are run again and taken away; a page of the course is made
with one for all.
"""

import html
import math
import re
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from pipetutor.core.records import to_json
from pipetutor.figures.picture import brief
from pipetutor.figures.plots_timeline import LOOK_OF, LOOKS
from pipetutor.schedule.causes import causes
from pipetutor.schedule.orders import Instruction
from pipetutor.schedule.puzzles import Puzzle
from pipetutor.schedule.rules import PASSES, ScheduleError, check, picture
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.text import LETTER, parse, streams_of, word
from pipetutor.schedule.timeline import KINDS, Timeline

__all__ = ["MOUNT", "Board", "board"]

MODULE = Path(__file__).with_suffix(".js").read_text()
MOUNT = f"{MODULE}\nmountAll();\n"  # in a page: make the boards
MOST = 2000  # passes of a board, spans of a timeline: more of them nobody can read, nor a browser draw at once


class Board(anywidget.AnyWidget):
    """What ``board`` returns.

    Attributes:
        text: the passes that are placed now, a row for each rank; "." where a rank waits, were every pass one slot
            long. ``launch(engine="torch", schedule=...)`` takes it once the schedule is complete.
        game: what ``board.js`` is told.
    """

    _esm = MODULE
    game = traitlets.Dict().tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)

    @property
    def streams(self) -> list[list[Instruction]]:
        """What is placed now: a stream for each rank, ended by its step."""
        if "spans" in self.game:
            raise ValueError("this board shows a timeline, on which nothing is placed")
        return parse(self.text)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict] | None:
        shown = super()._repr_mimebundle_(**kwargs)
        if shown is None:
            return None
        return {**shown[0], "text/html": _page(self.game, self.text)}, shown[1]


def board(
    shown: Any = None,
    *,
    ranks: int | None = None,
    micro_batches: int | None = None,
    placement: Sequence[int] | None = None,
    costs: Costs | None = None,
    cap: int | None = None,
    split: bool = False,
    start: Any = None,
    unit: str = "ms",
) -> Board:
    r"""Return a board, as the value of a cell.

    Args:
        shown: a puzzle; or a timeline, simulated or measured, to look at; or None for a board of the numbers below.
        ranks: the number of ranks.
        micro_batches: the number of micro-batches.
        placement: the rank of each stage of the model; by default rank r has stage r.
        costs: of each stage, in slots; by default one slot for a forward pass, for a backward pass and for a half.
        cap: the micro-batches in flight that a rank may hold, over all its stages; None for any number.
        split: whether backward passes may be placed in halves.
        start: what is placed at first, see ``schedule.text.streams_of``; it need not be complete.
        unit: of a timeline: ``ms``, or what a simulated second stands for, such as ``slots``.

    Raises:
        ValueError: numbers that make no board, or a start that cannot be played.

    >>> board(ranks=3, micro_batches=4, start="F0 F1 / F0 / .").text
    'F0 F1\nF0\n.'
    """
    if isinstance(shown, Timeline):
        return Board(game=_timeline(shown, unit))
    given = {"ranks": ranks, "micro_batches": micro_batches, "placement": placement, "costs": costs, "cap": cap}
    if isinstance(shown, Puzzle):
        named = [name for name, value in {**given, "split": split or None}.items() if value is not None]
        if named:
            raise ValueError(f"the puzzle {shown.name!r} has its own {', '.join(named)}: leave them out")
        game = _game(shown)
    elif shown is not None:
        raise ValueError(f"board({shown!r:.60}): give a puzzle, a timeline, or ranks= and micro_batches=")
    else:
        absent = [f"{name}=" for name in ("ranks", "micro_batches") if given[name] is None]
        if absent:
            also = f": give {absent[0]} as well" if len(absent) == 1 else ""
            raise ValueError(f"board() takes a puzzle, a timeline, or ranks= and micro_batches={also}")
        for name in ("ranks", "micro_batches", "cap"):
            value = given[name]
            if not (isinstance(value, Integral) and value >= 1) and (value is not None or name != "cap"):
                raise ValueError(f"{name} is {value!r}: use a whole number from 1 up")
        game = _game(_free(int(ranks or 0), int(micro_batches or 0), placement, costs, cap, split))
    return Board(game=game, text=_placed(game, start))


def _free(
    ranks: int,
    micro_batches: int,
    placement: Sequence[int] | None,
    costs: Costs | None,
    cap: int | None,
    split: bool,
) -> Puzzle:
    """Return the puzzle without a par that the numbers make."""
    placement = tuple(range(ranks) if placement is None else placement)
    if {*placement} != {*range(ranks)}:
        raise ValueError(f"placement is {placement}: give the rank of each stage, and each of 0 to {ranks - 1} one")
    if costs is None:
        half = (1.0 if split else 0.5,) * len(placement)
        costs = Costs((1.0,) * len(placement), half, half)
    return Puzzle("", "", micro_batches, placement, costs, math.inf, cap, split)


def _game(puzzle: Puzzle) -> dict[str, Any]:
    """Return what the module is told of a puzzle."""
    costs, stages, split = puzzle.costs, len(puzzle.placement), puzzle.split
    if len(costs.forward) != stages:
        raise ValueError(f"costs for {len(costs.forward)} stages, but placement has {stages}: give as many")
    count = stages * puzzle.micro_batches * (3 if split else 2)
    if count > MOST:
        raise ValueError(f"a board of {count} passes: use fewer ranks or micro-batches, for up to {MOST} passes")
    if any(map(any, (costs.optimizer, costs.all_reduce, costs.tied_reduce))):
        raise ValueError(
            "costs of what ends a step (optimizer, all_reduce, tied_reduce), but a board plays passes alone: leave "
            "them out, or simulate the streams and give board() the timeline"
        )
    placement = [int(rank) for rank in puzzle.placement]
    numbers = f"{puzzle.ranks}x{puzzle.micro_batches}"
    if placement != [*range(puzzle.ranks)]:
        numbers += "".join(f"-{rank}" for rank in placement)
    load = costs.load or (0.0,) * stages
    return {
        "name": puzzle.name[:1].upper() + puzzle.name[1:],
        "task": puzzle.task,
        "key": re.sub(r"\W+", "-", puzzle.name.lower()).strip("-") or numbers,  # in links
        "ranks": puzzle.ranks,
        "micro_batches": puzzle.micro_batches,
        "placement": placement,
        "par": puzzle.par if math.isfinite(puzzle.par) else None,
        "cap": puzzle.cap,
        "split": split,
        "costs": {
            "forward": [float(a + b) for a, b in zip(costs.forward, load, strict=True)],
            "backward_input": [*map(float, costs.backward_input)],
            "backward_weight": [*map(float, costs.backward_weight)],
            "latency": float(costs.latency),
            "wire": [float(costs.wire(boundary)) for boundary in range(stages - 1)],
        },
        "looks": {LOOK_OF[name]: LOOKS[LOOK_OF[name]] for name in PASSES},
    }


def _placed(game: dict[str, Any], start: Any) -> str:
    """Return what is placed at first as text, if it can be played."""
    ranks, placement = game["ranks"], game["placement"]
    streams = streams_of(start, ranks, game["micro_batches"]) if start else [[]] * ranks
    rows = [[one for one in stream if one.micro_batch is not None] for stream in streams]
    if len(rows) != ranks:
        raise ValueError(
            f"start has {len(rows)} rows, but the board has {ranks} ranks: give one for each, '.' for none"
        )
    for rank, row in enumerate(rows):
        for one in row:
            known = one.name in LETTER and one.stage < len(placement) and one.micro_batch < game["micro_batches"]
            if not known or placement[one.stage] != rank:
                stages = [stage for stage, holder in enumerate(placement) if holder == rank]
                raise ValueError(
                    f"start: rank {rank} has {one}, but runs passes of the stages {stages} and of the "
                    f"micro-batches 0 to {game['micro_batches'] - 1}"
                )
            if row.count(one) > 1:
                raise ValueError(f"start: rank {rank} has {one} twice: remove one")
    try:
        if any(rows):
            picture(rows, placement)
    except ScheduleError as error:
        raise ValueError(f"start cannot be played: {error}") from None
    return _text(placement, rows)


def _text(placement: Sequence[int], rows: Sequence[Sequence[Instruction]]) -> str:
    numbered = [*placement] != [*range(len(rows))]
    lines = (" ".join(word(one, numbered) for one in row) for row in rows)
    return "\n".join(line or "." for line in lines)


def _timeline(timeline: Timeline, unit: str) -> dict[str, Any]:
    """Return what the module needs to show a timeline, in units of time from its beginning."""
    if len(timeline.spans) > MOST:
        raise ValueError(
            f"a timeline of {len(timeline.spans)} spans: a board shows up to {MOST}; "
            "plots_timeline.timelines draws any number"
        )
    scale = 1e3 if unit == "ms" else 1.0
    stages = {int(rank): {*timeline.of(rank)["stage"].tolist()} for rank in range(timeline.ranks)}
    numbered = any(stages[rank] != {rank} for rank in stages)
    spans = []
    for span in timeline.spans:
        name, batch = KINDS[span["kind"]], int(span["micro_batch"])
        letter = LETTER.get(name)
        spans.append(
            {
                "rank": int(span["rank"]),
                "stage": int(span["stage"]),
                "batch": batch,
                "kind": letter,
                "name": name,
                "look": LOOK_OF[name],
                "label": f"{span['stage'] if numbered else ''}{letter}{batch}" if letter else "",
                "begin": float(span["begin"] - timeline.begin) * scale,
                "end": float(span["end"] - timeline.begin) * scale,
                "waiting": float(span["waiting"]) * scale,
            }
        )
    gaps = [
        {
            "rank": gap.rank,
            "begin": float(gap.begin - timeline.begin) * scale,
            "end": float(gap.end - timeline.begin) * scale,
            "words": f"R{gap.words(unit)[1:]}.",
        }
        for gap in causes(timeline)
        if gap.kind != "transfer"  # which is a span of its own
    ]
    return {
        "name": "",
        "task": "",
        "ranks": timeline.ranks,
        "placement": [],
        "unit": unit,
        "seconds": timeline.seconds * scale,
        "bubble": timeline.bubble,
        "spans": spans,
        "gaps": gaps,
        "looks": LOOKS,
    }


# What a page without scripts shows: in pixels, the room for names and for time, a rank's row, and a box in it.
LABEL, WIDE, ROW, BAR = 56, 840, 36, 28


def _page(game: dict[str, Any], text: str) -> str:
    """Return what a web page shows of a board: a figure with words for it, the game beside it, and the module."""
    boxes, room = _boxes(game, text)
    said = [game["name"], game["task"], f"A row for each of {game['ranks']} ranks, over time."]
    if "spans" in game:
        said.append(f"{brief(game['seconds'])} {game['unit']}, of which the ranks wait {game['bubble']:.0%}.")
    else:
        said.append(f"Placed: {text.replace(chr(10), ' / ')}." if boxes else "Nothing is placed yet.")
    alternative = html.escape(" ".join(filter(None, said)))
    words = "".join(f"<p>{html.escape(part)}</p>" for part in (game["name"], game["task"]) if part)
    state = to_json({**game, "start": text}).replace("<", "\\u003c")
    return (
        f'<div data-pipetutor-board="">{words}{_svg(game["ranks"], boxes, room, alternative)}'
        f'<script type="application/json">{state}</script></div>'
        f'<script type="module" data-pipetutor-module="">{MOUNT}</script>'
    )


Box = tuple[int, float, float, str, str]  # rank, begin, end, look, label


def _boxes(game: dict[str, Any], text: str) -> tuple[list[Box], float]:
    """Return what the figure shows, and the time that it has room for."""
    if "spans" in game:
        return _boxes_of(game["spans"]), game["seconds"]
    room = float(game["par"] or 2 * (game["micro_batches"] + game["ranks"] - 1))
    streams, costs = parse(text), dict(game["costs"])
    try:
        check(streams)
    except ScheduleError:  # a beginning, drawn in slots, as the picture of the schedule has it
        passes = [stream[:-2] for stream in streams]
        boxes = []
        for rank, line in enumerate(picture(passes, game["placement"]).splitlines() if any(passes) else []):
            filled = [float(slot) for slot, cell in enumerate(line.split()) if cell != "."]
            names = _text(game["placement"], passes).splitlines()[rank].split()
            for begin, one, name in zip(filled, passes[rank], names, strict=False):
                boxes.append((rank, begin, begin + 1, LOOK_OF[one.name], name))
    else:
        wire = costs.pop("wire")
        played = simulate(streams, Costs(**costs, message_bytes=wire, bandwidth=1.0))
        boxes = _boxes_of(_timeline(played, "slots")["spans"])
    return boxes, max([room, *(end for _, _, end, _, _ in boxes)])


def _boxes_of(spans: Sequence[dict[str, Any]]) -> list[Box]:
    return [
        (span["rank"], span["begin"] + span["waiting"], span["end"], span["look"], span["label"])
        for span in spans
        if span["end"] > span["begin"] + span["waiting"]
    ]


def _svg(ranks: int, boxes: Sequence[Box], room: float, words: str) -> str:
    """Draw boxes in a row for each rank; letters take the colour of the page, so that it may be light or dark."""
    scale = WIDE / room
    high = ranks * ROW + 4
    parts = []
    for rank in range(ranks):
        top = 2 + rank * ROW
        parts.append(
            f'<text x="0" y="{top + 22}" fill="currentColor">rank {rank}</text>'
            f'<rect x="{LABEL}" y="{top + 2}" width="{WIDE}" height="{ROW - 4}" fill="currentColor" opacity="0.08"/>'
        )
    for rank, begin, end, look, label in boxes:
        left, width, top = LABEL + begin * scale, (end - begin) * scale, 2 + rank * ROW + (ROW - BAR) // 2
        colour = LOOKS[look][0]
        parts.append(
            f'<rect x="{left + 0.5:.1f}" y="{top}" width="{max(width - 1, 0.5):.1f}" height="{BAR}" rx="3" '
            f'fill="{colour}"/>'
        )
        if label and width > 8 * len(label):
            parts.append(
                f'<text x="{left + width / 2:.1f}" y="{top + 19}" text-anchor="middle" fill="#111">{label}</text>'
            )
    return (
        f'<svg role="img" aria-label="{words}" viewBox="0 0 {LABEL + WIDE} {high}" style="max-width: 100%" '
        f'width="{LABEL + WIDE}" font-family="sans-serif" font-size="13">{"".join(parts)}</svg>'
    )
