"""Every figure of the notebooks. Each returns a matplotlib figure that reads well in grey, too."""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipetutor.costs import LayerCosts
from pipetutor.partition import catalog
from pipetutor.records import Run

# Okabe and Ito's colours, told apart by colour-blind readers too; a line style goes with each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xxx")


class Picture(Figure):
    """A figure that a notebook shows once, as the value of its cell, whatever matplotlib's backend is."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=100)
        return content.getvalue()


def plain(axes: Axes) -> None:
    """Take away the frame's upper and right line, which mean nothing."""
    axes.spines[["top", "right"]].set_visible(False)


def sample_images(images: Sequence[tuple[object, str]], columns: int = 10) -> Figure:
    """Show images with their labels.

    Args:
        images: (image, label) pairs; an image is what ``imshow`` takes.
        columns: images in a row.
    """
    rows = -(-len(images) // columns)
    figure = Picture(figsize=(9, 1.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (image, label) in zip(grid.flat, images, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(label, fontsize=9)
    return figure


def losses(runs: Mapping[str, Run], chance: float | None = None) -> Figure:
    """Draw the loss of each step for one or more runs, the later ones dashed so that equal ones both show.

    Args:
        runs: a legend entry for each run.
        chance: the loss of guessing, drawn as a horizontal line.
    """
    figure = Picture(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for index, (name, run) in enumerate(runs.items()):
        steps = range(run.first_step, run.first_step + len(run.losses))
        axes.plot(
            steps,
            run.losses,
            label=name,
            color=COLOURS[index % len(COLOURS)],
            linestyle=STYLES[index % len(STYLES)],
            linewidth=4 if index == 0 and len(runs) > 1 else 2,
            alpha=0.6 if index == 0 and len(runs) > 1 else 1,
        )
    if chance is not None:
        axes.axhline(chance, color="grey", linewidth=1, zorder=0)
        axes.text(1, chance, "guessing", color="dimgrey", fontsize=9, va="bottom")
    axes.set_xlabel("step")
    axes.set_ylabel("mean loss of the train batch")
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(runs) > 1 or chance is not None:
        axes.legend(frameon=False)
    plain(axes)
    return figure


def stages(run: Run) -> Figure:
    """Draw the flat list of layers, with its parameters, and which stage held which.

    Args:
        run: a pipeline run.
    """
    parameters = [layer.parameters / 1e6 for layer in catalog()[run.details["model"]]]
    figure = Picture(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    top = max(parameters) * 1.2
    for stage in range(run.stages):
        low, high = run.parts[stage], run.parts[stage + 1]
        colour = COLOURS[stage % len(COLOURS)]
        axes.axvspan(low - 0.5, high - 0.5, color=colour, alpha=0.12, linewidth=0)
        axes.bar(range(low, high), parameters[low:high], color=colour, hatch=HATCHES[stage % 4], edgecolor="white")
        total = sum(parameters[low:high])
        axes.text((low + high - 1) / 2, top, f"stage {stage}\n{total:.1f} M", ha="center", va="top", color=colour)
        if stage:
            axes.axvline(low - 0.5, color="black", linewidth=1.5, linestyle="--")
    axes.set_xticks(range(len(parameters)))
    labels = [f"{kind} {index:2d}" for index, kind in enumerate(run.layers)]
    axes.set_xticklabels(labels, rotation=90, fontsize=8)
    axes.set_xlim(-0.5, len(parameters) - 0.5)
    axes.set_ylim(0, top * 1.05)
    axes.set_ylabel("million parameters")
    plain(axes)
    return figure


def layer_costs(costs: LayerCosts, bounds: Sequence[int] = ()) -> Figure:
    """Draw how long each layer takes for one micro-batch, forward and backward, and where a cut divides them.

    Args:
        costs: from ``pipetutor.costs.measure``.
        bounds: partition bounds; without them no cut is drawn.
    """
    forward = [1e3 * layer.forward for layer in costs.layers]
    backward = [1e3 * layer.backward for layer in costs.layers]
    count = len(forward)
    figure = Picture(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(count), forward, color="#9BD3F5", edgecolor="white", label="forward")
    axes.bar(range(count), backward, bottom=forward, color=COLOURS[1], edgecolor="white", label="backward")
    top = 1.25 * max(f + b for f, b in zip(forward, backward, strict=True))
    for stage, (low, high) in enumerate(pairwise(bounds)):
        total = sum(forward[low:high]) + sum(backward[low:high])
        axes.text((low + high - 1) / 2, top, f"stage {stage}\n{total:.0f} ms", ha="center", va="top")
        if stage:
            axes.axvline(low - 0.5, color="black", linewidth=1.5, linestyle="--")
    axes.set_xticks(range(count))
    labels = [f"{layer.kind} {index:2d}" for index, layer in enumerate(costs.layers)]
    axes.set_xticklabels(labels, rotation=90, fontsize=8)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(0, top * 1.05)
    axes.set_ylabel("milliseconds a micro-batch")
    axes.legend(frameon=False, fontsize=9, loc="center left")
    plain(axes)
    return figure


def certificate(rows: Sequence[Mapping[str, Any]], tolerance: float) -> Figure:
    """Draw how far each pipeline's gradients are from one process's, and where the controls are.

    Args:
        rows: of a ``pipetutor.certify.Certificate``.
        tolerance: the relative difference above which a row fails, drawn as a line.
    """
    compared = [row for row in rows if "gradient" in row]
    figure = Picture(figsize=(8, 1.2 + 0.26 * len(compared)), layout="constrained")
    axes = figure.subplots()
    least = 1e-9  # where an exact zero is drawn, which a logarithm has no place for
    for place, row in enumerate(compared):
        wrong = bool(row["control"])
        value = row["gradient"]["relative"]
        colour = COLOURS[1 if wrong else 0]
        axes.hlines(place, least, max(value, least), color=colour, linewidth=1)
        axes.plot(
            max(value, least), place, "s" if wrong else "o", color=colour, fillstyle="full" if value else "none"
        )
    axes.axvline(tolerance, color="black", linestyle="--", linewidth=1)
    axes.text(tolerance, -1, " fails beyond", va="center", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(least / 3, 30)
    ticks = [least, 1e-7, 1e-5, 1e-3, 1e-1, 1e1]
    axes.set_xticks(ticks, ["equal to\nthe last bit", *(f"$10^{{{exponent}}}$" for exponent in (-7, -5, -3, -1, 1))])
    axes.set_xlabel("largest difference of a gradient, relative to the largest entry of its tensor")
    names = [
        f"{row['model']}  P={row['stages']} M={row['micro_batches']} R={row['replicas']}"
        + (f"  control: {row['control']}" if row["control"] else "")
        for row in compared
    ]
    axes.set_yticks(range(len(compared)), names, fontsize=9)
    axes.set_ylim(len(compared) - 0.5, -1.5)
    axes.minorticks_off()
    plain(axes)
    return figure
