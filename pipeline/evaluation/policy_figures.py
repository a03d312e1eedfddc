"""Which blocks run for which images.

Shapes: M images of H by W pixels, K blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipeline.data.split import ImageArray
from pipeline.plotting import BLUE, DPI, GREY, INK, ORANGE, PALE, WIDTH, fitting, headline, save, wrapped

KEPT_OR_DROPPED = ListedColormap([PALE, BLUE])
RANKS = ("most frequent policy", "second", "third")
MAX_ROWS, MAX_CLASSES = 20, 10  # of the heat map, and with pictures
QUANTILES = 10  # of difficulty, where there are images enough for means of 20

# Two figures show images pixel for pixel, which no layout of matplotlib's does: they are set in inches.
MARGIN, LINE = 0.12, 0.13  # around a figure; from a line of small text to the next
PICTURE, LARGE_PICTURE = 0.4, 0.6  # 64 and 96 pixels
STRIP, STAGE_GAP, POLICY_GAP = 0.14, 0.06, 0.2  # height of a policy; between its stages; to the next
NAME = 1.1  # column of class names
COLUMNS, COLUMN = 7, 0.69  # of large pictures

# ------------------------------------------------------------------------------- what is to be shown


@dataclass(frozen=True, kw_only=True)
class ShownPolicies:
    """What a policy does with the test images.

    Attributes:
        images: [M, H, W, 3].
        labels: [M], the true classes.
        predicted: [M], under the policy.
        actions: [M, K] bool.
        losses: [M], the full network's: how difficult an image is.
        stages: blocks in each stage.
    """

    images: ImageArray
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    actions: NDArray[np.bool_]
    losses: NDArray[np.floating]
    classes: Sequence[str]
    stages: Sequence[int]
    title: str

    @property
    def blocks(self) -> NDArray[np.int64]:
        """How many blocks each image takes, [M]."""
        counts: NDArray[np.int64] = self.actions.sum(axis=1)
        return counts

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the prediction under the policy is correct, [M]."""
        return self.predicted == self.labels


@dataclass(frozen=True, kw_only=True)
class FrequentPolicy:
    """A policy that images of a class take.

    Attributes:
        policy: [K] bool.
        share: of the class's images, in (0, 1].
        images: rows of the images that take it, in their order.
    """

    policy: NDArray[np.bool_]
    share: float
    images: NDArray[np.int64]


def frequent_policies(
    actions: NDArray[np.bool_], labels: NDArray[np.int64], label: int, count: int
) -> list[FrequentPolicy]:
    """The most frequent policies of a class's images, at most `count`; none of a class without images.

    Of equally frequent ones the first is the one that drops the earlier block.

    Args:
        actions: [M, K].
        labels: [M].
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
    """The images with the fewest blocks, fewest first, and those with the most, most first.

    At most `count` each, no image in both; equals in their order, so that neither difficulty nor
    anything else picks what the figure then seems to show.

    Args:
        blocks: [M], how many blocks each image takes.
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
    height = _title_height(shown.title) + max(3.2, 0.8 + 0.24 * rows)
    figure = plt.figure(figsize=(WIDTH, height), layout="constrained")
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
    image = ax.imshow(ratios, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    ax.axhline(rows - 0.5, color="white", linewidth=4)
    for border in np.cumsum(shown.stages[:-1]):
        ax.axvline(border - 0.5, color="white", linewidth=1.5)
    names = [fitting(name, 1.1, 8.5) for name in shown.classes[:rows]]
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
    """The most frequent policies of each class, and images that take them (the paper's Figure 4).

    Args:
        policies: how many of each class are shown.
    """
    names = shown.classes[:MAX_CLASSES]
    frequent = [
        frequent_policies(shown.actions, shown.labels, label, policies) for label in range(len(names))
    ]
    heights = [STRIP + PICTURE + 0.22 if of_class else 0.44 for of_class in frequent]
    top = _title_height(shown.title) + 0.4
    figure, sheet = _sheet(top + sum(heights) + 0.3, shown.title)
    width = (WIDTH - 2 * MARGIN - NAME - (policies - 1) * POLICY_GAP) / policies
    lefts = [MARGIN + NAME + rank * (width + POLICY_GAP) for rank in range(policies)]
    for rank, left in enumerate(lefts[: max(map(len, frequent))]):
        name = RANKS[rank] if rank < len(RANKS) else f"{rank + 1}th"
        sheet.text(left + width / 2, top - 0.26, name, ha="center", va="bottom")
        equal = len(set(shown.stages)) == 1 and len(shown.stages) <= 3  # else there is no room for words
        for stage, edges in enumerate(_stage_edges(shown.stages, left, width), start=1):
            word = f"stage {stage}" if equal else f"{stage}"
            sheet.text(edges.mean(), top - 0.07, word, size=7.5, color=GREY, ha="center", va="bottom")
    y = top
    for label, height in enumerate(heights):
        _draw_class(sheet, names[label], shown.actions[shown.labels == label], y)
        for left, policy in zip(lefts, frequent[label], strict=False):
            _draw_policy(sheet, policy, shown, left, y, width)
        y += height
    _explain_strips(sheet, y, len(names), len(shown.classes))
    save(figure, path)


def _draw_class(sheet: Axes, name: str, actions: NDArray[np.bool_], top: float) -> None:
    """A class's name, and how many images [M, K] and policies it has."""
    sheet.plot([MARGIN, WIDTH - MARGIN], [top - 0.06] * 2, color=PALE, linewidth=0.6)
    sheet.text(MARGIN, top + 0.12, fitting(name, NAME - 0.1, 9, "bold"), weight="bold", color=INK)
    lines = ["no test images"]
    if len(actions):
        distinct = len(np.unique(actions, axis=0))
        lines = [_counted(len(actions), "image"), _counted(distinct, "policy")]
    for number, line in enumerate(lines, start=1):
        sheet.text(MARGIN, top + 0.13 + number * 0.15, line, size=8, color=GREY)


def _draw_policy(
    sheet: Axes, policy: FrequentPolicy, shown: ShownPolicies, left: float, top: float, width: float
) -> None:
    """A policy as a strip of cells, images that take it under it, and its share of the class beside."""
    parts = np.split(policy.policy, np.cumsum(shown.stages[:-1]))
    for part, edges in zip(parts, _stage_edges(shown.stages, left, width), strict=True):
        sheet.pcolormesh(
            edges, [top, top + STRIP], part[None].astype(int),
            cmap=KEPT_OR_DROPPED, vmin=0, vmax=1, edgecolors="white",
            linewidth=0.4 if len(policy.policy) <= 30 else 0.2,
        )  # fmt: skip
    y, pitch = top + STRIP + 0.04, PICTURE + 0.04
    count = max(1, int((width - 0.65) / pitch))
    for number, row in enumerate(spread(policy.images, count)):
        _draw_picture(sheet, shown.images[row], left + number * pitch, y, PICTURE)
    right, blocks = left + width, int(policy.policy.sum())
    sheet.text(right, y + 0.17, f"{100 * policy.share:.0f} %", ha="right", color=INK)
    sheet.text(right, y + 0.33, _counted(blocks, "block"), size=8, ha="right", color=GREY)


def _stage_edges(stages: Sequence[int], left: float, width: float) -> list[NDArray[np.float64]]:
    """Where the cells of each stage begin and end."""
    cell = (width - (len(stages) - 1) * STAGE_GAP) / sum(stages)
    parts = np.split(np.arange(sum(stages)), np.cumsum(stages[:-1]))
    return [
        left + stage * STAGE_GAP + cell * np.append(part, part[-1] + 1)
        for stage, part in enumerate(parts)
    ]


def _explain_strips(sheet: Axes, top: float, rows: int, classes: int) -> None:
    y, x = top + 0.08, MARGIN + NAME
    for color, label in ((BLUE, "block runs"), (PALE, "block dropped")):
        sheet.add_patch(Rectangle((x, y), STRIP, STRIP, color=color, linewidth=0))
        sheet.text(x + 0.2, y + 0.12, label, size=8, color=INK)
        x += 1.15
    note = "%: share of the class's images"
    if rows < classes:
        note += f"; the first {rows} of {classes} classes"
    sheet.text(x, y + 0.12, note, size=8, color=INK)


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
    pitch = LARGE_PICTURE + 3 * LINE + 0.1
    lines = sum(-(-len(rows) // COLUMNS) for _, rows in groups)
    top = _title_height(shown.title)
    height = max(top + 0.26 * len(groups) + pitch * lines + 0.24, 4.6)
    figure, sheet = _sheet(height, shown.title)
    y = top
    for name, rows in groups:
        sheet.text(MARGIN, y + 0.17, name, weight="bold", color=INK)
        y += 0.26
        for number, row in enumerate(rows):
            line, column = divmod(number, COLUMNS)
            _draw_captioned(sheet, shown, row, MARGIN + column * COLUMN, y + line * pitch)
        y += -(-len(rows) // COLUMNS) * pitch
    note = "framed: wrong, → what was predicted; equal numbers of blocks in file order"
    sheet.text(MARGIN, height - MARGIN, note, size=7.5, color=GREY)
    left = (MARGIN + COLUMNS * COLUMN + 0.7) / WIDTH
    place = {
        "height_ratios": (1.2, 0.9, 1.3), "hspace": 0.75, "left": left, "right": 1 - MARGIN / WIDTH,
        "bottom": 0.5 / height, "top": 1 - (top + 0.2) / height,
    }  # fmt: skip
    correct, wrong, difficulty = figure.subplots(3, 1, gridspec_kw=place)
    _draw_blocks_by_correctness(correct, wrong, shown)
    _draw_blocks_by_difficulty(difficulty, shown)
    save(figure, path)


def _draw_captioned(sheet: Axes, shown: ShownPolicies, row: int, left: float, top: float) -> None:
    """An image with its class and its number of blocks under it; framed if the prediction is wrong."""
    _draw_picture(sheet, shown.images[row], left, top, LARGE_PICTURE)
    lines = [
        (shown.classes[shown.labels[row]], INK),
        (_counted(int(shown.blocks[row]), "block"), GREY),
    ]
    if not shown.correct[row]:
        lines.append((f"→ {shown.classes[shown.predicted[row]]}", ORANGE))
        frame = Rectangle((left, top), LARGE_PICTURE, LARGE_PICTURE)
        frame.set(fill=False, edgecolor=ORANGE, linewidth=2.2)
        sheet.add_patch(frame)
    middle, y = left + LARGE_PICTURE / 2, top + LARGE_PICTURE + 0.11
    for number, (line, color) in enumerate(lines):
        text = fitting(line, COLUMN - 0.04, 7.5)
        sheet.text(middle, y + number * LINE, text, size=7.5, color=color, ha="center")


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
    ax.set_xlabel("parts by the full network's loss, from low to high")
    ax.set_title("mean blocks by difficulty, with 95 % intervals")
    ax.grid(axis="y")


# ------------------------------------------------------------------------------ sheets in inches


def _title_height(title: str) -> float:
    return MARGIN + 0.17 * len(wrapped(title)) + 0.12


def _sheet(height: float, title: str) -> tuple[plt.Figure, Axes]:
    """A titled figure, and axes all over it whose unit is the inch, from the upper left corner."""
    height = _whole_pixels(height)
    figure = plt.figure(figsize=(WIDTH, height))
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set_axis_off()
    sheet.set(xlim=(0, WIDTH), ylim=(height, 0), autoscale_on=False)
    size = plt.rcParams["figure.titlesize"]
    sheet.text(WIDTH / 2, MARGIN, "\n".join(wrapped(title)), size=size, ha="center", va="top")
    return figure, sheet


def _draw_picture(sheet: Axes, image: NDArray[np.uint8], left: float, top: float, size: float) -> None:
    left, top = _whole_pixels(left), _whole_pixels(top)
    sheet.imshow(image, extent=(left, left + size, top + size, top), aspect="auto")


def _whole_pixels(inches: float) -> float:
    return round(inches * DPI) / DPI


def _counted(count: int, thing: str) -> str:
    many = f"{thing[:-1]}ies" if thing.endswith("y") else f"{thing}s"
    return f"{count:,} {thing if count == 1 else many}"
