"""Every figure of the notebooks. Each returns a matplotlib figure that reads well in grey, too."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from pipetutor.core.records import Run
from pipetutor.costs.table import LayerCosts
from pipetutor.figures.picture import COLOURS, HATCHES, PREDICTED, STYLES, Picture, brief, in_our_style, plain

__all__ = ["certificate", "layer_costs", "layers", "losses", "passes", "sample_images", "stages"]


@in_our_style
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
    classes = list(dict.fromkeys(label for _, label in images))
    figure.description = f"{len(images)} images, of {len(classes)} kinds: {', '.join(classes)}."
    return figure


@in_our_style
def losses(runs: Mapping[str, Run], chance: float | None = None, predicted: float | None = None) -> Figure:
    """Draw the loss of each step for one or more runs, the later ones dashed so that equal ones both show.

    Args:
        runs: a legend entry for each run.
        chance: the loss of guessing, drawn as a horizontal line.
        predicted: the loss that a reader expected at the beginning, drawn as a dashed one.
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
    if predicted is not None:
        axes.axhline(predicted, zorder=0, **PREDICTED)
    axes.set_xlabel("step")
    axes.set_ylabel("mean loss of the train batch")
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(runs) > 1 or chance is not None or predicted is not None:
        axes.legend(frameon=False)
    plain(axes)
    ends = [f"{name} from {run.losses[0]:.3g} to {run.losses[-1]:.3g}" for name, run in runs.items()]
    ends += [f"guessing: {chance:.3g}"] if chance else []
    ends += [] if predicted is None else [f"you predicted {predicted:.3g}"]
    figure.description = f"Loss of each step: {'; '.join(ends)}."
    return figure


def _along_layers(axes: Axes, kinds: Sequence[str], top: float, unit: str) -> None:
    """Name the layers below bars that reach ``top`` at most."""
    names = [f"{kind} {index:2d}" for index, kind in enumerate(kinds)]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(0, top)
    axes.set_ylabel(unit)
    plain(axes)


@in_our_style
def stages(run: Run) -> Figure:
    """Draw the flat list of layers, with its parameters, and which stage held which.

    Where a rank held several stages, a colour stands for the rank.

    Args:
        run: a pipeline run.
    """
    parameters = [number / 1e6 for number in run.details["parameters"]]
    figure = Picture(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    chunked = len(run.bounds) - 1 > run.stages
    top = max(parameters) * (1.35 if chunked else 1.2)  # room for what is written above the highest bar
    words = []
    for stage, (low, high) in enumerate(pairwise(run.bounds)):
        rank = stage % run.stages
        colour = COLOURS[rank % len(COLOURS)]
        axes.axvspan(low - 0.5, high - 0.5, color=colour, alpha=0.12, linewidth=0)
        axes.bar(range(low, high), parameters[low:high], color=colour, hatch=HATCHES[rank % 4], edgecolor="white")
        total = sum(parameters[low:high])
        where = f" on rank {rank}" if chunked else ""
        words.append(f"stage {stage}{where} holds layers {low} to {high - 1}, {total:.1f} million")
        name = f"stage {stage}\nrank {rank}" if chunked else f"stage {stage}"
        size = 10 if high - low > 1 else 7  # as wide as a single layer
        text = f"{name}\n{total:.1f} M"
        axes.text((low + high - 1) / 2, top, text, ha="center", va="top", color=colour, fontsize=size)
        if stage:
            axes.axvline(low - 0.5, color="black", linewidth=1.5, linestyle="--")
    _along_layers(axes, run.layers, 1.05 * top, "million parameters")
    largest = max(range(len(parameters)), key=parameters.__getitem__)
    figure.description = (
        f"Parameters: {'; '.join(words)}. Layer {largest} alone has {parameters[largest]:.1f} million."
    )
    return figure


def _milliseconds(costs: LayerCosts) -> tuple[list[float], list[float], list[float]]:
    """Return what each layer takes: forward, backward and both."""
    forward = [1e3 * layer.forward for layer in costs.layers]
    backward = [1e3 * layer.backward for layer in costs.layers]
    return forward, backward, [f + b for f, b in zip(forward, backward, strict=True)]


@in_our_style
def layer_costs(costs: LayerCosts, bounds: Sequence[int] = ()) -> Figure:
    """Draw how long each layer takes for one micro-batch, forward and backward, and where a cut divides them.

    Args:
        costs: from ``pipetutor.costs.table.measure``.
        bounds: partition bounds; without them no cut is drawn.
    """
    forward, backward, both = _milliseconds(costs)
    count = len(forward)
    figure = Picture(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(count), forward, color="#9BD3F5", edgecolor="white", label="forward")
    axes.bar(range(count), backward, bottom=forward, color=COLOURS[1], edgecolor="white", label="backward")
    top = 1.25 * max(both)
    slowest = costs.layers[both.index(max(both))].kind
    words = [f"slowest is {slowest} {both.index(max(both))}, with {brief(max(both))} of {brief(sum(both))} ms"]
    for stage, (low, high) in enumerate(pairwise(bounds)):
        total = sum(both[low:high])
        words.append(f"stage {stage} takes {brief(total)} ms")
        axes.text((low + high - 1) / 2, top, f"stage {stage}\n{total:.0f} ms", ha="center", va="top")
        if stage:
            axes.axvline(low - 0.5, color="black", linewidth=1.5, linestyle="--")
    _along_layers(axes, [layer.kind for layer in costs.layers], 1.05 * top, "milliseconds a micro-batch")
    axes.legend(frameon=False, fontsize=9, loc="center left")
    figure.description = f"Time of each layer for one micro-batch: {'; '.join(words)}."
    return figure


@in_our_style
def passes(orders: Sequence[Sequence[Sequence[int]]], micro_batch: int) -> Figure:
    """Draw which image each replica reads when, pass after pass; what fills no micro-batch is crossed out.

    Args:
        orders: for each pass and each replica, the indices that it reads.
        micro_batch: images in a micro-batch.
    """
    longest = max(len(indices) for order in orders for indices in order)
    rows = sum(len(order) for order in orders)
    figure = Picture(figsize=(min(9.5, 1.6 + 0.5 * longest), 0.9 * len(orders) + 0.42 * rows), layout="constrained")
    for axes, (number, order) in zip(
        figure.subplots(len(orders), squeeze=False)[:, 0], enumerate(orders), strict=True
    ):
        for replica, indices in enumerate(order):
            full = len(indices) // micro_batch * micro_batch
            colour = COLOURS[replica % len(COLOURS)]
            for place, index in enumerate(indices):
                kept = place < full
                fill = {"facecolor": colour, "alpha": 0.25} if kept else {"facecolor": "white", "hatch": "xxxx"}
                axes.bar(place, 0.8, 0.92, replica - 0.4, edgecolor="grey", linewidth=0.5, **fill)
                halo = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
                axes.text(place, replica, str(index), ha="center", va="center", bbox=None if kept else halo)
            for start in range(0, full, micro_batch):
                corner, size = (start - 0.48, replica - 0.42), (micro_batch - 0.04, 0.84)
                axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=2))
        axes.set_title(f"pass {number}", fontsize=10, loc="left")
        axes.set_yticks(range(len(order)), [f"replica {replica}" for replica in range(len(order))])
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlim(-0.6, longest - 0.4)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    axes.set_xlabel("time; a box is a micro-batch, a number is an image")
    left = sorted({len(indices) % micro_batch for order in orders for indices in order})
    figure.description = (
        f"{len(orders)} passes over the data by {len(orders[0])} replicas, in micro-batches of {micro_batch}; "
        f"each reads {longest} images at most; so many fill no micro-batch: {' or '.join(map(str, left))}."
    )
    return figure


@in_our_style
def layers(costs: LayerCosts, border: int) -> Figure:
    """Draw, layer by layer and side by side, what is kept, what is sent and what is computed.

    Args:
        costs: from ``pipetutor.costs.table.measure``.
        border: the first layer of the second part of the model; each part's share of the whole is written beside it.
    """
    count = len(costs.layers)
    parameters = [4e-6 * layer.parameters for layer in costs.layers]
    outputs = [1e-6 * layer.output_bytes for layer in costs.layers]
    forward, backward, both = _milliseconds(costs)
    figure = Picture(figsize=(9.5, 0.9 + 0.24 * count), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    left.barh(range(count), parameters, color=COLOURS[0], edgecolor="white")
    middle.barh(range(count), outputs, color=COLOURS[2], hatch=HATCHES[2], edgecolor="white")
    right.barh(range(count), forward, color="#9BD3F5", edgecolor="white", label="forward")
    right.barh(
        range(count), backward, left=forward, color=COLOURS[1], hatch="///", edgecolor="white", label="backward"
    )
    titles = "weights, MB", "output, MB", "time, ms"
    for axes, title, values in zip((left, middle, right), titles, (parameters, outputs, both), strict=True):
        axes.set_title(f"{title} a micro-batch" if axes is not left else title, fontsize=10)
        axes.axhline(border - 0.5, color="black", linewidth=1, linestyle="--")
        for low, high in ((0, border), (border, count)):
            share, place = sum(values[low:high]) / sum(values), (low + high - 1) / 2
            axes.text(0.97, place, f"{share:.0%}", transform=axes.get_yaxis_transform(), ha="right", fontsize=15)
        axes.set_xlim(0, 1.3 * max(values))
        plain(axes)
    names = [f"{layer.kind} {index:2d}" for index, layer in enumerate(costs.layers)]
    left.set_yticks(range(count), names, fontsize=8)
    left.set_ylim(count - 0.4, -0.6)
    right.legend(frameon=False, fontsize=9, loc="lower right")
    words = [
        f"{sum(values[:border]) / sum(values):.0%} of the {name}"
        for name, values in (("weights", parameters), ("outputs", outputs), ("time", both))
    ]
    figure.description = f"Layers 0 to {border - 1} of {count} have {', '.join(words)}."
    return figure


@in_our_style
def certificate(rows: Sequence[Mapping[str, Any]], tolerance: float) -> Figure:
    """Draw how far each pipeline's gradients are from one process's, and where the controls are.

    Args:
        rows: of a ``pipetutor.certify.certificate.Certificate``.
        tolerance: the relative difference above which a row fails, drawn as a line.
    """
    compared = [row for row in rows if "gradient" in row]
    figure = Picture(figsize=(8, 1.2 + 0.26 * len(compared)), layout="constrained")
    axes = figure.subplots()
    least = 1e-9  # where an exact zero is drawn, which a logarithm has no place for
    for place, row in enumerate(compared):
        control = bool(row["control"])
        value = row["gradient"]["relative"]
        colour = COLOURS[1 if control else 0]
        axes.hlines(place, least, max(value, least), color=colour, linewidth=1)
        axes.plot(
            max(value, least), place, "s" if control else "o", color=colour, fillstyle="full" if value else "none"
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
        + (f"  {row['way']}" if row["way"] else "")
        + (f"  control: {row['control']}" if row["control"] else "")
        for row in compared
    ]
    axes.set_yticks(range(len(compared)), names, fontsize=9)
    axes.set_ylim(len(compared) - 0.5, -1.5)
    axes.minorticks_off()
    plain(axes)
    right, wrong = ([r["gradient"]["relative"] for r in compared if bool(r["control"]) is c] for c in (False, True))
    words = [f"Largest relative difference of a gradient in {len(right)} pipelines: {max(right, default=0):.1e}"]
    words += [f"smallest in {len(wrong)} that are wrong on purpose: {min(wrong):.1e}"] if wrong else []
    figure.description = f"{'; '.join(words)}; above {tolerance:.0e} a pipeline fails."
    return figure
