"""What every picture is drawn on: axes, colours, and the ways to a file or a page, without a display.

A ``Figure`` is made without any global state (no pyplot), so this may run in any thread. The same input gives
the same bytes.
"""

import io
import os
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter

from trainer.errors import UserError

INK, FAINT = "#333333", "#d9d9d9"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure of so many inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_axes(figure: Figure, x_label: str, y_label: str) -> Axes:
    """Return the only axes of a figure, with a grid behind."""
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def colours_of(count: int) -> list[Any]:
    """Return distinct colours: the ten of tab10, and for more the hues of a circle."""
    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["hsv"](i / count) for i in range(count)]


def literal(figure: Figure) -> Figure:
    """Make a figure show its texts as they are, and return it: a name with two $ in it is no formula.

    What writes a figure calls this first. The numbers of logarithmic axes are formulas, and stay.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    for axis in figure.findobj(Axis):
        if isinstance(axis.get_major_formatter(), LogFormatter):
            for label in axis.get_ticklabels(which="both"):
                label.set_parse_math(True)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a PNG of 150 dpi and return its path; the folder is made, and the file is complete or absent."""
    path = Path(path)
    if path.suffix != ".png":
        raise UserError(f"figures are PNG files, not {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        literal(figure).savefig(
            unfinished, format="png", dpi=150, metadata={"Software": None}
        )  # no version of matplotlib
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def as_svg(figure: Figure) -> str:
    """Return the figure as an SVG element for a page whose CSS has --grid and --muted and sets the colour.

    Texts stay texts, and take font and colour from the page, so the picture fits light and dark.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        literal(figure).savefig(text, format="svg", transparent=True, dpi=220, metadata={"Date": None})
    svg = text.getvalue()
    before, _, after = svg[svg.index("<svg") :].partition("<metadata>")
    svg = before + after.partition("</metadata>")[2]
    for colour, variable in ((INK, "currentColor"), (FAINT, "var(--grid)"), ("#888888", "var(--muted)")):
        svg = svg.replace(colour, variable)
    return svg
