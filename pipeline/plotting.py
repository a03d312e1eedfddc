"""One look for all figures. Colours: Okabe and Ito's, which colour-blind readers can tell apart."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.font_manager import FontProperties, findfont, get_font

from pipeline.infra.atomic_io import write_atomically

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
SKY, PINK, AMBER = "#56B4E9", "#CC79A7", "#E69F00"
INK, PALE = "#222222", "#E4E4E4"  # of text; of what is not there
CYCLE = (GREY, BLUE, GREEN, ORANGE, PINK, SKY, AMBER)
MARKERS = ("X", "o", "s", "D", "^", "v", "P")
WIDTH = 9.0  # inches of a figure; shown 900 pixels wide, 9 points are 12 pixels
DPI = 160
Rows = Sequence[Mapping[str, float]]

matplotlib.rcdefaults()  # a reader's matplotlibrc changes nothing: equal bytes everywhere
plt.rcParams.update(
    {
        "figure.dpi": DPI,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "figure.titlesize": 10.5,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.linewidth": 0.7,
        "grid.alpha": 0.3,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.4,
        "lines.markersize": 5,
        "text.parse_math": False,  # a class may be named with dollars
        "svg.hashsalt": "blockdrop",  # else its ids are random
        "image.composite_image": False,  # an SVG holds each photo in its own resolution
    }
)


def headline(figure: plt.Figure, title: str) -> None:
    """The figure's title, over as many lines as it needs; all but one make the figure higher."""
    lines = textwrap.wrap(title, 105)
    figure.suptitle("\n".join(lines))
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, len(lines) - 1))


def fitting(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """The text, or as much of its beginning as is no wider than that, with an ellipsis."""
    font = get_font(findfont(FontProperties(weight=weight)))
    font.set_size(size, 72)

    def width(some: str) -> float:
        font.set_text(some)
        return font.get_width_height()[0] / 64 / 72  # 64 parts of a point, 72 points an inch

    if width(text) <= inches:
        return text
    while text and width(text + "…") > inches:
        text = text[:-1].rstrip()
    return text + "…"


def save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG, and an SVG of the same name beside it, and close the figure.

    The same figure gives the same bytes: neither file has a date or a version in it.
    """
    for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, metadata=metadata)
        write_atomically(path.with_suffix(f".{kind}"), picture.getvalue())
    plt.close(figure)
