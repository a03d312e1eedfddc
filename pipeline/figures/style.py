"""One look for all figures. Colours: Okabe and Ito's, which colour-blind readers can tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
CYCLE = (GREY, BLUE, GREEN, ORANGE, "#CC79A7")
MARKERS = ("x", "o", "s", "D", "^")
Rows = Sequence[Mapping[str, float]]


def save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG and close the figure; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # no version: equal bytes
    plt.close(figure)
