"""What was measured by the clock."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pipeline.plotting import BLUE, CYCLE, GREEN, GREY, MARKERS, ORANGE, WIDTH, headline, save
from pipeline.results import SweepPoint, TimingRow


def speedups(path: Path, *, times: Sequence[TimingRow], title: str) -> None:
    """Speed-up of every executor over the best full-ResNet form by batch size, and what FLOPs promise.

    Hollow where nothing is claimed.
    """
    rows = [row for row in times if row.kind == "blockdrop"]
    precisions = sorted({row.precision for row in rows}, reverse=True)
    names = list(dict.fromkeys(row.candidate for row in rows))
    figure, axes = plt.subplots(
        1, len(precisions), figsize=(WIDTH, 4.2), layout="constrained", squeeze=False
    )
    cycle = plt.cycler(color=CYCLE, marker=MARKERS)()
    looks: dict[str, dict[str, Any]] = dict(zip(names, cycle, strict=False))
    for ax, precision in zip(axes[0], precisions, strict=True):
        of_precision = [row for row in rows if row.precision == precision]
        for name, look in looks.items():
            _draw_speedup(ax, [row for row in of_precision if row.candidate == name], **look)
        ideal = {row.batch: row.ideal for row in of_precision}
        ax.plot(list(ideal), list(ideal.values()), color="black", linestyle="--", linewidth=1.2)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(ideal), [str(batch) for batch in ideal])
        ax.set(xlabel="images in a batch", title=precision, ylim=(0, None))
        ax.grid()
    axes[0, 0].set_ylabel("times as fast as the best full-ResNet form")
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    handles.append(Line2D([], [], color="black", linestyle="--", label="what FLOPs promise"))
    if not all(row.claim for row in rows):
        handles.append(_hollow("too noisy, or other results: no claim"))
    columns = len(handles) if len(handles) <= 5 else -(-len(handles) // 2)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    headline(figure, title)
    save(figure, path)


def _draw_speedup(ax: Axes, rows: Sequence[TimingRow], *, color: str, marker: str) -> None:
    batches = [row.batch for row in rows]
    ratios, lows, highs = np.array(
        [(row.speedup.ratio, row.speedup.low, row.speedup.high) for row in rows]
    ).T.reshape(3, -1)
    errors = np.maximum([ratios - lows, highs - ratios], 0)  # an interval may leave its median out
    ax.errorbar(batches, ratios, yerr=errors, color=color, marker=marker, capsize=3)
    _mark_noise(ax, [(row.batch, row.speedup.ratio) for row in rows if not row.claim], color, marker)


def _mark_noise(ax: Axes, points: Sequence[tuple[float, float]], color: str, marker: str) -> None:
    for x, y in points:
        ax.plot(x, y, marker, markerfacecolor="white", markeredgecolor=color, zorder=3)


def _hollow(label: str) -> Line2D:
    """What a hollow marker means, for a legend."""
    line = Line2D([], [], marker="o", linestyle="", color=GREY, label=label)
    line.set_markerfacecolor("white")
    return line


def break_evens(path: Path, *, sweep: Sequence[SweepPoint], title: str) -> None:
    """Time against the keep ratio, for few and for many policies, by batch size.

    Hollow where the time can't be told from the best full-ResNet form's.
    """
    panels = list(dict.fromkeys((point.precision, point.batch) for point in sweep))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(WIDTH, 0.9 + 2.5 * lines), layout="constrained", squeeze=False
    )
    for ax, (precision, batch) in zip(axes.flat, panels, strict=False):
        points = [p for p in sweep if (p.precision, p.batch) == (precision, batch)]
        for variant, color, marker in (("few", GREEN, "s"), ("many", BLUE, "o")):
            of_variant = [p for p in points if p.variant == variant]
            percents = [100 * p.keep_ratio for p in of_variant]
            times = [p.time.milliseconds for p in of_variant]
            ax.plot(percents, times, color=color, marker=marker, label=f"BlockDrop, {variant} policies")
            noisy = [
                (100 * p.keep_ratio, p.time.milliseconds) for p in of_variant if not p.speedup.claim
            ]
            _mark_noise(ax, noisy, color, marker)
        ax.axhline(
            points[0].full_milliseconds, color=ORANGE, linestyle="--", label="best full-ResNet form"
        )
        ax.set(xlabel="blocks kept (%)", ylabel="ms a batch", xlim=(0, 105), ylim=(0, None))
        ax.set_title(f"batch {batch}, {precision}")
        ax.grid()
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    handles = axes[0, 0].get_legend_handles_labels()[0]
    if not all(point.speedup.claim for point in sweep):
        handles.append(_hollow("too noisy to compare"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    headline(figure, title)
    save(figure, path)
