"""Accuracy against cost: BlockDrop, rules that keep the same blocks for all, and shallower ResNets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from pipeline.plotting import BLUE, GREEN, GREY, INK, ORANGE, PINK, WIDTH, headline, save
from pipeline.report.labels import SIZE, Label, place
from pipeline.report.paired import wilson

Row = Mapping[str, Any]
REACH = 0.25  # of the span of what a figure is about: networks that are farther off stand at its edge
LEAST_SPAN = 1.0  # points of accuracy that an axis shows
MARGIN = 0.07  # of the span that is shown
EDGE = 0.03  # of the axis: how far inside the arrow to a network outside stands
SMALL = 7.0  # points, of a number beside a small marker


class Look(NamedTuple):
    """How a kind of network is drawn, and what the legend says of it."""

    said: str
    face: Any
    marker: str
    size: float
    edge: Any = INK


class Mark(NamedTuple):
    """A network in a figure."""

    flops: float
    accuracy: float  # percent
    label: str
    look: Look


RESNETS = Look("ResNets with every block", INK, "s", 36)
LOOKS = {
    "full": RESNETS,
    "sole": RESNETS,
    "pruned": Look("pruned, every block", INK, "X", 52),
    "first": Look("FirstK, finetuned", BLUE, "v", 42),
    "random": Look("RandomK, finetuned", PINK, "o", 42),
    "distribute": Look("DistributeK, finetuned", GREEN, "D", 42),
    "ensemble": Look("averaged with the policy network", GREY, "P", 42, GREY),
}
BLOCKDROP = Look("BlockDrop", ORANGE, "*", 230)
AT_GAMMAS = Look("BlockDrop at other gammas", ORANGE, "o", 14, ORANGE)
PUBLISHED = Look("published, other recipes", "white", "*", 230, ORANGE)
ONE_SEED = Look("one seed", GREY, "o", 18)
RULES = {"first": "FirstK", "random": "RandomK", "distribute": "DistributeK"}


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


# ------------------------------------------------------------------------------------- the figures


def trade_off(
    path: Path,
    *,
    baselines: Sequence[Row],
    blockdrop: Sequence[Row],
    title: str,
    paper: Sequence[Row] = (),
    dial: Sequence[Row] = (),
    images: int | None = None,
) -> None:
    """Accuracy against FLOPs per image: does looking at the image beat every static network?

    The axes are about BlockDrop and what competes with it; a network that is far off stands at their
    edge, with its accuracy. Rules without finetuning have a panel of their own with all accuracies.

    Args:
        baselines: {kind, depth, blocks, finetuned, flops, accuracy}; kind is full, sole, pruned, first,
            random, distribute or ensemble, whose rows have a name too. Rows of one rule, number of
            blocks and finetuning are drawn as their mean; a band where some have accuracy_std, of
            several draws.
        blockdrop: {accuracy, flops, label}, one or several.
        paper: {accuracy, flops, label}: published numbers.
        dial: {accuracy, flops, gamma}: BlockDrop's networks at other gammas.
        images: how many test images the accuracies are of, which gives their intervals; None: without.
    """
    untuned = [row for row in baselines if row["kind"] in RULES and not row["finetuned"]]
    rivals = _rivals(baselines)
    ours = [_mark(row, row["label"], BLOCKDROP) for row in blockdrop]
    at_gammas = [_mark(row, _short(row["gamma"]), AT_GAMMAS) for row in dial]
    others = [_mark(row, row["label"], PUBLISHED) for row in paper]
    ratios = (2.8, 1) if untuned else (1,)
    figure, panels = plt.subplots(
        1, len(ratios), figsize=(WIDTH, 5.0), width_ratios=ratios, layout="constrained", squeeze=False
    )
    ax = panels[0, 0]
    _frame(ax, [*ours, *at_gammas, *_largest(rivals)], rivals, images, also=others)
    _percent_axis(ax, baselines)
    _draw_intervals(ax, [*rivals, *ours], images)
    _join([mark for mark in rivals if mark.look is RESNETS], ax, color=INK)
    _join(at_gammas, ax, color=ORANGE)
    labels = _draw(ax, [*rivals, *at_gammas, *ours, *others])
    headline(figure, title)
    _legend(ax, [*rivals, *ours, *at_gammas, *others], images)
    place(ax, labels)
    for panel in panels[0, 1:]:
        place(panel, _draw_untuned(panel, untuned, [*_largest(rivals), *ours], around=ax))
    save(figure, path)


def front(
    path: Path,
    *,
    experiments: Sequence[Row],
    baselines: Sequence[Row],
    title: str,
    images: int | None = None,
) -> None:
    """What gamma buys: every experiment, the mean of each gamma, and which of them are not beaten.

    Experiments of several ratios of pruning are drawn as a line of gammas for each ratio.

    Args:
        experiments: {name, gamma, seed, pruned, accuracy, flops, blocks}; pruned is the ratio.
        baselines: as for `trade_off`; the full ResNet and sole ones are drawn, and pruned ones with
            every block, whose rows have `pruned` too.
        images: how many test images the accuracies are of, which gives the intervals of networks that
            are no mean of several; None: without.
    """
    figure, ax = plt.subplots(figsize=(WIDTH, 4.8), layout="constrained")
    ratios = sorted({row["pruned"] for row in experiments})
    colour_of = _colours(ratios, experiments)
    rivals = _rivals([row for row in baselines if row["kind"] in ("full", "sole")])
    rivals += [
        _mark(row, "", LOOKS["pruned"]._replace(face=colour_of.get(row["pruned"], INK)))
        for row in baselines
        if row["kind"] == "pruned"
    ]
    means, seeds = _means(experiments, colour_of)
    _frame(ax, means or rivals, [*rivals, *seeds], images)
    _percent_axis(ax, baselines)
    _draw_intervals(ax, [*rivals, *([] if seeds else means)], images)
    _join([mark for mark in rivals if mark.look is RESNETS], ax, color=INK)
    for ratio in ratios if len(ratios) > 1 else ():
        of_ratio = [mean for mean in means if mean.look.face == colour_of[ratio]]
        said = f"{100 * ratio:g} % of the channels pruned" if ratio else "not pruned"
        _join(of_ratio, ax, color=colour_of[ratio], linewidth=1.2, label=said)
    _draw_front(ax, [(mean.flops, mean.accuracy) for mean in means])
    labels = _draw(ax, [*rivals, *seeds, *means])
    headline(figure, title)
    _legend(ax, [*rivals, *means, *seeds], images)
    place(ax, labels)
    save(figure, path)


# ----------------------------------------------------------------------------- what is to be drawn


def _mark(row: Row, label: str, look: Look) -> Mark:
    return Mark(row["flops"], 100 * row["accuracy"], label, look)


def _rivals(baselines: Sequence[Row]) -> list[Mark]:
    """All but the rules without finetuning, by rising FLOPs."""
    marks = [
        _mark(row, _label_of(row), LOOKS[row["kind"]]) for row in baselines if row["kind"] not in RULES
    ]
    for kind, name in RULES.items():
        rows = [row for row in baselines if row["kind"] == kind and row["finetuned"]]
        marks += [_mark(row, f"{name} {row['blocks']:g}", LOOKS[kind]) for row in mean_by_blocks(rows)]
    return sorted(marks, key=lambda mark: mark.flops)


def _label_of(row: Row) -> str:
    if row["kind"] != "ensemble":
        return f"ResNet-{row['depth']}" + (", pruned" if row["kind"] == "pruned" else "")
    kind, _, size = row["name"].removeprefix("ensemble-").partition("-")
    member = f"{RULES[kind]} {size}" if kind in RULES else f"ResNet-{row['depth']}"
    return f"policy net + {'pruned ' * (kind == 'pruned')}{member}"


def _largest(marks: Sequence[Mark]) -> list[Mark]:
    """The full ResNet, which takes the most FLOPs of those with every block; empty without any."""
    return [mark for mark in marks if mark.look is RESNETS][-1:]


def _short(gamma: float) -> str:
    return f"{float(f'{gamma:.2g}'):,g}"


def _colours(ratios: Sequence[float], experiments: Sequence[Row]) -> dict[float, Any]:
    """Of each ratio of pruning where there are several, else of each gamma."""
    values = ratios if len(ratios) > 1 else sorted({row["gamma"] for row in experiments})
    shades = plt.get_cmap("cividis")(np.linspace(0, 0.9, max(1, len(values))))
    return {value: tuple(shade) for value, shade in zip(values, shades, strict=False)}


def _means(experiments: Sequence[Row], colour_of: Mapping[float, Any]) -> tuple[list[Mark], list[Mark]]:
    """The mean of each ratio and gamma; and each experiment where one of these has several seeds."""
    means, seeds = [], []
    several = len({row["pruned"] for row in experiments}) > 1
    said = "BlockDrop"
    for ratio, gamma in sorted({(row["pruned"], row["gamma"]) for row in experiments}):
        own = [row for row in experiments if (row["pruned"], row["gamma"]) == (ratio, gamma)]
        colour = colour_of[ratio if several else gamma]
        mean = {name: float(np.mean([row[name] for row in own])) for name in ("flops", "accuracy")}
        means.append(_mark(mean, f"gamma {gamma:g}", Look(said, colour, "o", 81)))
        seeds += [_mark(row, "", ONE_SEED._replace(face=colour)) for row in own if len(own) > 1]
    if seeds:
        said = "BlockDrop, mean of its seeds"
        means = [mean._replace(look=mean.look._replace(said=said)) for mean in means]
    return means, seeds


# ------------------------------------------------------------------------------------- the drawing


def _interval(mark: Mark, images: int | None) -> tuple[float, float]:
    """Wilson's 95 % interval, in percent; without a number of images the accuracy alone."""
    if images is None:
        return mark.accuracy, mark.accuracy
    low, high = wilson(round(mark.accuracy / 100 * images), images)
    return 100 * low, 100 * high


def _frame(
    ax: Axes,
    core: Sequence[Mark],
    others: Sequence[Mark],
    images: int | None,
    also: Sequence[Mark] = (),
) -> None:
    """Axes with all FLOPs, and accuracies of `core`, and of those of the others that are not far off.

    Args:
        also: what has no say in which accuracies are shown.
    """
    ends = [end for mark in core for end in _interval(mark, images)]
    low, high = min(ends), max(ends)
    reach = REACH * max(high - low, LEAST_SPAN)
    near = [mark for mark in others if low - reach <= mark.accuracy <= high + reach]
    ends += [end for mark in near for end in _interval(mark, images)]
    flops = [mark.flops for mark in (*core, *others, *also)]
    ax.set_xlim(*_with_margin(min(flops), max(flops), least=0.2 * max(flops)))
    bottom, top = _with_margin(min(ends), max(ends), least=LEAST_SPAN)
    ax.set_ylim(bottom, min(top, 100 + MARGIN * (top - bottom)))
    ax.set(xlabel="FLOPs per image (2 per multiply-add)", ylabel="test accuracy (%)")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.grid()


def _with_margin(low: float, high: float, *, least: float) -> tuple[float, float]:
    margin = MARGIN * max(high - low, least)
    return low - margin, high + margin


def _percent_axis(ax: Axes, baselines: Sequence[Row]) -> None:
    """Above, the share of the full FLOPs."""
    full = [row["flops"] for row in baselines if row["kind"] == "full"]
    if full:
        percent = 100 / full[0]
        both_ways = (lambda x: np.multiply(x, percent), lambda x: np.divide(x, percent))
        top = ax.secondary_xaxis("top", functions=both_ways)
        top.set_xlabel("% of the full ResNet's FLOPs")


def _draw_intervals(ax: Axes, marks: Sequence[Mark], images: int | None) -> None:
    """Vertical lines; none of a network outside the axes, of which an arrow stands at the edge."""
    bottom, top = ax.get_ylim()
    for mark in marks if images else ():
        if bottom <= mark.accuracy <= top:
            look = {"color": mark.look.face, "linewidth": 1.1, "alpha": 0.6}
            ax.plot([mark.flops] * 2, _interval(mark, images), **look)


def _join(marks: Sequence[Mark], ax: Axes, **look: Any) -> None:
    if len(marks) > 1:
        ax.plot([mark.flops for mark in marks], [mark.accuracy for mark in marks], zorder=2.2, **look)


def _draw(ax: Axes, marks: Sequence[Mark]) -> list[Label]:
    """Markers; an arrow at the edge for what is outside. Their labels, which are still to be placed."""
    labels = []
    bottom, top = ax.get_ylim()
    inset = EDGE * (top - bottom)
    for mark in marks:
        x, y, label, look = mark
        if not bottom <= y <= top:
            label += f": {y:.2f} %"
            look = look._replace(marker="^" if y > top else "v", size=60, face=look.edge)
            y = top - inset if y > top else bottom + inset
        points = ax.scatter(x, y, look.size, marker=look.marker, zorder=3 + (look is BLOCKDROP))
        points.set(facecolor=look.face, edgecolor=look.edge, linewidth=0.7)
        if label:
            size, colour = (SMALL, ORANGE) if look is AT_GAMMAS else (SIZE, INK)
            labels.append(Label(x, y, label, look.size**0.5 / 2, size, colour))
    return labels


def _draw_untuned(ax: Axes, rows: Sequence[Row], marks: Sequence[Mark], *, around: Axes) -> list[Label]:
    """Static rules without finetuning, with all accuracies, and what the axes `around` show of them."""
    labels = []
    ax.set_ylim(0, 104)
    for kind, name in RULES.items():
        own = mean_by_blocks([row for row in rows if row["kind"] == kind])
        if own:
            x, y, std = np.array(
                [(row["flops"], 100 * row["accuracy"], 100 * row["accuracy_std"]) for row in own]
            ).T
            ax.plot(x, y, color=LOOKS[kind].face, linewidth=1.2)
            ax.fill_between(x, y - std, y + std, color=LOOKS[kind].face, alpha=0.2, linewidth=0)
            middle = np.abs(y - (y.min() + y.max()) / 2).argmin()
            labels.append(Label(x[middle], y[middle], name, 0, SIZE, LOOKS[kind].face))
    _draw(ax, [mark._replace(look=mark.look._replace(size=mark.look.size / 2)) for mark in marks])
    (left, right), (bottom, top) = around.get_xlim(), around.get_ylim()
    ax.add_patch(Rectangle((left, bottom), right - left, top - bottom)).set(fill=False, edgecolor=GREY)
    ax.set_title("rules without finetuning\n(framed: the other panel)", size=8.5)
    ax.set_xlabel("FLOPs per image")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid()
    return labels


def _draw_front(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Steps: what accuracy the points give for at most so many FLOPs."""
    x, y = np.array([points[i] for i in pareto_front(points)]).reshape(-1, 2).T
    if len(x) > 1:
        label = "Pareto front"
        ax.plot(np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1], color=ORANGE, linewidth=1.2, label=label)


def _legend(ax: Axes, marks: Sequence[Mark], images: int | None) -> None:
    """Each kind of network once, then the lines that have a name, then what arrows and intervals are."""
    looks: dict[str, Look] = {}
    for look in (mark.look for mark in marks):
        several = look.said in looks and looks[look.said].face != look.face
        looks[look.said] = look._replace(face=GREY) if several else look
    handles: list[Artist] = [
        Line2D([], [], linestyle="", marker=look.marker, markersize=look.size**0.5, label=said,
               markerfacecolor=look.face, markeredgecolor=look.edge, markeredgewidth=0.7)
        for said, look in looks.items()
    ]  # fmt: skip
    handles += ax.get_legend_handles_labels()[0]
    bottom, top = ax.get_ylim()
    if not all(bottom <= mark.accuracy <= top for mark in marks):
        said = "beyond these axes"
        handles.append(Line2D([], [], linestyle="", color=INK, marker="v", markersize=7, label=said))
    if images:
        handles.append(Line2D([], [], color=GREY, label=f"95 % interval, {images:,} test images"))
    columns = 3 if len(handles) > 4 else max(1, len(handles))
    figure: Any = ax.get_figure(root=True)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
