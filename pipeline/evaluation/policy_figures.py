"""Which blocks run for which images.

Shapes: M images of H by W pixels, K blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.split import ImageArray
from pipeline.plotting import BLUE, GREY, INK, ORANGE, PALE, WIDTH, fitting, headline, save

KEPT_OR_DROPPED = ((BLUE, "block runs"), (PALE, "block dropped"))
RANKS = ("most frequent", "second", "third")
MAX_ROWS, MAX_CLASSES = 20, 10  # of the heat map, and with pictures
QUANTILES = 10  # of difficulty, where there are images enough for means of 20
PICTURES = 18  # of a class, under all of its policies together
NAME = 1.1  # inches of a class's name
COLUMNS, COLUMN = 7, 0.69  # of large pictures; inches of a caption
PIXELS = 112  # of a picture's side, at most: a large one is shown at about as many
PITCH, LINE = 1.1, 1.65  # in pictures: to the next one, to the next line

# ------------------------------------------------------------------------------- what is to be shown


@dataclass(frozen=True, kw_only=True)
class ShownPolicies:
    """What a policy does with the test images."""

    images: ImageArray  # [M, H, W, 3]
    labels: NDArray[np.int64]  # [M], the true classes
    predicted: NDArray[np.int64]  # [M], under the policy
    actions: NDArray[np.bool_]  # [M, K] bool
    losses: NDArray[np.floating]  # [M], the full network's: how difficult an image is
    classes: Sequence[str]
    stages: Sequence[int]  # blocks in each stage
    title: str

    @property
    def blocks(self) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = self.actions.sum(axis=1)
        return counts

    @property
    def correct(self) -> NDArray[np.bool_]:
        return self.predicted == self.labels


class FrequentPolicy(NamedTuple):
    """A policy that images of a class take."""

    policy: NDArray[np.bool_]  # [K] bool
    share: float  # of the class's images, in (0, 1]
    images: NDArray[np.int64]  # rows of the images that take it, in their order


def frequent_policies(
    actions: NDArray[np.bool_], labels: NDArray[np.int64], label: int, count: int
) -> list[FrequentPolicy]:
    """The most frequent policies of a class's images, at most `count`; none of a class without images.

    Of equally frequent ones the first is the one that drops the earlier block. By actions [M, K] and
    labels [M].
    """
    of_class = np.flatnonzero(labels == label)
    if not len(of_class):
        return []
    distinct, taken, counts = np.unique(
        actions[of_class], axis=0, return_inverse=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:count]
    return [
        FrequentPolicy(
            policy=distinct[row].astype(bool),
            share=float(counts[row] / len(of_class)),
            images=of_class[taken.reshape(-1) == row],
        )
        for row in order
    ]


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of the rows, evenly from the first to the last, so that nobody picks them."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def extremes(blocks: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The images with the fewest blocks [M], fewest first, and those with the most, most first.

    At most `count` each, no image in both; equals in their order, so that neither difficulty nor
    anything else picks what the figure then seems to show.
    """
    half = min(count, len(blocks) // 2)
    order = np.argsort(blocks, kind="stable")
    others = np.sort(order[half:])
    return order[:half], others[np.argsort(-blocks[others], kind="stable")][:half]


def means_by_quantile(
    values: NDArray[np.float64], by: NDArray[np.floating], quantiles: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean of the values [M] in each quantile of `by` [M], and its standard error, [Q] each."""
    parts = np.array_split(values[np.argsort(by, kind="stable")], quantiles)
    errors = [part.std(ddof=1) / np.sqrt(len(part)) if len(part) > 1 else 0.0 for part in parts]
    return np.array([part.mean() for part in parts]), np.array(errors)


# ----------------------------------------------------------------------------------- overview


def policy_overview(path: Path, shown: ShownPolicies) -> None:
    """Which blocks run, by class, and how many blocks correct and wrong predictions took."""
    rows = min(len(shown.classes), MAX_ROWS) + 1
    figure = plt.figure(figsize=(WIDTH, 0.41 + max(3.2, 0.8 + 0.24 * rows)), layout="constrained")
    axes = figure.subplot_mosaic("hc;hw", width_ratios=(2, 1))
    _draw_keep_ratios(axes["h"], shown)
    _draw_blocks_by_correctness(axes["c"], axes["w"], shown)
    headline(figure, shown.title)
    save(figure, path)


def _draw_keep_ratios(ax: Axes, shown: ShownPolicies) -> None:
    """A row for each class and one for all images."""
    num_classes, num_blocks = len(shown.classes), sum(shown.stages)
    rows = min(num_classes, MAX_ROWS)
    ratios = np.full((rows + 1, num_blocks), np.nan)
    for row in range(rows):
        of_class = shown.actions[shown.labels == row]
        if len(of_class):
            ratios[row] = of_class.mean(axis=0)
        else:
            ax.text((num_blocks - 1) / 2, row, "no test images", ha="center", va="center", color=GREY)
    ratios[-1] = shown.actions.mean(axis=0)
    image = ax.imshow(ratios, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="none")
    ax.axhline(rows - 0.5, color="white", linewidth=4)
    for border in np.cumsum(shown.stages[:-1]):
        ax.axvline(border - 0.5, color="white", linewidth=1.5)
    names = [fitting(name, NAME, 8.5) for name in shown.classes[:rows]]
    ax.set_yticks(range(rows + 1), [*names, "all images"])
    step = next(step for step in (1, 5, 10, 50, 100) if num_blocks <= 20 * step)
    ticks = sorted({1, *range(step, num_blocks + 1, step)})
    ax.set_xticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    left_out = num_classes - rows
    note = f"; {left_out} of {num_classes} classes are not shown" if left_out else ""
    ax.set(xlabel=f"block, in {len(shown.stages)} stages{note}")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, aspect=30, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"])
    bar.set_label("images that run the block (%)")
    bar.outline.set_visible(False)


def _draw_blocks_by_correctness(correct_ax: Axes, wrong_ax: Axes, shown: ShownPolicies) -> None:
    """How many images took how many blocks; each with its own scale, since wrong ones are few."""
    blocks, correct = shown.blocks, shown.correct
    for ax, rows, color, name in (
        (correct_ax, correct, BLUE, "correct"),
        (wrong_ax, ~correct, ORANGE, "wrong"),
    ):
        taken, counts = np.unique(blocks[rows], return_counts=True)
        ax.bar(taken, counts, width=0.85, color=color)
        ax.set(xlim=(blocks.min() - 0.7, blocks.max() + 0.7), ylabel="images")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        if rows.any():
            mean = blocks[rows].mean()
            ax.axvline(mean, color=INK, linestyle="--", linewidth=1)
            ax.set_title(f"{rows.sum():,} {name}, mean {mean:.2f} blocks")
        else:
            ax.set(title=f"none {name}", ylim=(0, 1), yticks=[], ylabel="")
    wrong_ax.set_xlabel("blocks kept")


# ----------------------------------------------------------------------- policies of each class


def policies_by_class(path: Path, shown: ShownPolicies, *, policies: int = 3) -> None:
    """Each class's `policies` most frequent ones, and images that take them (the paper's Figure 4)."""
    names = shown.classes[:MAX_CLASSES]
    figure, axes = plt.subplots(
        len(names), policies, figsize=(WIDTH, 0.8 + 0.85 * len(names)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for label, (name, row) in enumerate(zip(names, axes, strict=True)):
        actions = shown.actions[shown.labels == label]
        said = "no test images"
        if len(actions):
            distinct = len(np.unique(actions, axis=0))
            said = f"{_counted(len(actions), 'image')}\n{_counted(distinct, 'policy')}"
        place = {"transform": row[0].transAxes, "ha": "right", "va": "top", "size": 8}
        row[0].text(-0.05, 0.9, fitting(name, NAME, 8, "bold"), weight="bold", **place)
        row[0].text(-0.05, 0.65, said, color=GREY, **place)
        frequent = frequent_policies(shown.actions, shown.labels, label, policies)
        for rank, (ax, policy) in enumerate(zip(row, frequent, strict=False)):
            _draw_policy(ax, policy, shown, PICTURES // policies)
            rank_name = f"{RANKS[rank] if rank < len(RANKS) else f'{rank + 1}th'}: " * (label == 0)
            blocks = _counted(int(policy.policy.sum()), "block")
            title = f"{rank_name}{100 * policy.share:.0f} %, {blocks}"
            ax.set_title(title, loc="left", size=8, pad=2)
        for ax in row:
            ax.set_axis_off()
    note = "gaps: stages; %: share of the class's images"
    if len(names) < len(shown.classes):
        note += f"; the first {len(names)} of {len(shown.classes)} classes"
    handles = [Patch(color=color, label=said) for color, said in KEPT_OR_DROPPED]
    figure.legend(handles=[*handles, Patch(alpha=0, label=note)], loc="outside lower center", ncols=3)
    headline(figure, shown.title)
    save(figure, path)


def _draw_policy(ax: Axes, policy: FrequentPolicy, shown: ShownPolicies, count: int) -> None:
    """A row of cells with a gap after each stage, and at most `count` images that take the policy."""
    cells = np.insert(policy.policy.astype(float), np.cumsum(shown.stages[:-1]), np.nan)
    width = PITCH * count
    ax.pcolormesh(
        np.linspace(0, width, len(cells) + 1), (PITCH, PITCH + 0.35), cells[None],
        cmap=ListedColormap([PALE, BLUE]), vmin=0, vmax=1, edgecolors="white",
        linewidth=0.4 if len(cells) <= 32 else 0.2,
    )  # fmt: skip
    for number, row in enumerate(spread(policy.images, count)):
        _draw_picture(ax, shown.images[row], PITCH * number, 0)
    ax.set(xlim=(0, width), ylim=(0, PITCH + 0.35), anchor="NW", xticks=(), yticks=())


def _draw_picture(ax: Axes, image: NDArray[np.uint8], left: float, bottom: float) -> None:
    """In its own resolution, which is what an SVG holds, but not in more than can be seen."""
    if max(image.shape[:2]) > PIXELS:
        small = Image.fromarray(image)
        small.thumbnail((PIXELS, PIXELS))
        image = np.asarray(small)
    ax.imshow(image, extent=(left, left + 1, bottom, bottom + 1), interpolation="none")


# ------------------------------------------------------------------------ easy and hard images


def easy_and_hard(path: Path, shown: ShownPolicies) -> None:
    """Images with the fewest and the most blocks, and whether difficulty explains it (Figure 5)."""
    blocks = shown.blocks
    if np.ptp(blocks) > 0:
        fewest, most = extremes(blocks, 2 * COLUMNS)
        groups = [("the fewest blocks", fewest), ("the most blocks", most)]
    else:  # no extremes
        every = spread(np.arange(len(blocks)), 4 * COLUMNS)
        groups = [(f"every image takes {_counted(int(blocks[0]), 'block')}", every)]
    lines = [-(-len(rows) // COLUMNS) for _, rows in groups]
    height = max(0.8 + 0.3 * len(groups) + 1.2 * sum(lines), 4.6)
    figure = plt.figure(figsize=(WIDTH, height), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, width_ratios=(2, 1), squeeze=False)
    axes = left.subplots(len(groups), 1, height_ratios=lines, squeeze=False)[:, 0]
    for ax, (name, rows), count in zip(axes, groups, lines, strict=True):
        for number, row in enumerate(rows):
            line, column = divmod(number, COLUMNS)
            _draw_captioned(ax, shown, row, PITCH * column, -LINE * line - 1)
        ax.set(xlim=(0, PITCH * COLUMNS), ylim=(-LINE * count, 0), anchor="N", xticks=(), yticks=())
        ax.set_title(name, weight="bold")
        ax.set_axis_off()
    left.supxlabel(
        "framed: wrong, → what was predicted; equal numbers of blocks in file order", size=7.5
    )
    correct, wrong, difficulty = right.subplots(3, 1, height_ratios=(1.2, 0.9, 1.3))
    _draw_blocks_by_correctness(correct, wrong, shown)
    _draw_blocks_by_difficulty(difficulty, shown)
    headline(figure, shown.title)
    save(figure, path)


def _draw_captioned(ax: Axes, shown: ShownPolicies, row: int, left: float, bottom: float) -> None:
    """An image with its class and its number of blocks under it; framed if the prediction is wrong."""
    _draw_picture(ax, shown.images[row], left, bottom)
    caption = [shown.classes[shown.labels[row]], _counted(int(shown.blocks[row]), "block")]
    if not shown.correct[row]:
        caption.append(f"→ {shown.classes[shown.predicted[row]]}")
        frame = Rectangle((left, bottom), 1, 1, clip_on=False)
        ax.add_patch(frame).set(fill=False, edgecolor=ORANGE, linewidth=2.2)
    for number, line in enumerate(caption):
        ax.annotate(
            fitting(line, COLUMN, 7.5), (left + 0.5, bottom), (0, -4 - 9.5 * number),
            textcoords="offset points", size=7.5, color=(INK, GREY, ORANGE)[number], ha="center",
            va="top",
        )  # fmt: skip


def _draw_blocks_by_difficulty(ax: Axes, shown: ShownPolicies) -> None:
    blocks = shown.blocks
    quantiles = min(QUANTILES, len(blocks) // 20)
    if quantiles < 2:
        ax.set_axis_off()
        note = "too few images for means by difficulty"
        ax.text(0.5, 0.5, note, ha="center", color=GREY, transform=ax.transAxes)
        return
    means, errors = means_by_quantile(blocks.astype(np.float64), shown.losses, quantiles)
    numbers = np.arange(1, quantiles + 1)
    ax.axhline(blocks.mean(), color=GREY, linestyle="--", linewidth=1)
    ax.errorbar(numbers, means, yerr=1.96 * errors, color=BLUE, marker="o", capsize=2.5)
    ax.set(xlim=(0.5, quantiles + 0.5), xticks=numbers, ylabel="mean blocks")
    ax.set_xlabel("quantiles of the full network's loss")
    ax.set_title("mean blocks, with 95 % intervals")
    ax.grid(axis="y")


def _counted(count: int, thing: str) -> str:
    many = f"{thing[:-1]}ies" if thing.endswith("y") else f"{thing}s"
    return f"{count:,} {thing if count == 1 else many}"
