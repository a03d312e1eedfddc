"""Labels beside the points that they name: none on another one, and few on what is drawn.

Shapes: L labels, P places for each, N drawn points.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.text import Annotation
from numpy.typing import NDArray

from pipeline.plotting import GREY, INK

SIDES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
DISTANCES = (1, 4, 8, 13, 19, 27, 37, 49, 63)
PLACES = np.array([(distance, *side) for distance in DISTANCES for side in SIDES])  # [P, 3] points
FAR = 13  # from here on a line joins a label to its point
MARKER = 10  # pixels of a marker's radius
SIZE = 8.5  # points of the letters
PADDING = 2  # pixels around a label
# what it costs to be there, where to be on a point of a line costs 1
ON_MARKER, ON_ANOTHER, OUTSIDE = 20, 100, 1000
ROUNDS = 4  # of moving each label away from where all others are


class Label(NamedTuple):
    """What is said of a point, in units of the axes."""

    x: float
    y: float
    text: str
    radius: float = 3.0  # points, of its marker
    size: float = SIZE
    colour: str = INK


def place(ax: Axes, labels: Sequence[Label]) -> None:
    """Write labels where least is in the way; everything else has to be drawn before.

    Each label takes the best of its places under those of the others, several times around, so the same
    figure has the same labels.
    """
    if not labels:
        return
    figure: Any = ax.get_figure(root=True)
    figure.draw_without_rendering()  # from here on it is known where everything is
    texts = [_write(ax, label) for label in labels]
    sizes = np.array([text.get_window_extent().size for text in texts]) + 2 * PADDING  # [L, 2]
    lows, highs = _boxes(ax, labels, sizes)
    costs = _costs(ax, lows, highs)  # [L, P]
    chosen = costs.argmin(axis=1)  # [L]
    rows = np.arange(len(labels))
    for _ in range(ROUNDS):
        for row in rows:
            others = rows != row
            low, high = lows[rows, chosen][others], highs[rows, chosen][others]  # [L - 1, 2]
            apart = (lows[row, :, None] >= high) | (highs[row, :, None] <= low)  # [P, L - 1, 2]
            overlaps = (~apart.any(axis=-1)).sum(axis=-1)
            chosen[row] = (costs[row] + ON_ANOTHER * overlaps).argmin()
    for label, text, (distance, right, up) in zip(labels, texts, PLACES[chosen], strict=True):
        away = distance + label.radius
        text.set(position=(away * right, away * up))
        text.set(ha=("right", "center", "left")[right + 1], va=("top", "center", "bottom")[up + 1])
        if distance >= FAR:
            _join(ax, label, text)


def _write(ax: Axes, label: Label) -> Annotation:
    text = ax.annotate(
        label.text, label[:2], (0, 0), textcoords="offset points", size=label.size,
        color=label.colour, zorder=6,
    )  # fmt: skip
    text.set_bbox({"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.3})
    text.set_in_layout(False)
    return text


def _join(ax: Axes, label: Label, text: Annotation) -> None:
    ax.annotate(
        "", label[:2], text.get_position(), textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
    ).set_in_layout(False)  # fmt: skip


def _boxes(
    ax: Axes, labels: Sequence[Label], sizes: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower left and upper right corners [L, P, 2] of every place, in pixels."""
    points = ax.transData.transform([label[:2] for label in labels])  # [L, 2]
    figure: Any = ax.get_figure(root=True)
    pixels = figure.dpi / 72  # a point
    radii = np.array([[[label.radius]] for label in labels])  # [L, 1, 1]
    offsets = pixels * (PLACES[:, :1] + radii) * PLACES[:, 1:]  # [L, P, 2]
    lows = points[:, None] + offsets + sizes[:, None] * (PLACES[:, 1:] - 1) / 2
    return lows, lows + sizes[:, None]


def _costs(ax: Axes, lows: NDArray[np.float64], highs: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L, P], without the other labels: far from its point, a label may be taken for another's."""
    outside = ((lows < ax.bbox.min) | (highs > ax.bbox.max)).any(axis=-1)
    costs: NDArray[np.float64] = PLACES[:, 0] + OUTSIDE * outside
    for pixels, weight in ((_along_lines(ax), 1), (_markers(ax), ON_MARKER)):  # [N, 2]
        low, high = lows[:, :, None] - MARKER, highs[:, :, None] + MARKER  # [L, P, 1, 2]
        costs = costs + weight * ((pixels > low) & (pixels < high)).all(axis=-1).sum(axis=-1)
    return costs


def _along_lines(ax: Axes) -> NDArray[np.float64]:
    lines = [line for line in ax.lines if np.size(line.get_xdata())]
    paths = [line.get_transform().transform_path(line.get_path()).interpolated(50) for line in lines]
    return np.concatenate([np.zeros((0, 2)), *(path.vertices for path in paths)])


def _markers(ax: Axes) -> NDArray[np.float64]:
    found = [each for each in ax.collections if isinstance(each, PathCollection)]
    pixels = [ax.transData.transform(each.get_offsets()) for each in found]
    return np.concatenate([np.zeros((0, 2)), *pixels])
