"""How training went, epoch by epoch."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from pipeline.plotting import BLUE, GREY, ORANGE, PALE, WIDTH, Rows, headline, save

TINT = "#EEF4F9"  # behind the curriculum
NOT_YET = "#C9CED3"  # blocks that the curriculum has not come to


def learning_curves(path: Path, *, curriculum: Rows, finetune: Rows, num_blocks: int) -> None:
    """How the policy was learnt: accuracy, reward, blocks, entropy and diversity, over both stages.

    Args:
        curriculum: rows of its table, one an epoch; none where the stage was imported.
        finetune: likewise; its epochs are drawn after the curriculum's.
        num_blocks: K.
    """
    if not curriculum and not finetune:
        _say_imported(path)
        return
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 5.0), layout="constrained")
    stages = _on_one_axis(curriculum, finetune)
    look = _look(len(curriculum) + len(finetune))
    # self_critical runs the greedy policy in training too, the other estimators sampled actions alone
    greedy = all("train_greedy_reward" in row for rows in stages for row in rows[:1])
    of_training_reward = "train_greedy_reward" if greedy else "train_reward"
    panels = (
        ("accuracy (%)", "train_accuracy", "validation_accuracy", 100),
        ("reward", of_training_reward, "validation_reward", 1),
        (f"blocks kept per image, of {num_blocks}", "train_blocks", "validation_blocks_mean", 1),
        ("entropy per learnt block (nats)", "train_entropy", "validation_entropy", 1),
        ("effective policies", None, "validation_effective_policies", 1),
    )
    for ax, (label, of_training, of_validation, scale) in zip(axes.flat, panels, strict=False):
        for rows in stages:
            _curve(ax, rows, of_training, scale, color=BLUE, **look)
            _curve(ax, rows, of_validation, scale, color=ORANGE, **look)
        _mark_stages(ax, curriculum, finetune)
        ax.set(title=label, xlabel="epoch")
    blocks, entropy, diversity = axes.flat[2:5]
    _not_yet_learnt(blocks, curriculum, num_blocks)
    entropy.axhline(math.log(2), color=GREY, linestyle="--", linewidth=1)
    entropy.set_ylim(0, 0.75)
    most = max(row["validation_effective_policies"] for rows in stages for row in rows)
    diversity.set_ylim(0.9, 1.3 * max(most, 4))
    _log(diversity)
    _legend(axes.flat[5], curriculum, finetune, greedy=greedy)
    save(figure, path)


def training_curve(path: Path, *, rows: Rows, title: str) -> None:
    """Accuracy and loss of a ResNet with every block, on training and validation images.

    Args:
        rows: of plots/pretrain.csv, one an epoch.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.0), layout="constrained")
    for ax, name, scale in ((left, "accuracy", 100), (right, "loss", 1)):
        look = _look(len(rows))
        _curve(ax, rows, f"train_{name}", scale, color=BLUE, label="training images", **look)
        _curve(ax, rows, f"validation_{name}", scale, color=ORANGE, label="validation images", **look)
        _epochs(ax, len(rows))
        ax.set(xlabel="epoch")
    left.set(ylabel="accuracy (%)")
    right.set(ylabel="cross-entropy (nats)")
    if min(row[f"{split}_loss"] for row in rows for split in ("train", "validation")) > 0:
        _log(right)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    headline(figure, title)
    save(figure, path)


def _say_imported(path: Path) -> None:
    figure = plt.figure(figsize=(WIDTH, 1.2))
    said = "Curriculum and joint finetuning were imported: nothing was trained here."
    figure.text(0.5, 0.5, said, ha="center", va="center", color=GREY)
    save(figure, path)


def _on_one_axis(curriculum: Rows, finetune: Rows) -> list[Rows]:
    """The stages that have rows, with the epochs of the second going on from the first's."""
    shifted = [{**row, "epoch": row["epoch"] + len(curriculum)} for row in finetune]
    return [rows for rows in (curriculum, shifted) if rows]


def _look(epochs: int) -> dict[str, Any]:
    """Points where epochs are few, since one alone has no line; thin lines where they are many."""
    return {"marker": "." if epochs <= 30 else None, "linewidth": 1.4 if epochs <= 300 else 0.6}


def _curve(ax: Axes, rows: Rows, key: str | None, scale: float, **look: Any) -> None:
    if key is not None:
        ax.plot([row["epoch"] for row in rows], [scale * row[key] for row in rows], **look)


def _epochs(ax: Axes, count: int) -> None:
    ax.set_xlim(0.5, count + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    ax.grid()


def _mark_stages(ax: Axes, curriculum: Rows, finetune: Rows) -> None:
    border = len(curriculum) + 0.5
    _epochs(ax, len(curriculum) + len(finetune))
    if curriculum:
        ax.axvspan(0.5, border, color=TINT, linewidth=0, zorder=0)
    if curriculum and finetune:
        ax.axvline(border, color=GREY, linestyle=":", linewidth=1.2)


def _not_yet_learnt(ax: Axes, curriculum: Rows, num_blocks: int) -> None:
    """The curriculum's position: the blocks before it are always kept, so no curve is below."""
    if curriculum:
        waiting = [num_blocks - row["validation_active_blocks"] for row in curriculum]
        edges = [epoch + 0.5 for epoch in range(len(waiting) + 1)]
        ax.stairs(waiting, edges, fill=True, color=NOT_YET, zorder=1)
    ax.set_ylim(0, 1.04 * num_blocks)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def _log(ax: Axes) -> None:
    """Logarithmic, with more ticks where few powers of ten are in sight."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")


def _legend(ax: Axes, curriculum: Rows, finetune: Rows, *, greedy: bool) -> None:
    first, last = len(curriculum), len(curriculum) + len(finetune)
    handles: list[Artist] = [
        Line2D([], [], color=BLUE, label="training images"),
        Line2D([], [], color=ORANGE, label="validation images"),
        Line2D([], [], color=GREY, linestyle="--", label="undecided: ln 2 nats"),
    ]
    if curriculum:
        handles.append(Patch(facecolor=TINT, edgecolor=PALE, label=f"curriculum: epochs 1 to {first}"))
        handles.append(Patch(color=NOT_YET, label="not learnt yet: always kept"))
    if curriculum and finetune:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="joint finetuning begins"))
    if finetune:
        said = f"joint finetuning: epochs {first + 1} to {last}"
        handles.append(Patch(facecolor="white", edgecolor=PALE, label=said))
    ax.set_axis_off()
    said = "accuracy, reward and blocks:\nof the most likely policy"
    if not greedy:
        said += "\n(of training images, while it learns:\nof sampled ones)"
    ax.legend(handles=handles, loc="center", title=said, title_fontsize=8.5, alignment="left")
