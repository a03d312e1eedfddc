"""How the policy was learnt, epoch by epoch."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from pipeline.plotting import BLUE, GREY, ORANGE, WIDTH, Rows, save

TINT = "#EEF4F9"  # behind the curriculum
NOT_YET = "#C9CED3"  # blocks that the curriculum has not come to


def learning_curves(path: Path, *, curriculum: Rows, finetune: Rows, num_blocks: int) -> None:
    """How the policy was learnt: accuracy, reward, blocks, entropy and diversity, over both stages.

    A stage's rows are those of its table, one an epoch; none where it was imported.
    """
    if not curriculum and not finetune:
        figure = plt.figure(figsize=(WIDTH, 1.2))
        said = "Curriculum and joint finetuning were imported: nothing was trained here."
        figure.text(0.5, 0.5, said, ha="center", va="center", color=GREY)
        save(figure, path)
        return
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 5.0), layout="constrained")
    shifted = [{**row, "epoch": row["epoch"] + len(curriculum)} for row in finetune]
    stages = [rows for rows in (curriculum, shifted) if rows]
    epochs = len(curriculum) + len(finetune)
    # points where epochs are few, since one alone has no line; thin lines where they are many
    look = {"marker": "." if epochs <= 30 else None, "linewidth": 1.4 if epochs <= 300 else 0.6}
    # self_critical runs the greedy policy in training too, the other estimators sampled actions alone
    greedy = all("train_greedy_reward" in row for rows in stages for row in rows[:1])
    of_training_reward = "train_greedy_reward" if greedy else "train_reward"
    panels = (
        ("accuracy (%)", "train_accuracy", "validation_accuracy", 100),
        ("reward", of_training_reward, "validation_reward", 1),
        (f"blocks kept per image, of {num_blocks}", "train_blocks", "validation_blocks_mean", 1),
        ("entropy per learnt block (nats)", "train_policy_entropy", "validation_policy_entropy", 1),
        ("effective policies", None, "validation_effective_policies", 1),
    )
    for ax, (label, of_training, of_validation, scale) in zip(axes.flat, panels, strict=False):
        for rows in stages:
            _curve(ax, rows, of_training, scale, color=BLUE, **look)
            _curve(ax, rows, of_validation, scale, color=ORANGE, **look)
        _mark_stages(ax, len(curriculum), len(finetune))
        ax.set(title=label, xlabel="epoch")
    blocks, entropy, diversity = axes.flat[2:5]
    _not_yet_learnt(blocks, curriculum, num_blocks)
    undecided = entropy.axhline(math.log(2), color=GREY, linestyle="--", linewidth=1)
    undecided.set_label("undecided: ln 2 nats")
    entropy.set_ylim(0, 0.75)
    most = max(row["validation_effective_policies"] for rows in stages for row in rows)
    diversity.set_ylim(0.9, 1.3 * max(most, 4))
    _log(diversity)
    title = f"joint finetuning: epochs {len(curriculum) + 1} to {epochs}\n\n" if finetune else ""
    title += "accuracy, reward and blocks:\nof the most likely policy"
    if not greedy:
        title += "\n(of training images, while it learns:\nof sampled ones)"
    handles = [
        Line2D([], [], color=BLUE, label="training images"),
        Line2D([], [], color=ORANGE, label="validation images"),
        undecided,
        *blocks.get_legend_handles_labels()[0],
    ]
    note = axes.flat[5]
    note.set_axis_off()
    note.legend(handles=handles, loc="center", title=title, title_fontsize=8.5, alignment="left")
    save(figure, path)


def _curve(ax: Axes, rows: Rows, key: str | None, scale: float, **look: Any) -> None:
    if key is not None and all(key in row for row in rows):  # policies between paths have no entropy
        ax.plot([row["epoch"] for row in rows], [scale * row[key] for row in rows], **look)


def _mark_stages(ax: Axes, curriculum: int, finetune: int) -> None:
    """Show which epochs are of which stage."""
    ax.set_xlim(0.5, curriculum + finetune + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    ax.grid()
    if curriculum:
        said = f"curriculum: epochs 1 to {curriculum}"
        ax.axvspan(0.5, curriculum + 0.5, color=TINT, linewidth=0, zorder=0, label=said)
    if curriculum and finetune:
        said = "joint finetuning begins"
        ax.axvline(curriculum + 0.5, color=GREY, linestyle=":", linewidth=1.2, label=said)


def _not_yet_learnt(ax: Axes, curriculum: Rows, num_blocks: int) -> None:
    """The curriculum's position: the blocks before it are always kept, so no curve is below."""
    if curriculum:
        waiting = [num_blocks - row["validation_active_blocks"] for row in curriculum]
        edges = [epoch + 0.5 for epoch in range(len(waiting) + 1)]
        said = "not learnt yet: always kept"
        ax.stairs(waiting, edges, fill=True, color=NOT_YET, zorder=1, label=said)
    ax.set_ylim(0, 1.04 * num_blocks)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def _log(ax: Axes) -> None:
    """Logarithmic, with more ticks where few powers of ten are in sight."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")
