"""What was measured by the clock."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pipeline.plotting import BLUE, CYCLE, GREEN, GREY, MARKERS, ORANGE, WIDTH, headline, save
from pipeline.speedup import claim

Row = Mapping[str, Any]


def speedups(path: Path, *, times: Sequence[Row], title: str) -> None:
    """Speed-up of every executor over the best static form, by batch size, beside what FLOPs promise.

    Args:
        times: rows of the benchmark's table of that name.
    """
    rows = [row for row in times if row["kind"] == "blockdrop"]
    precisions = sorted({row["precision"] for row in rows}, reverse=True)
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure, axes = plt.subplots(
        1, len(precisions), figsize=(WIDTH, 4.2), layout="constrained", squeeze=False
    )
    for ax, precision in zip(axes[0], precisions, strict=True):
        here = [row for row in rows if row["precision"] == precision]
        for index, name in enumerate(names):
            own = [row for row in here if row["contestant"] == name]
            _draw_speedup(ax, own, CYCLE[index % len(CYCLE)], MARKERS[index % len(MARKERS)])
        ideal = {row["batch"]: row["ideal"] for row in here}
        ax.plot(list(ideal), list(ideal.values()), color="black", linestyle="--", linewidth=1.2)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(ideal), [str(batch) for batch in ideal])
        ax.set(xlabel="images in a batch", title=precision, ylim=(0, None))
        ax.grid()
    axes[0, 0].set_ylabel("times as fast as the best static form")
    looks = [
        Line2D([], [], color=CYCLE[i % len(CYCLE)], marker=MARKERS[i % len(MARKERS)], label=name)
        for i, name in enumerate(names)
    ]
    looks.append(Line2D([], [], color="black", linestyle="--", label="what FLOPs promise"))
    if not all(claim(row) for row in rows):
        looks.append(_hollow("too noisy, or other results: no claim"))
    columns = len(looks) if len(looks) <= 5 else -(-len(looks) // 2)
    figure.legend(handles=looks, loc="outside lower center", ncols=columns)
    headline(figure, title)
    save(figure, path)


def _draw_speedup(ax: Axes, rows: Sequence[Row], colour: str, marker: str) -> None:
    """One executor with its intervals; hollow where nothing is claimed."""
    batches, middle = [row["batch"] for row in rows], np.array([row["speedup"] for row in rows])
    low, high = (np.array([row[f"speedup_{end}"] for row in rows]) for end in ("low", "high"))
    reach = np.maximum([middle - low, high - middle], 0)  # an interval may leave its median out
    ax.errorbar(batches, middle, yerr=reach, color=colour, marker=marker, capsize=3)
    _mark_noise(ax, [(row["batch"], row["speedup"]) for row in rows if not claim(row)], colour, marker)


def _mark_noise(ax: Axes, points: Sequence[tuple[float, float]], colour: str, marker: str) -> None:
    """Make these points hollow."""
    for x, y in points:
        ax.plot(x, y, marker, markerfacecolor="white", markeredgecolor=colour, zorder=3)


def _hollow(said: str) -> Line2D:
    """What a hollow marker means, for a legend."""
    line = Line2D([], [], marker="o", linestyle="", color=GREY, label=said)
    line.set_markerfacecolor("white")
    return line


def break_evens(path: Path, *, sweep: Sequence[Row], title: str) -> None:
    """Time against the kept share of the blocks, for few and for many policies, by batch size.

    Hollow where the time can't be told from the best static form's.

    Args:
        sweep: rows of the benchmark's table of that name.
    """
    cells = list(dict.fromkeys((row["precision"], row["batch"]) for row in sweep))
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(WIDTH, 0.9 + 2.5 * lines), layout="constrained", squeeze=False
    )
    for ax, cell in zip(axes.flat, cells, strict=False):
        rows = [row for row in sweep if (row["precision"], row["batch"]) == cell]
        for variant, colour, marker in (("few", GREEN, "s"), ("many", BLUE, "o")):
            own = [row for row in rows if row["variant"] == variant]
            shares = [100 * row["keep_ratio"] for row in own]
            said = f"BlockDrop, {variant} policies"
            ax.plot(shares, [r["milliseconds"] for r in own], color=colour, marker=marker, label=said)
            noisy = [(100 * r["keep_ratio"], r["milliseconds"]) for r in own if not claim(r)]
            _mark_noise(ax, noisy, colour, marker)
        static = rows[0]["static_milliseconds"]
        ax.axhline(static, color=ORANGE, linestyle="--", label="best static form")
        ax.set(xlabel="blocks kept (%)", ylabel="ms a batch", xlim=(0, 105), ylim=(0, None))
        ax.set_title(f"batch {cell[1]}, {cell[0]}")
        ax.grid()
    for ax in axes.flat[len(cells) :]:
        ax.set_axis_off()
    looks = axes[0, 0].get_legend_handles_labels()[0]
    if not all(claim(row) for row in sweep):
        looks.append(_hollow("too noisy to compare"))
    figure.legend(handles=looks, loc="outside lower center", ncols=4)
    headline(figure, title)
    save(figure, path)
