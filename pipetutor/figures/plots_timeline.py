"""Figures of time: what every rank did, theory over measurement; where its seconds went; its memory.

Colours are Okabe and Ito's. Each kind has a texture of its own, too, so that the figures can be read in grey.
"""

import itertools
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Stroke, withStroke
from matplotlib.ticker import MaxNLocator

from pipetutor.figures.picture import COLOURS, PREDICTED, STYLES, Picture, brief, in_our_style, plain
from pipetutor.schedule.causes import Gap, Piece, causes, critical_path, path_words
from pipetutor.schedule.orders import PARTNERS
from pipetutor.schedule.rules import LETTERS
from pipetutor.schedule.timeline import CATEGORIES, COLUMNS, KINDS, Timeline
from pipetutor.tracing.trace import Step

__all__ = ["accounting", "activations", "memory", "timelines"]

# What is drawn: its colour, its texture, and how much of a rank's row it fills.
LOOKS = {
    "forward": ("#9BD3F5", "", 1.0),
    "backward": ("#D55E00", "", 1.0),
    "backward, input": ("#E69F00", "", 1.0),
    "backward, weight": ("#F0E442", "....", 1.0),
    "send": ("#009E73", "////", 0.62),
    "receive": ("#CC79A7", "\\\\\\\\", 0.62),
    "wait": ("#DDDDDD", "", 0.24),
    "load": ("#777777", "xxxx", 1.0),
    "reduce": ("#000000", "++++", 1.0),
    "optimizer": ("#0072B2", "----", 1.0),
}
LOOK_OF = {
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "BackwardInput": "backward, input",
    "BackwardWeight": "backward, weight",
    "SendActivation": "send",
    "SendGrad": "send",
    "RecvActivation": "receive",
    "RecvGrad": "receive",
    "AggregateLoss": "receive",
    "LoadMicroBatch": "load",
    "ReduceGrads": "reduce",
    "ReduceTiedGrads": "reduce",
    "OptimizerStep": "optimizer",
}
CHUNK_SHADES = 0.45  # how much darker the last of a rank's chunks is than its first
EXPLAINED = 3  # gaps of a timeline whose causes are written out
LETTERS_ON_A_LINE = 135  # above a timeline


def _require(rows: object) -> None:
    if not isinstance(rows, Mapping) or not rows:
        raise ValueError(
            f"{type(rows).__name__} given, but a dict of titles is needed: {{'measured': timeline}}, say"
        )


@in_our_style
def timelines(
    rows: Mapping[str, Timeline], unit: str = "ms", why: bool = False, predicted: float | None = None
) -> Figure:
    """Draw timelines one above the other on one time axis, each beginning at zero.

    A rank is a row, which is filled while it computes. A thin bar is waiting. Boxes carry the number of their
    micro-batch where it fits; where a rank holds several chunks, the later ones are darker.

    Args:
        rows: a title for each timeline, such as theory and measurement.
        unit: ``ms``, or what a simulated second stands for, such as ``units of time``.
        why: mark the critical path with a line below the boxes that it goes through, number the longest gaps, and
            say above each timeline what they waited for.
        predicted: how long a reader thought that the step would be, in ``unit``; drawn as a dashed line.
    """
    _require(rows)
    gaps = {title: _longest(timeline) if why else [] for title, timeline in rows.items()}
    numbers = itertools.count(1)
    said = {title: [(next(numbers), gap) for gap in found] for title, found in gaps.items()}
    headings = {title: _heading(title, timeline, unit, said[title]) for title, timeline in rows.items()}
    scale = 1e3 if unit == "ms" else 1.0
    longest = max(timeline.seconds for timeline in rows.values()) * scale
    ranks = [timeline.ranks for timeline in rows.values()]
    height = 1.15 + sum(0.42 * count + 0.5 for count in ranks)
    height += 0.165 * sum(heading.count("\n") for heading in headings.values())
    figure = Picture(figsize=(9.5, height), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=[n + 0.6 for n in ranks])
    used: dict[str, None] = {}
    for axes, (title, timeline) in zip(panels.flat, rows.items(), strict=True):
        for rank in range(timeline.ranks):
            _row(axes, timeline, rank, scale, longest, used)
        axes.axvline(timeline.seconds * scale, color="black", linewidth=1)
        if why:
            _mark_path(axes, critical_path(timeline), timeline.begin, scale)
            _number_gaps(axes, said[title], timeline.begin, scale)
        if predicted is not None:
            axes.axvline(predicted, **PREDICTED)
        axes.set_title(headings[title], loc="left", fontsize=9 if why else 10)
        axes.set_yticks(range(timeline.ranks), [f"rank {rank}" for rank in range(timeline.ranks)], fontsize=9)
        axes.set_ylim(timeline.ranks - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        plain(axes)
    panels[-1, 0].set_xlim(0, max(longest, predicted or 0.0) * 1.005)
    panels[-1, 0].set_xlabel("milliseconds" if unit == "ms" else unit)
    lines = [Line2D([], [], color="black", linewidth=2, label="critical path")] if why else []
    if predicted is not None:
        lines.append(Line2D([], [], **PREDICTED))
    _legend(figure, [look for look in LOOKS if look in used], lines)
    words = []
    for title, timeline in rows.items():
        waits = [account["waiting"] / timeline.seconds for account in timeline.accounting()]
        span = " to ".join(dict.fromkeys(f"{share:.0%}" for share in (min(waits), max(waits))))
        words.append(f"{title}: {brief(timeline.seconds * scale)} {unit}, of which a rank waits {span}")
        if why:
            words += [path_words(critical_path(timeline), unit), *(gap.words(unit) for gap in gaps[title])]
    if predicted is not None:
        words.append(f"you predicted {brief(predicted)} {unit}")
    figure.description = f"What each rank does when. {'; '.join(words)}."
    return figure


def _longest(timeline: Timeline) -> list[Gap]:
    """Return the longest gaps that are long enough to be worth a word, in the order of time."""
    waits = [gap for gap in causes(timeline) if gap.seconds > 0.02 * timeline.seconds]
    return sorted(sorted(waits, key=lambda gap: -gap.seconds)[:EXPLAINED], key=lambda gap: gap.begin)


def _heading(title: str, timeline: Timeline, unit: str, said: Sequence[tuple[int, Gap]]) -> str:
    scale = 1e3 if unit == "ms" else 1.0
    lines = [f"{title}: {brief(timeline.seconds * scale)} {unit}"]
    for number, gap in said:
        lines += textwrap.wrap(f"{number}   {gap.words(unit)}", LETTERS_ON_A_LINE, subsequent_indent="     ")
    return "\n".join(lines)


def _mark_path(axes: Axes, path: Sequence[Piece], origin: float, scale: float) -> None:
    """Draw the critical path: below each box that is on it, and from rank to rank where it goes over."""
    points: list[tuple[float, float]] = []
    for piece in path:
        below = piece.rank + 0.43
        if not (points and piece.name in PARTNERS and points[-1][1] != below):  # a message goes over aslant
            points.append(((piece.begin - origin) * scale, below))
        points.append(((piece.end - origin) * scale, below))
    halo = [Stroke(linewidth=4.5, foreground="white"), withStroke(linewidth=2, foreground="black")]
    across, down = zip(*points, strict=True)
    axes.plot(across, down, color="black", linewidth=2, path_effects=halo, solid_joinstyle="round", zorder=4)


def _number_gaps(axes: Axes, said: Sequence[tuple[int, Gap]], origin: float, scale: float) -> None:
    disc = {"boxstyle": "circle,pad=0.2", "facecolor": "black", "edgecolor": "white"}
    for number, gap in said:
        middle = ((gap.begin + gap.end) / 2 - origin) * scale
        axes.text(
            middle, gap.rank, str(number), ha="center", va="center", color="white", fontsize=8, bbox=disc, zorder=5
        )


def _row(axes: Axes, timeline: Timeline, rank: int, scale: float, longest: float, used: dict[str, None]) -> None:
    spans = timeline.of(rank)
    lowest, highest = int(spans["stage"].min()), int(spans["stage"].max())
    begins = (spans["begin"] - timeline.begin) * scale
    ends = (spans["end"] - timeline.begin) * scale
    waits = spans["waiting"] * scale
    waited = waits > longest * 1e-4
    if waited.any():
        _bars(axes, begins[waited], waits[waited], rank, "wait", to_rgb(LOOKS["wait"][0]))
        used["wait"] = None
    for code in np.unique(spans["kind"]):
        for stage in np.unique(spans["stage"]):
            chosen = (spans["kind"] == code) & (spans["stage"] == stage) & (ends - begins - waits > longest * 1e-4)
            if not chosen.any():
                continue
            look = LOOK_OF[KINDS[code]]
            used[look] = None
            depth = CHUNK_SHADES * (stage - lowest) / max(highest - lowest, 1)
            shade = np.array(to_rgb(LOOKS[look][0])) * (1 - depth)
            left = (begins + waits)[chosen]
            _bars(axes, left, ends[chosen] - left, rank, look, shade)
            if CATEGORIES[KINDS[code]] == "compute":
                dark = shade @ (0.3, 0.59, 0.11) < 0.55
                for start, end, number in zip(left, ends[chosen], spans["micro_batch"][chosen], strict=True):
                    room = (end - start) / (0.0075 * longest) - 1  # for so many letters
                    fitting = [name for name in (f"{LETTERS[KINDS[code]]}{number}", str(number)) if len(name) < room]
                    if fitting:
                        place = (start + end) / 2, rank, fitting[0]
                        axes.text(*place, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def _bars(axes: Axes, left: np.ndarray, width: np.ndarray, rank: int, look: str, colour: object) -> None:
    _, hatch, height = LOOKS[look]
    edge = "none" if look == "wait" else "white"
    axes.barh(
        np.full(len(left), rank), width, 0.78 * height, left, color=colour, hatch=hatch, edgecolor=edge, linewidth=0.6
    )


def _legend(figure: Figure, looks: Sequence[str], lines: Sequence[Line2D]) -> None:
    boxes = [Patch(facecolor=LOOKS[k][0], hatch=LOOKS[k][1], edgecolor="white", label=k) for k in looks]
    handles = [*boxes, *lines]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 9 - len(lines)),
        frameon=False,
        fontsize=9,
    )


PARTS = {
    "compute": ("#E69F00", ""),
    "load": ("#777777", "xxxx"),
    "transfer": ("#009E73", "////"),
    "waiting": ("#DDDDDD", ""),
    "reduce": ("#000000", "++++"),
    "optimizer": ("#0072B2", "----"),
    "other": ("#333333", ""),
}


@in_our_style
def accounting(rows: Mapping[str, Timeline]) -> Figure:
    """Draw where each rank's seconds went, the timelines beside each other.

    Args:
        rows: a title for each timeline.
    """
    _require(rows)
    bars = [
        (f"{title}\nrank {rank}", account)
        for rank in range(max(timeline.ranks for timeline in rows.values()))
        for title, timeline in rows.items()
        for account in timeline.accounting()[rank : rank + 1]
    ]
    figure = Picture(figsize=(9.5, 0.9 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(bars))
    for part in COLUMNS:
        width = np.array([account[part] for _, account in bars]) * 1e3
        colour, hatch = PARTS[part]
        if width.max() > 1e-3 * (left + width).max():
            drawn = axes.barh(
                range(len(bars)), width, 0.7, left, color=colour, hatch=hatch, edgecolor="white", label=part
            )
            big = width > 0.05 * sum(bars[0][1].values()) * 1e3
            words = [f"{value:.0f}" if shown else "" for value, shown in zip(width, big, strict=True)]
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.75}
            for text in axes.bar_label(drawn, words, label_type="center", fontsize=8):
                text.set_bbox(box if text.get_text() else None)
        left += width
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("milliseconds of one step")
    figure.legend(loc="outside lower center", ncols=len(COLUMNS), frameon=False, fontsize=9)
    plain(axes)
    figures = [
        f"{1e3 * each['compute']:.0f} ms of compute, {1e3 * each['waiting']:.0f} of waiting" for _, each in bars
    ]
    words = [f"{name}: {said}".replace("\n", ", ") for (name, _), said in zip(bars, figures, strict=True)]
    figure.description = f"Where the time of a step went. {'; '.join(words)}."
    return figure


@in_our_style
def memory(rows: Mapping[str, Step]) -> Figure:
    """Draw what each rank keeps beyond what it had when the step began, the steps beside each other on one scale.

    Args:
        rows: a title for each traced step, such as GPipe and 1F1B.
    """
    _require(rows)
    figure = Picture(figsize=(9.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)
    words = []
    for axes, (title, step) in zip(panels.flat, rows.items(), strict=True):
        for rank, before in enumerate(step.memory):
            spans = step.timeline.of(rank)
            times = np.concatenate([[0.0], (spans["end"] - step.timeline.begin) * 1e3])
            more = np.concatenate([[0.0], (spans["memory"] - before) / 1e6])
            colour, style = COLOURS[rank % len(COLOURS)], STYLES[rank % len(STYLES)]
            words.append(f"{title}, rank {rank}: {brief(more.max())} MB")
            axes.step(times, more, style, where="post", color=colour, label=f"rank {rank}")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("milliseconds")
        plain(axes)
    panels[0, 0].set_ylabel("MB, beyond those at the\nbeginning of the step")
    panels[0, -1].legend(frameon=False, fontsize=9)
    figure.description = f"What each rank keeps over a step, beyond what it began with; at most: {'; '.join(words)}."
    return figure


@in_our_style
def activations(predicted: Mapping[str, Mapping[int, float]], measured: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draw activations over the number of micro-batches: lines for what is predicted, marks for what was measured.

    Args:
        predicted: for each name, such as GPipe, bytes for each M.
        measured: the same names, with the numbers of micro-batches that were run.
    """
    figure = Picture(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    words = []
    for index, (name, line) in enumerate(predicted.items()):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            list(line), [v / 1e6 for v in line.values()], STYLES[index % 4], color=colour, label=f"{name}, predicted"
        )
        found = measured.get(name, {})
        megabytes = [v / 1e6 for v in found.values()]
        pairs = [f"{brief(line[m] / 1e6)} MB with M = {m}" for m in (min(line), max(line))]
        seen = [f"{brief(value)} with {m}" for m, value in zip(found, megabytes, strict=True)]
        words.append(f"{name}, predicted {' to '.join(pairs)}, measured {', '.join(seen) or 'not at all'}")
        axes.scatter(list(found), megabytes, color=colour, marker="os^D"[index % 4], label=f"{name}, measured")
    axes.set_xlabel("micro-batches M")
    axes.set_ylabel("MB of activations on rank 0")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    plain(axes)
    figure.description = f"Activations on rank 0. {'; '.join(words)}."
    return figure
