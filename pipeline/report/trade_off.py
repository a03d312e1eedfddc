"""Accuracy against cost: BlockDrop, rules that keep the same blocks for all, and shallower ResNets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike, NDArray

from pipeline.plotting import BLUE, GREEN, GREY, INK, ORANGE, PINK, WIDTH, headline, save

Row = Mapping[str, Any]
RULES = (  # static ones: name, what it keeps, colour, marker
    ("first", "the first blocks", BLUE, "v"),
    ("random", "random blocks", PINK, "o"),
    ("distribute", "evenly spread blocks", GREEN, "D"),
)
SIDES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
DISTANCES = (5, 8, 12, 16, 22, 30, 40)
PLACES = [(distance, *side) for distance in DISTANCES for side in SIDES]  # of labels, in points
RADIUS = 10  # pixels of a marker
Label = tuple[float, float, str]  # what is said of a point, in units of the axes


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (cost, value) no other one beats, by rising cost.

    One point beats another if it costs no more and is worth no less, and is better in one of the two;
    of equal points the first is on the front.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def mean_by_blocks(rows: Sequence[Row]) -> list[dict[str, float]]:
    """FLOPs, accuracy and its standard deviation by rising number of blocks.

    Means where several rows have the same number; the deviation is 0 where a row has none.
    """
    found = []
    for blocks in sorted({row["blocks"] for row in rows}):
        own = [row for row in rows if row["blocks"] == blocks]
        names = ("flops", "accuracy", "accuracy_std")
        means = {name: float(np.mean([row.get(name, 0.0) for row in own])) for name in names}
        found.append({"blocks": blocks, **means})
    return found


def trade_off(
    path: Path,
    *,
    baselines: Sequence[Row],
    blockdrop: Sequence[Row],
    title: str,
    paper: Sequence[Row] = (),
    dial: Sequence[Row] = (),
) -> None:
    """Accuracy against FLOPs per image: does looking at the image beat every static network?

    Args:
        baselines: {kind, depth, blocks, finetuned, flops, accuracy}; kind is full, sole, pruned, first,
            random, distribute or ensemble. Rows of one rule, number of blocks and finetuning are drawn
            as their mean; a band where some have accuracy_std, of several draws.
        blockdrop: {accuracy, flops, label}, one or several.
        paper: {accuracy, flops, label}: published numbers.
        dial: {accuracy, flops}: BlockDrop's networks at other gammas.
    """
    figure, ax = plt.subplots(figsize=(WIDTH, 5.2), layout="constrained")
    static = [row for row in baselines if row["kind"] in ("full", "sole")]
    labels = _draw_resnets(ax, static)
    labels += _draw_stars(ax, blockdrop, "BlockDrop", ORANGE, INK)
    labels += _draw_stars(ax, paper, "published", "white", ORANGE)
    tuned = [row for row in baselines if row["finetuned"]]
    _draw_rules(ax, [row for row in baselines if not row["finetuned"]], tuned=False)
    _draw_rules(ax, tuned, tuned=True)
    ensembles = [row for row in baselines if row["kind"] == "ensemble"]
    if ensembles:
        said = "policy network and another one, averaged"
        ax.scatter(*_columns(ensembles), s=36, color=GREY, marker="P", zorder=3, label=said)
    pruned = [row for row in baselines if row["kind"] == "pruned"]
    if pruned:
        ax.scatter(*_columns(pruned), s=52, color=INK, marker="X", zorder=3, label="pruned, every block")
    if dial:
        ax.plot(*_columns(dial), ".-", color=ORANGE, linewidth=1.2, label="BlockDrop at other gammas")
    _frame(ax, [*static, *tuned, *ensembles, *pruned, *blockdrop, *paper, *dial])
    headline(figure, title)
    _finish(figure, ax, labels)
    save(figure, path)


def front(path: Path, *, experiments: Sequence[Row], baselines: Sequence[Row], title: str) -> None:
    """What gamma buys: every experiment, the mean of each gamma, and which of them are not beaten.

    Experiments of several ratios of pruning are drawn as a line of gammas for each ratio.

    Args:
        experiments: {name, gamma, seed, pruned, accuracy, flops, blocks}; pruned is the ratio.
        baselines: as for `trade_off`; the full ResNet and sole ones are drawn, and pruned ones with
            every block, whose rows have `pruned` too.
    """
    figure, ax = plt.subplots(figsize=(WIDTH, 4.8), layout="constrained")
    static = [row for row in baselines if row["kind"] in ("full", "sole")]
    labels = _draw_resnets(ax, static)
    ratios = sorted({row["pruned"] for row in experiments})
    means: list[tuple[float, float]] = []
    for ratio in ratios:
        own = [row for row in experiments if row["pruned"] == ratio]
        gammas = sorted({row["gamma"] for row in own})
        line = []
        for place, gamma in enumerate(gammas):
            x, y = _columns([row for row in own if row["gamma"] == gamma])
            by_ratio = len(ratios) > 1
            shade = (
                ratios.index(ratio) / (len(ratios) - 1) if by_ratio else place / max(1, len(gammas) - 1)
            )
            colour = plt.get_cmap("cividis")(0.9 * shade)
            if len(x) > 1:
                _draw_seeds(ax, x, y, colour)
            line.append((float(x.mean()), float(y.mean())))
            ax.plot(*line[-1], "o", color=colour, markersize=9, markeredgecolor=INK, zorder=4)
            labels.append((*line[-1], f"gamma {gamma:g}"))
        if len(ratios) > 1:
            pruned = [row for row in baselines if row["kind"] == "pruned" and row["pruned"] == ratio]
            _draw_ratio(ax, line, pruned, ratio, colour)
        means += line
    if any(row["kind"] == "pruned" for row in baselines):
        ax.scatter([], [], s=52, color=GREY, marker="X", label="pruned, every block")
    of_means = len(experiments) > len(means)
    said = "BlockDrop, mean of its seeds" if of_means else "BlockDrop"
    ax.plot([], [], "o", color=GREY, markersize=9, markeredgecolor=INK, label=said)
    if of_means:
        _draw_seeds(ax, [], [], GREY, "one seed")
    _draw_front(ax, means)
    _frame(ax, [*experiments, *baselines])
    headline(figure, title)
    _finish(figure, ax, labels)
    save(figure, path)


def _draw_ratio(
    ax: Axes, means: Sequence[tuple[float, float]], pruned: Sequence[Row], ratio: float, colour: Any
) -> None:
    """The line of a ratio's gammas, and the pruned ResNet with every block."""
    said = f"{100 * ratio:g} % of the channels pruned" if ratio else "not pruned"
    ax.plot(*zip(*means, strict=True), color=colour, linewidth=1.2, label=said)
    if pruned:
        ax.scatter(*_columns(pruned), s=52, color=colour, marker="X", zorder=3)


def _columns(rows: Sequence[Row]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """FLOPs, and accuracies in percent."""
    columns = np.array([(row["flops"], 100 * row["accuracy"]) for row in rows]).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def _draw_resnets(ax: Axes, rows: Sequence[Row]) -> list[Label]:
    """The full ResNet joined with those of other depths that were trained for themselves; labels."""
    rows = sorted(rows, key=lambda row: row["flops"])
    if not rows:
        return []
    x, y = _columns(rows)
    ax.plot(x, y, color=INK, marker="s", label="ResNets with every block")
    return [(*place, f"ResNet-{row['depth']}") for row, *place in zip(rows, x, y, strict=True)]


def _draw_stars(ax: Axes, rows: Sequence[Row], legend: str, face: str, edge: str) -> list[Label]:
    """Large stars; their labels."""
    if not rows:
        return []
    x, y = _columns(rows)
    stars = ax.scatter(x, y, s=230, marker="*", zorder=5, label=legend)
    stars.set(facecolor=face, edgecolor=edge, linewidth=0.9)
    return [(*place, str(row["label"])) for row, *place in zip(rows, x, y, strict=True)]


def _draw_rules(ax: Axes, rows: Sequence[Row], *, tuned: bool) -> None:
    """Static rules: filled markers where the ResNet was finetuned under them, thin curves otherwise."""
    for kind, said, colour, marker in RULES:
        own = mean_by_blocks([row for row in rows if row["kind"] == kind])
        if own and tuned:
            points = ax.scatter(*_columns(own), s=42, color=colour, marker=marker, zorder=3)
            points.set(label=f"{said}, finetuned", edgecolor=INK, linewidth=0.6)
        elif own:
            x, y = _columns(own)
            std = np.array([100 * row["accuracy_std"] for row in own])
            (line,) = ax.plot(x, y, color=colour, linewidth=1, linestyle="--")
            line.set_label(f"{said}, not finetuned")
            if std.any():
                ax.fill_between(x, y - std, y + std, color=colour, alpha=0.15, linewidth=0)
                line.set_label(f"{said}, not finetuned (± std)")


def _draw_seeds(ax: Axes, x: ArrayLike, y: ArrayLike, colour: Any, legend: str | None = None) -> None:
    ax.scatter(x, y, s=18, color=colour, edgecolor=INK, linewidth=0.3, zorder=3, label=legend)


def _draw_front(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Steps: what accuracy the points give for at most so many FLOPs."""
    x, y = np.array([points[i] for i in pareto_front(points)]).reshape(-1, 2).T
    if len(x) > 1:
        label = "Pareto front"
        ax.plot(np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1], color=ORANGE, linewidth=1.2, label=label)


def _frame(ax: Axes, rows: Sequence[Row]) -> None:
    """Axes that show these rows; others may leave below. Above, the share of the full FLOPs."""
    accuracies = [100 * row["accuracy"] for row in rows]
    low, high = min(accuracies), max(accuracies)
    margin = 0.12 * max(high - low, 2.0)
    ax.set_ylim(low - margin, high + 1.3 * margin)
    ax.set_xlim(0, 1.06 * ax.dataLim.x1)
    ax.set(xlabel="FLOPs per image (2 per multiply-add)", ylabel="test accuracy (%)")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.grid()
    full = [row["flops"] for row in rows if row.get("kind") == "full"]
    if full:
        percent = 100 / full[0]
        both_ways = (lambda x: np.multiply(x, percent), lambda x: np.divide(x, percent))
        top = ax.secondary_xaxis("top", functions=both_ways)
        top.set_xlabel("% of the full ResNet's FLOPs")


def _finish(figure: plt.Figure, ax: Axes, labels: Sequence[Label]) -> None:
    """The legend, and the labels beside their points where nothing is in the way."""
    handles, _ = ax.get_legend_handles_labels()
    columns = 3 if len(handles) > 4 else max(1, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.draw_without_rendering()  # from here on it is known where everything is
    drawn, boxes = _drawn(ax), list[Bbox]()
    for x, y, said in labels:
        text = ax.annotate(
            said, (x, y), (0, 0), textcoords="offset points", size=8.5, color=INK, zorder=6
        )
        text.set_in_layout(False)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])

        def cost(place: tuple[float, int, int], text: Annotation = text) -> float:
            box = _move(text, *place)
            outside = ax.bbox.count_contains(box.corners()) < 4
            hidden = (
                box.padded(RADIUS).count_contains(drawn)
                + 100 * box.count_overlaps(boxes)
                + 1000 * outside
            )
            return hidden + place[0]  # far from its point, a label may be taken for another's

        boxes.append(_move(text, *min(PLACES, key=cost)))


def _move(text: Annotation, distance: float, right: int, up: int) -> Bbox:
    """Write a label at some points from what it names; where that is, in pixels."""
    text.set(position=(distance * right, distance * up))
    text.set(ha=("right", "center", "left")[right + 1], va=("top", "center", "bottom")[up + 1])
    return text.get_window_extent().padded(2)


def _drawn(ax: Axes) -> NDArray[np.float64]:
    """Pixels [P, 2] along the lines, and in the middle of markers."""
    lines = [line for line in ax.lines if np.size(line.get_xdata())]
    markers = [each for each in ax.collections if isinstance(each, PathCollection)]
    found = [ax.transData.transform_path(line.get_path()).interpolated(50).vertices for line in lines]
    found += [ax.transData.transform(each.get_offsets()) for each in markers]
    return np.concatenate([np.zeros((0, 2)), *found])
