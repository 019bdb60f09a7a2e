"""What every figure of the notebooks has in common: its class, its colours, its plain frame.

A figure also has a ``description``, a sentence with the numbers that matter, for a reader who does not see it.
"""

import base64
import html
import inspect
import io
from collections.abc import Callable
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["Picture", "explore"]

# Okabe and Ito's colours, told apart by colour-blind readers too; a line style goes with each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xxx")
# How a figure marks what its reader has predicted.
PREDICTED: dict[str, Any] = {"color": "black", "linewidth": 1.5, "linestyle": "--", "label": "your prediction"}

# Decorates what draws: with matplotlib's own settings, whatever the user's are (LaTeX, black, a missing font).
in_our_style = style.context("default")


class Picture(Figure):
    """A figure that a notebook shows once, as the value of its cell, whatever matplotlib's backend is.

    Attributes:
        description: what it shows, in words; the alternative text of the picture in a notebook and on its web page.
    """

    description = ""

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        content = base64.b64encode(self._repr_png_()).decode()
        return {"image/png": content}, {"image/png": {"alt": self.description}}

    @in_our_style
    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=100)
        return content.getvalue()


def explore(draw: Callable[..., Picture], **ranges: Any) -> Any:
    """Return a control for each argument of a function, with the picture that the function draws of their values.

    ipywidgets' ``interact`` does the same with an Output widget, for which nbclient, and so papermill and nbgrader,
    now and then wait for ever (https://github.com/jupyter/nbclient/issues/312).

    Args:
        draw: draws with the values of the controls; its defaults are shown first.
        ranges: for each argument what ``interact`` takes: (least, most), or a list of choices.

    >>> explore(lambda ranks=2: timelines({"": played("1f1b", ranks, 4)}), ranks=(1, 8))  # doctest: +SKIP
    """
    from ipywidgets import HTML, VBox, interactive

    defaults = inspect.signature(draw).parameters
    controls = {
        name: interactive.widget_from_abbrev(values, defaults[name].default) for name, values in ranges.items()
    }
    shown = HTML()

    def redraw(_: object = None) -> None:
        picture = draw(**{name: control.value for name, control in controls.items()})
        content = base64.b64encode(picture._repr_png_()).decode()
        source, words = f"data:image/png;base64,{content}", html.escape(picture.description)
        shown.value = f'<img style="max-width: 100%" alt="{words}" src="{source}">'

    for name, control in controls.items():
        control.description = name
        control.observe(redraw, "value")
    redraw()
    return VBox([*controls.values(), shown])


def brief(value: float) -> str:
    """Return a number in four digits, or a large one in whole: not as a power of ten."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def plain(axes: Axes) -> None:
    """Take away the frame's upper and right line, which mean nothing."""
    axes.spines[["top", "right"]].set_visible(False)
