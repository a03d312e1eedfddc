"""Which blocks run for which images.

Shapes: M images of H by W pixels, K blocks. Without other word each of three stages has a third of them.
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

STAGES = 3  # of a CIFAR ResNet, with equally many blocks
Stages = Sequence[int] | None  # blocks in each stage; None: a CIFAR ResNet's
KEPT_OR_DROPPED = ListedColormap([PALE, BLUE])
RANKS = ("most frequent policy", "second", "third")
MAX_ROWS, MAX_CLASSES = 20, 10  # of the heat map, and with pictures
QUANTILES = 10  # of difficulty, where there are images enough for means of 20

# layouts by hand, in inches
MARGIN, LINE = 0.12, 0.13  # around a figure; from a line of small text to the next
PICTURE, LARGE_PICTURE = 0.4, 0.6  # 64 and 96 pixels
STRIP, STAGE_GAP = 0.14, 0.06  # height of a policy; between two stages of it
NAME = 1.1  # column of class names
COLUMNS, COLUMN = 7, 0.69  # of large pictures

# ------------------------------------------------------------------------------- what is to be shown


@dataclass(frozen=True, kw_only=True)
class FrequentPolicy:
    """A policy that images of a class take.

    Attributes:
        policy: [K] bool.
        share: of the class's images, in (0, 1].
        images: where the images that take it stand, in their order.
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
    """At most `count` of the rows, evenly from the first to the last: nobody's choice."""
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


# -------------------------------------------------------------------------------------- the figures


def policy_overview(
    path: Path,
    *,
    actions: NDArray[np.bool_],
    labels: NDArray[np.int64],
    correct: NDArray[np.bool_],
    classes: Sequence[str],
    title: str,
    stages: Stages = None,
) -> None:
    """Which blocks run, by class, and how many blocks right and wrong predictions took.

    Args:
        actions: [M, K] of the test images.
        labels: [M], the true classes.
        correct: [M], whether the prediction under the policy is right.
    """
    rows = min(len(classes), MAX_ROWS) + 1
    height = _title_height(title) + max(3.2, 0.8 + 0.24 * rows)
    figure = plt.figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplot_mosaic("hr;hw", width_ratios=(2, 1))
    _keep_share_by_class(axes["h"], actions, labels, classes, stages)
    _blocks_by_outcome(axes["r"], axes["w"], actions.sum(axis=1), correct)
    headline(figure, title)
    save(figure, path)


def policies_by_class(
    path: Path,
    *,
    images: ImageArray,
    labels: NDArray[np.int64],
    actions: NDArray[np.bool_],
    classes: Sequence[str],
    title: str,
    policies: int = 3,
    stages: Stages = None,
) -> None:
    """The most frequent policies of each class, and images that take them (the paper's Figure 4).

    Args:
        images: [M, H, W, 3].
        labels: [M], the true classes.
        actions: [M, K].
        policies: how many of each class are shown.
    """
    names = classes[:MAX_CLASSES]
    rows = [frequent_policies(actions, labels, label, policies) for label in range(len(names))]
    heights = [STRIP + PICTURE + 0.22 if found else 0.44 for found in rows]
    top = _title_height(title) + 0.4
    figure, sheet = _sheet(top + sum(heights) + 0.3, title)
    gap = 0.2
    width = (WIDTH - 2 * MARGIN - NAME - (policies - 1) * gap) / policies
    lefts = [MARGIN + NAME + rank * (width + gap) for rank in range(policies)]
    for rank, left in enumerate(lefts[: max(map(len, rows))]):
        said = RANKS[rank] if rank < len(RANKS) else f"{rank + 1}th"
        sheet.text(left + width / 2, top - 0.26, said, ha="center", va="bottom")
        _name_stages(sheet, left, top - 0.07, width, _sizes(actions.shape[1], stages))
    y = top
    for label, (name, found, height) in enumerate(zip(names, rows, heights, strict=True)):
        _name_class(sheet, name, actions[labels == label], y)
        for left, one in zip(lefts, found, strict=False):
            _policy(sheet, one, images, left, y, width, _sizes(actions.shape[1], stages))
        y += height
    _explain_strips(sheet, y, len(names), len(classes))
    save(figure, path)


def easy_and_hard(
    path: Path,
    *,
    images: ImageArray,
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    actions: NDArray[np.bool_],
    losses: NDArray[np.floating],
    classes: Sequence[str],
    title: str,
) -> None:
    """Images with the fewest and the most blocks, and whether difficulty explains it (Figure 5).

    Args:
        images: [M, H, W, 3].
        labels: [M], the true classes.
        predicted: [M], under the policies.
        actions: [M, K].
        losses: [M], the full network's: how difficult an image is.
    """
    blocks, correct = actions.sum(axis=1), predicted == labels
    if np.ptp(blocks) > 0:
        fewest, most = extremes(blocks, 2 * COLUMNS)
        groups = [("the fewest blocks", fewest), ("the most blocks", most)]
    else:  # no extremes
        every = spread(np.arange(len(blocks)), 4 * COLUMNS)
        groups = [(f"every image takes {_counted(int(blocks[0]), 'block')}", every)]
    pitch = LARGE_PICTURE + 3 * LINE + 0.1
    lines = sum(-(-len(group) // COLUMNS) for _, group in groups)
    top = _title_height(title)
    height = max(top + 0.26 * len(groups) + pitch * lines + 0.24, 4.6)
    figure, sheet = _sheet(height, title)
    y = top
    for said, group in groups:
        sheet.text(MARGIN, y + 0.17, said, weight="bold", color=INK)
        y += 0.26
        for place, row in enumerate(group):
            left, upper = MARGIN + place % COLUMNS * COLUMN, y + place // COLUMNS * pitch
            _picture(sheet, images[row], left, upper, LARGE_PICTURE)
            _caption(
                sheet, left, upper,
                true=classes[labels[row]], said=classes[predicted[row]], blocks=int(blocks[row]),
                wrong=not correct[row],
            )  # fmt: skip
        y += -(-len(group) // COLUMNS) * pitch
    said = "framed: wrong, → what was predicted; equal numbers of blocks in file order"
    sheet.text(MARGIN, height - MARGIN, said, size=7.5, color=GREY)
    right, wrong, difficulty = _column_of_axes(figure, top + 0.2, (1.2, 0.9, 1.3))
    _blocks_by_outcome(right, wrong, blocks, correct)
    _blocks_by_difficulty(difficulty, blocks, losses)
    save(figure, path)


# ----------------------------------------------------------------------------------- panels of them


def _keep_share_by_class(
    ax: Axes,
    actions: NDArray[np.bool_],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    stages: Stages,
) -> None:
    """A row for each class and one for all images."""
    num_blocks, shown = actions.shape[1], min(len(classes), MAX_ROWS)
    shares = np.full((shown + 1, num_blocks), np.nan)
    for row in range(shown):
        if (labels == row).any():
            shares[row] = actions[labels == row].mean(axis=0)
        else:
            ax.text((num_blocks - 1) / 2, row, "no test images", ha="center", va="center", color=GREY)
    shares[-1] = actions.mean(axis=0)
    image = ax.imshow(shares, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    ax.axhline(shown - 0.5, color="white", linewidth=4)
    sizes = _sizes(num_blocks, stages)
    for border in np.cumsum(sizes[:-1]):
        ax.axvline(border - 0.5, color="white", linewidth=1.5)
    names = [fitting(name, 1.1, 8.5) for name in classes[:shown]]
    ax.set_yticks(range(shown + 1), [*names, "all images"])
    step = next(step for step in (1, 5, 10, 50, 100) if num_blocks <= 20 * step)
    ticks = sorted({1, *range(step, num_blocks + 1, step)})
    ax.set_xticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    left_out = len(classes) - shown
    more = f"; {left_out} of {len(classes)} classes are not shown" if left_out else ""
    ax.set(xlabel=f"block, in {len(sizes)} stages{more}")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, aspect=30, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0", "25", "50", "75", "100"])
    bar.set_label("images that run the block (%)")
    bar.outline.set_visible(False)


def _blocks_by_outcome(
    right: Axes, wrong: Axes, blocks: NDArray[np.int64], correct: NDArray[np.bool_]
) -> None:
    """How many images took how many blocks; scales of their own, since wrong ones are few."""
    for ax, outcome, colour, said in (
        (right, correct, BLUE, "right"),
        (wrong, ~correct, ORANGE, "wrong"),
    ):
        taken, counts = np.unique(blocks[outcome], return_counts=True)
        ax.bar(taken, counts, width=0.85, color=colour)
        ax.set(xlim=(blocks.min() - 0.7, blocks.max() + 0.7), ylabel="images")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        if outcome.any():
            mean = blocks[outcome].mean()
            ax.axvline(mean, color=INK, linestyle="--", linewidth=1)
            ax.set_title(f"{outcome.sum():,} {said}, mean {mean:.2f} blocks")
        else:
            ax.set(title=f"none {said}", ylim=(0, 1), yticks=[], ylabel="")
    wrong.set_xlabel("blocks kept")


def _blocks_by_difficulty(ax: Axes, blocks: NDArray[np.int64], losses: NDArray[np.floating]) -> None:
    quantiles = min(QUANTILES, len(blocks) // 20)
    if quantiles < 2:
        ax.set_axis_off()
        said = "too few images for means by difficulty"
        ax.text(0.5, 0.5, said, ha="center", color=GREY, transform=ax.transAxes)
        return
    means, errors = means_by_quantile(blocks.astype(np.float64), losses, quantiles)
    places = np.arange(1, quantiles + 1)
    ax.axhline(blocks.mean(), color=GREY, linestyle="--", linewidth=1)
    ax.errorbar(places, means, yerr=1.96 * errors, color=BLUE, marker="o", capsize=2.5)
    ax.set(xlim=(0.5, quantiles + 0.5), xticks=places, ylabel="mean blocks")
    ax.set_xlabel("parts by the full network's loss, from low to high")
    ax.set_title("mean blocks by difficulty, with 95 % intervals")
    ax.grid(axis="y")


# ------------------------------------------------------------------------------ what sheets are made of


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
    said = "\n".join(wrapped(title))
    sheet.text(WIDTH / 2, MARGIN, said, size=size, ha="center", va="top")
    return figure, sheet


def _column_of_axes(figure: plt.Figure, top: float, shares: Sequence[float]) -> list[Axes]:
    """Axes one below another at the right of a sheet, high in these proportions."""
    width, height = figure.get_size_inches()
    left, under = MARGIN + COLUMNS * COLUMN + 0.7, (0.55, 0.75, 0.5)
    free = height - top - sum(under)
    axes = []
    for share, space in zip(shares, under, strict=True):
        own = free * share / sum(shares)
        top += own
        box = (left / width, 1 - top / height, 1 - (left + MARGIN) / width, own / height)
        axes.append(figure.add_axes(box))
        top += space
    return axes


def _whole_pixels(inches: float) -> float:
    return round(inches * DPI) / DPI


def _counted(count: int, thing: str) -> str:
    many = f"{thing[:-1]}ies" if thing.endswith("y") else f"{thing}s"
    return f"{count:,} {thing if count == 1 else many}"


def _picture(sheet: Axes, image: NDArray[np.uint8], left: float, top: float, size: float) -> None:
    left, top = _whole_pixels(left), _whole_pixels(top)
    sheet.imshow(image, extent=(left, left + size, top + size, top), aspect="auto")


def _caption(
    sheet: Axes, left: float, top: float, *, true: str, said: str, blocks: int, wrong: bool
) -> None:
    middle, y = left + LARGE_PICTURE / 2, top + LARGE_PICTURE + 0.11
    lines = [(true, INK), (_counted(blocks, "block"), GREY)]
    if wrong:
        lines.append((f"→ {said}", ORANGE))
        frame = Rectangle((left, top), LARGE_PICTURE, LARGE_PICTURE)
        frame.set(fill=False, edgecolor=ORANGE, linewidth=2.2)
        sheet.add_patch(frame)
    for number, (text, colour) in enumerate(lines):
        text = fitting(text, COLUMN - 0.04, 7.5)
        sheet.text(middle, y + number * LINE, text, size=7.5, color=colour, ha="center")


def _sizes(num_blocks: int, stages: Stages) -> Sequence[int]:
    """Blocks in each stage."""
    if stages is not None:
        return stages
    return [len(part) for part in np.array_split(np.arange(num_blocks), STAGES)]


def _strip(
    sheet: Axes,
    policy: NDArray[np.bool_],
    left: float,
    top: float,
    width: float,
    sizes: Sequence[int],
) -> None:
    """A policy [K] as a row of cells, its stages apart."""
    for stage, edges in zip(
        np.split(policy, np.cumsum(sizes[:-1])), _stage_edges(sizes, left, width), strict=True
    ):
        sheet.pcolormesh(
            edges, [top, top + STRIP], stage[None].astype(int),
            cmap=KEPT_OR_DROPPED, vmin=0, vmax=1, edgecolors="white",
            linewidth=0.4 if len(policy) <= 30 else 0.2,
        )  # fmt: skip


def _stage_edges(sizes: Sequence[int], left: float, width: float) -> list[NDArray[np.float64]]:
    """Where the cells of each stage begin and end."""
    num_blocks = sum(sizes)
    cell = (width - (len(sizes) - 1) * STAGE_GAP) / num_blocks
    parts = np.split(np.arange(num_blocks), np.cumsum(sizes[:-1]))
    return [
        left + stage * STAGE_GAP + cell * np.append(part, part[-1] + 1)
        for stage, part in enumerate(parts)
    ]


def _name_stages(sheet: Axes, left: float, y: float, width: float, sizes: Sequence[int]) -> None:
    for stage, edges in enumerate(_stage_edges(sizes, left, width)):
        equal = len(set(sizes)) == 1  # else a short stage has no room for the word
        said = f"stage {stage + 1}" if equal and len(sizes) <= STAGES else f"{stage + 1}"
        sheet.text(edges.mean(), y, said, size=7.5, color=GREY, ha="center", va="bottom")


def _name_class(sheet: Axes, name: str, actions: NDArray[np.bool_], top: float) -> None:
    """A class's name, and how many images [M, K] and policies it has."""
    sheet.plot([MARGIN, WIDTH - MARGIN], [top - 0.06] * 2, color=PALE, linewidth=0.6)
    sheet.text(MARGIN, top + 0.12, fitting(name, NAME - 0.1, 9, "bold"), weight="bold", color=INK)
    lines = ["no test images"]
    if len(actions):
        distinct = len(np.unique(actions, axis=0))
        lines = [_counted(len(actions), "image"), _counted(distinct, "policy")]
    for number, said in enumerate(lines, start=1):
        sheet.text(MARGIN, top + 0.13 + number * 0.15, said, size=8, color=GREY)


def _policy(
    sheet: Axes,
    found: FrequentPolicy,
    images: ImageArray,
    left: float,
    top: float,
    width: float,
    sizes: Sequence[int],
) -> None:
    """A policy as a strip, images that take it under it, and its share of the class beside them."""
    _strip(sheet, found.policy, left, top, width, sizes)
    y, pitch = top + STRIP + 0.04, PICTURE + 0.04
    places = max(1, int((width - 0.65) / pitch))
    for place, row in enumerate(spread(found.images, places)):
        _picture(sheet, images[row], left + place * pitch, y, PICTURE)
    right, blocks = left + width, int(found.policy.sum())
    sheet.text(right, y + 0.17, f"{100 * found.share:.0f} %", ha="right", color=INK)
    sheet.text(right, y + 0.33, _counted(blocks, "block"), size=8, ha="right", color=GREY)


def _explain_strips(sheet: Axes, top: float, shown: int, classes: int) -> None:
    y, x = top + 0.08, MARGIN + NAME
    for colour, said in ((BLUE, "block runs"), (PALE, "block dropped")):
        sheet.add_patch(Rectangle((x, y), STRIP, STRIP, color=colour, linewidth=0))
        sheet.text(x + 0.2, y + 0.12, said, size=8, color=INK)
        x += 1.15
    said = "%: share of the class's images"
    if shown < classes:
        said += f"; the first {shown} of {classes} classes"
    sheet.text(x, y + 0.12, said, size=8, color=INK)
