"""What a step is made of, for one layout beside another."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from pipetutor.figures.picture import PREDICTED, Picture, brief, in_our_style, plain

__all__ = ["step_parts"]

# The parts that ``pipetutor.planner.layout.PARTS`` names, from the bottom up: colour, texture.
LOOKS = {
    "compute": ("#E69F00", ""),
    "recompute": ("#F0E442", "...."),
    "tensor": ("#56B4E9", "////"),
    "messages": ("#009E73", "\\\\\\\\"),
    "all-reduce": ("#444444", "++++"),
    "optimizer": ("#0072B2", "----"),
    "bubble": ("#DDDDDD", ""),
    "waiting": ("#BBBBBB", "xxxx"),
}


@in_our_style
def step_parts(steps: Mapping[str, Mapping[str, float]], label: str = "", predicted: object = None) -> Figure:
    """Draw the seconds of steps, each a pile of its parts; the shortest one has its seconds in bold.

    Args:
        steps: for each layout the seconds of its parts; none where it does not fit.
        label: what the names of the layouts are.
        predicted: which of them a reader took for the shortest; a dashed line goes around it.

    Raises:
        ValueError: none of them fits.
    """
    totals = np.array([sum(parts.values()) for parts in steps.values()])
    if not totals.any():
        raise ValueError(f"no step of {len(steps)} has any parts: give seconds of parts for one at least")
    best = np.where(totals > 0, totals, np.inf).argmin()
    figure = Picture(figsize=(max(4.5, min(9.5, 2.6 + 0.75 * len(steps))), 4.2), layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(len(steps))
    for part, (colour, hatch) in LOOKS.items():
        height = np.array([parts.get(part, 0.0) for parts in steps.values()])
        if height.max() > 1e-3 * totals.max():
            drawn = axes.bar(range(len(steps)), height, 0.75, bottom, label=part, color=colour)
            for bar in drawn:
                bar.set(hatch=hatch, edgecolor="white", linewidth=0.5)
        bottom += height
    for place, total in enumerate(totals):
        if total:
            weight = "bold" if place == best else "normal"
            axes.text(place, total, f"{total:.3g}", ha="center", va="bottom", weight=weight, fontsize=9)
        else:
            axes.text(place, 0, " does not fit", ha="center", va="bottom", rotation=90, color="dimgrey", fontsize=9)
    guess = list(steps).index(str(predicted)) if str(predicted) in steps else None
    if guess is not None:
        axes.axvspan(guess - 0.46, guess + 0.46, 0, 0.995, fill=False, **PREDICTED)
    axes.set_xticks(range(len(steps)), list(steps), fontsize=9)
    axes.set_xlabel(label)
    axes.set_ylabel("seconds a step, mean of the ranks")
    axes.set_ylim(0, 1.1 * totals.max())
    axes.tick_params(axis="x", length=0)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False, fontsize=9)
    plain(axes)
    words = []
    for (name, parts), total in zip(steps.items(), totals, strict=True):
        most = sorted(((seconds, part) for part, seconds in parts.items() if seconds > 0), reverse=True)[:3]
        said = ", ".join(f"{part} {brief(seconds)}" for seconds, part in most)
        words.append(f"{name}: {brief(total)} s, of which {said}" if total else f"{name} does not fit")
    about = f" over {label}" if label else ""
    figure.description = f"Seconds of a step{about}. {'; '.join(words)}. The shortest: {list(steps)[best]}."
    if guess is not None:
        figure.description += f" You predicted {predicted}."
    return figure
