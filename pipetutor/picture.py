"""What every figure of the notebooks has in common: its class, its colours, its plain frame.

A figure also has a ``description``, a sentence with the numbers that matter, for a reader who does not see it.
"""

import base64
import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too; a line style goes with each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xxx")


class Picture(Figure):
    """A figure that a notebook shows once, as the value of its cell, whatever matplotlib's backend is.

    Attributes:
        description: what it shows, in words; the alternative text of the picture in a notebook and on its web page.
    """

    description = ""

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        content = base64.b64encode(self._repr_png_()).decode()
        return {"image/png": content}, {"image/png": {"alt": self.description}}

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=100)
        return content.getvalue()


def brief(value: float) -> str:
    """Return a number in four digits, or a large one in whole: not as a power of ten."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def plain(axes: Axes) -> None:
    """Take away the frame's upper and right line, which mean nothing."""
    axes.spines[["top", "right"]].set_visible(False)
