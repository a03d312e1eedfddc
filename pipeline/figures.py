"""Figures for papers and READMEs. Colours: Okabe and Ito's, which colour-blind readers can tell apart.

Shapes: M images, K blocks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
CYCLE = (GREY, BLUE, GREEN, ORANGE, "#CC79A7")
MARKERS = ("x", "o", "s", "D", "^")
Rows = Sequence[Mapping[str, float]]


def policy_overview(
    path: Path,
    *,
    actions: NDArray[np.bool_],
    labels: NDArray[np.int64],
    correct: NDArray[np.bool_],
    classes: Sequence[str],
    title: str,
) -> None:
    """Which blocks run, by class, and how many blocks right and wrong predictions took.

    Args:
        actions: [M, K] of the test images.
        labels: [M], the true classes.
        correct: [M], whether the prediction under the policy is right.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=(2, 1), layout="constrained"
    )
    _keep_share_by_class(left, actions, labels, classes)
    _blocks_by_outcome(right, actions.sum(axis=1), correct, actions.shape[1])
    figure.suptitle(title)
    _save(figure, path)


def learning_curves(path: Path, *, curriculum: Rows, finetune: Rows) -> None:
    """Accuracy, reward and kept blocks on training and validation images, over both stages."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    start = curriculum[-1]["epoch"] if curriculum else 0
    panels = (
        ("accuracy", "accuracy of the greedy policy", "train_accuracy"),
        ("reward", "reward of the greedy policy", "train_greedy_reward"),
        ("blocks_mean", "blocks kept per image", "train_blocks"),
    )
    for ax, (name, label, of_training) in zip(axes, panels, strict=True):
        for rows, offset in ((curriculum, 0), (finetune, start)):
            epochs = [row["epoch"] + offset for row in rows]
            first = rows is curriculum or not curriculum
            for key, colour, said in (
                (of_training, BLUE, "training"),
                (f"validation_{name}", ORANGE, "validation"),
            ):
                values = [row[key] for row in rows]
                ax.plot(epochs, values, color=colour, label=said if first else None)
        ax.axvline(start + 0.5, color=GREY, linestyle=":", linewidth=1)
        ax.set(xlabel="epoch (dotted: joint finetuning begins)", ylabel=label)
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False)
    _save(figure, path)


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
    _save(figure, path)


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
    _save(figure, path)


def _keep_share_by_class(
    ax: Axes, actions: NDArray[np.bool_], labels: NDArray[np.int64], classes: Sequence[str]
) -> None:
    shown = range(min(len(classes), 20))
    shares = np.stack(
        [
            actions[labels == c].mean(axis=0) if (labels == c).any() else actions[0] * np.nan
            for c in shown
        ]
    )
    image = ax.imshow(shares, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    ax.set(xlabel="block (1 is the first)", title="share of a class's images that run a block")
    ax.set_yticks(list(shown), [classes[c] for c in shown])
    step = max(1, actions.shape[1] // 15)
    ax.set_xticks(
        range(0, actions.shape[1], step), [str(k + 1) for k in range(0, actions.shape[1], step)]
    )
    ax.figure.colorbar(image, ax=ax, pad=0.01)


def _blocks_by_outcome(
    ax: Axes, blocks: NDArray[np.int64], correct: NDArray[np.bool_], num_blocks: int
) -> None:
    bins = [k - 0.5 for k in range(num_blocks + 2)]
    for outcome, colour, said in ((correct, BLUE, "right"), (~correct, ORANGE, "wrong")):
        weights = np.full(outcome.sum(), 1 / max(1, outcome.sum()))
        label = f"{said} ({outcome.sum()} images)"
        ax.hist(blocks[outcome], bins, weights=weights, color=colour, alpha=0.55, label=label)
    used = blocks.min() - 1, blocks.max() + 1
    ax.set(xlabel="blocks kept", ylabel="share of these images", xlim=used)
    ax.set_title("blocks for right and wrong predictions")
    ax.margins(y=0.3)  # room for the legend
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, loc="upper left")


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # no version: equal bytes
    plt.close(figure)
