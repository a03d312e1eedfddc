"""What was measured by the clock."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from pipeline.figures.style import BLUE, CYCLE, GREEN, GREY, MARKERS, ORANGE, save


def speedups(path: Path, *, times: Sequence[Mapping[str, Any]], title: str) -> None:
    """Speed-up of every executor over the best static form, by batch size, beside what FLOPs promise.

    Args:
        times: rows of the benchmark's table of that name.
    """
    precisions = sorted({row["precision"] for row in times}, reverse=True)
    figure, axes = plt.subplots(
        1, len(precisions), figsize=(5.6 * len(precisions), 4), layout="constrained", squeeze=False
    )
    for ax, precision in zip(axes[0], precisions, strict=True):
        rows = [r for r in times if r["precision"] == precision and r["kind"] == "blockdrop"]
        for index, name in enumerate(dict.fromkeys(row["contestant"] for row in rows)):
            own = [row for row in rows if row["contestant"] == name]
            middle = np.array([row["speedup"] for row in own])
            low, high = ([row[f"speedup_{end}"] for row in own] for end in ("low", "high"))
            look = {"color": CYCLE[index % len(CYCLE)], "marker": MARKERS[index % len(MARKERS)]}
            batches, errors = [row["batch"] for row in own], [middle - low, high - middle]
            ax.errorbar(batches, middle, yerr=errors, label=name, capsize=3, **look)
        ideal = {row["batch"]: row["ideal"] for row in rows}
        ax.plot(
            list(ideal), list(ideal.values()), color=GREY, linestyle="--", label="what FLOPs promise"
        )
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(ideal), [str(batch) for batch in ideal])
        ax.set(xlabel="batch size", ylabel="times as fast as the best static form", title=precision)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    save(figure, path)


def break_evens(path: Path, *, sweep: Sequence[Mapping[str, Any]], title: str) -> None:
    """Time against the kept share of the blocks, for few and for many policies, by batch size.

    Args:
        sweep: rows of the benchmark's table of that name.
    """
    cells = list(dict.fromkeys((row["precision"], row["batch"]) for row in sweep))
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.9 * columns, 3.1 * lines), layout="constrained", squeeze=False
    )
    for ax, cell in zip(axes.flat, cells, strict=False):
        rows = [row for row in sweep if (row["precision"], row["batch"]) == cell]
        for variant, colour, marker in (("few", GREEN, "s"), ("many", BLUE, "o")):
            own = [row for row in rows if row["variant"] == variant]
            shares = [row["kept_share"] for row in own]
            said = f"BlockDrop, {variant} policies"
            ax.plot(shares, [r["milliseconds"] for r in own], color=colour, marker=marker, label=said)
        ax.axhline(
            rows[0]["static_milliseconds"], color=ORANGE, linestyle="--", label="best static form"
        )
        ax.set(xlabel="share of the blocks kept", ylabel="ms a batch", ylim=(0, None))
        ax.set_title(f"batch {cell[1]}, {cell[0]}")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(cells) :]:
        ax.set_axis_off()
    axes[0, 0].legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    save(figure, path)
