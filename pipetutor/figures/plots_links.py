"""How long a step takes over links of different rates: theory as lines, runs as marks."""

import math
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from pipetutor.figures.picture import COLOURS, STYLES, Picture, brief, in_our_style, plain
from pipetutor.system.links import Link

__all__ = ["step_times"]

MARKS = "os^D"
Times = Mapping[str, Mapping[float, float]]  # what it is -> bits a second -> seconds of a step


@in_our_style
def step_times(predicted: Times, measured: Times) -> Figure:
    """Draw seconds of a step over the rate of the links; both axes are logarithmic.

    Args:
        predicted: for each layout, such as 2 stages, seconds at each of several rates in rising order, all finite.
        measured: the same names, with the rates at which they ran; an infinite one is drawn at the right edge.
    """
    figure = Picture(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    words = []
    rates = sorted({rate for line in predicted.values() for rate in line})
    edge = rates[-1] * 3
    for index, (name, line) in enumerate(predicted.items()):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(list(line), list(line.values()), STYLES[index % len(STYLES)], color=colour, label=f"{name}, theory")
        found = measured.get(name, {})
        if found:
            places = [edge if math.isinf(rate) else rate for rate in found]
            mark = MARKS[index % len(MARKS)]
            axes.plot(places, list(found.values()), mark, color=colour, label=f"{name}, runs")
        ends = [f"{brief(line[rate])} s at {Link(rate)}" for rate in (min(line), max(line))]
        seen = [f"{brief(seconds)} s at {Link(rate)}" for rate, seconds in found.items()]
        words.append(f"{name}: in theory {' and '.join(ends)}, in runs {', '.join(seen) or 'none'}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [10.0**power for power in range(math.ceil(math.log10(rates[0])), math.floor(math.log10(rates[-1])) + 1)]
    unlimited = any(math.isinf(rate) for found in measured.values() for rate in found)
    labels = [f"{Link(rate)}" for rate in ticks] + ["no limit"] * unlimited
    axes.set_xticks([*ticks, *[edge] * unlimited], labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("rate of the link, a second")
    axes.set_ylabel("seconds a step")
    axes.legend(frameon=False, fontsize=9)
    plain(axes)
    figure.description = f"Seconds a step over the rate of the links. {'; '.join(words)}."
    return figure
