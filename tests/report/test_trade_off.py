"""The trade-off shows every network where it belongs, and can be read in every case."""

import itertools
import math
import re

import numpy as np
import pytest

from pipeline.report import trade_off
from pipeline.report.paired import wilson

pytestmark = pytest.mark.filterwarnings("error")  # of layouts that fail, and of missing glyphs

TITLE = "ResNet-110 on cifar10"


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(1, 1)], [0]),
        ([(1, 1), (2, 2), (3, 1.5)], [0, 1]),
        ([(3, 3), (1, 1), (2, 2)], [1, 2, 0]),
        ([(1, 2), (1, 3), (2, 3)], [1]),  # equally cheap, equally good
        ([(1, 1), (1, 1)], [0]),
    ],
)
def test_pareto_front_by_hand(points, expected):
    assert trade_off.pareto_front(points) == expected


def test_pareto_front_is_what_nothing_beats():
    points = np.random.default_rng(0).integers(0, 12, (60, 2))
    front = trade_off.pareto_front([(cost, value) for cost, value in points])
    for i, (cost, value) in enumerate(points):
        better = (points[:, 0] <= cost) & (points[:, 1] >= value) & (points != (cost, value)).any(axis=1)
        assert (tuple(points[i]) in {tuple(points[j]) for j in front}) == (not better.any())
    assert sorted(set(points[front, 0])) == points[front, 0].tolist()


def test_mean_by_blocks():
    rows = [
        {"blocks": blocks, "flops": flops, "accuracy": accuracy}
        for blocks, flops, accuracy in ((5, 50, 0.9), (2, 20, 0.5), (2, 22, 0.7))
    ]
    first, second = trade_off.mean_by_blocks(rows)
    assert first == {"blocks": 2, "flops": 21, "accuracy": pytest.approx(0.6), "accuracy_std": 0}
    assert second == {"blocks": 5, "flops": 50, "accuracy": 0.9, "accuracy_std": 0}


def network(kind: str, blocks: int, accuracy: float, *, depth: int = 110, finetuned: int = 0) -> dict:
    return {
        "kind": kind, "depth": depth, "blocks": blocks, "finetuned": finetuned,
        "flops": 9.4e6 * (blocks + 0.5), "accuracy": accuracy,
    }  # fmt: skip


FULL = network("full", 54, 0.932)
SOLES = [network("sole", 3 * n, 0.93 - 0.05 / n, depth=6 * n + 2) for n in (1, 2, 3, 5, 7)]
CURVES = [
    network(kind, blocks, 0.932 - (1 - blocks / 54) ** power + 0.01 * math.sin(blocks))
    for kind, power in (("first", 2), ("random", 3), ("distribute", 4))
    for blocks in range(55)
]
TUNED = [network(kind, 17, 0.91, finetuned=1) for kind in ("first", "random", "distribute")]
OURS = {"accuracy": 0.936, "flops": 1.81e8, "gamma": 10.0, "label": "gamma 10"}
NEAR = {**OURS, "accuracy": 0.9361}
PAPER = {"accuracy": 0.936, "flops": 1.82e8, "label": "Wu et al., gamma 10"}


@pytest.mark.parametrize(
    ("baselines", "blockdrop", "paper"),
    [
        ([FULL, *SOLES, *CURVES, *TUNED], [OURS], [PAPER]),
        ([FULL, *({**row, "accuracy_std": 0.02} for row in CURVES)], [OURS, NEAR], []),
        ([FULL], [{**OURS, "flops": FULL["flops"], "accuracy": FULL["accuracy"]}], []),
        ([FULL, *SOLES], [], []),
        ([], [OURS], []),
        ([{**FULL, "flops": 900, "accuracy": 1.0}], [{**OURS, "flops": 1000, "accuracy": 0.0}], []),
    ],
)
def test_trade_off_in_every_case(tmp_path, drawn, baselines, blockdrop, paper):
    path = tmp_path / "figure.png"
    trade_off.trade_off(
        path, baselines=baselines, blockdrop=blockdrop, paper=paper, title=TITLE, images=99
    )
    drawn.check(path)
    for row in (*blockdrop, *paper):
        assert row["label"] in drawn.words


def test_trade_off_is_about_what_may_compete(tmp_path, drawn):
    far = network("sole", 1, 0.6, depth=8)
    published = {**PAPER, "accuracy": 0.99, "label": "a paper"}
    trade_off.trade_off(
        tmp_path / "figure.png", baselines=[FULL, *SOLES[1:], far, *CURVES, *TUNED], blockdrop=[OURS],
        paper=[published], title=TITLE,
    )  # fmt: skip
    ax, untuned = drawn.figure.axes
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    near = [100 * row["accuracy"] for row in (FULL, OURS)]
    assert low < min(near) < max(near) < high < min(near) + 2
    # what is far off stands at the edge with its number, where its FLOPs are
    assert {"ResNet-8: 60.00 %", "a paper: 99.00 %", "beyond these axes"} <= set(
        drawn.words.splitlines()
    )
    places = np.concatenate([points.get_offsets() for points in ax.collections])
    assert ((places > (left, low)) & (places < (right, high))).all()
    for row in (far, published, FULL, *TUNED):
        assert row["flops"] in places[:, 0]
    assert "100M" in [label.get_text() for label in ax.get_xticklabels()]
    above = ax.child_axes[0]
    np.testing.assert_allclose(above.get_xlim()[1] / 100, right / FULL["flops"])
    # rules without finetuning: all of them, in their own panel
    assert len(untuned.lines) == 3
    for line in untuned.lines:
        assert len(line.get_xdata()) == 55


def test_every_network_is_labelled(tmp_path, drawn):
    ensembles = [
        {**network("ensemble", blocks, 0.925, depth=depth), "name": f"ensemble-{name}"}
        for name, blocks, depth in (("sole-20", 9, 20), ("distribute-17", 17, 110))
    ]
    dial = [{"accuracy": 0.92 + n / 500, "flops": (1 + n) * 6e7, "gamma": 10.0**n} for n in range(5)]
    trade_off.trade_off(
        tmp_path / "figure.png", baselines=[FULL, *SOLES, *TUNED, *ensembles], blockdrop=[OURS],
        dial=dial, title=TITLE,
    )  # fmt: skip
    drawn.check(tmp_path / "figure.png")
    words = {re.sub(r": \d.*%", "", word) for word in drawn.words.splitlines()}
    assert {f"ResNet-{row['depth']}" for row in (FULL, *SOLES)} <= words
    assert {"FirstK 17", "RandomK 17", "DistributeK 17", "gamma 10", "10,000"} <= words
    assert {"policy net + ResNet-20", "policy net + DistributeK 17"} <= words


def test_intervals_are_wilsons(tmp_path, drawn):
    path = tmp_path / "figure.png"
    trade_off.trade_off(path, baselines=[FULL], blockdrop=[OURS], title=TITLE, images=500)
    ax = drawn.figure.axes[0]
    ends = {line.get_xdata()[0]: line.get_ydata() for line in ax.lines}
    for row in (FULL, OURS):
        low, high = wilson(round(500 * row["accuracy"]), 500)
        np.testing.assert_allclose(ends[row["flops"]], (100 * low, 100 * high))
        assert ax.get_ylim()[0] < 100 * low < 100 * high < ax.get_ylim()[1]
    assert "95 % interval, 500 test images" in drawn.words


@pytest.mark.parametrize("seed", range(2))
def test_labels_lie_on_no_other_and_on_no_marker(tmp_path, drawn, seed):
    points = [
        {"accuracy": 0.9 + 0.05 * y, "flops": 1e8 * (1 + x), "label": f"network {n}"}
        for n, (x, y) in enumerate(np.random.default_rng(seed).random((14, 2)))
    ]
    trade_off.trade_off(tmp_path / "figure.png", baselines=[FULL], blockdrop=points, title=TITLE)
    drawn.check(tmp_path / "figure.png")
    ax = drawn.figure.axes[0]
    labels = [box for text, box in drawn.boxes.items() if text.get_text().startswith("network")]
    markers = np.concatenate([points.get_offsets() for points in ax.collections])
    assert len(labels) == len(points)
    assert not any(box.count_contains(ax.transData.transform(markers)) for box in labels)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(labels, 2))


def experiment(gamma: float, seed: int, accuracy: float, flops: float, *, pruned: float = 0.0) -> dict:
    return {
        "name": f"gamma-{gamma:g}-seed-{seed}", "gamma": gamma, "seed": seed, "pruned": pruned,
        "accuracy": accuracy, "flops": flops, "blocks": 9.0,
    }  # fmt: skip


SEEDS = [
    experiment(gamma, seed, 0.9 + 0.005 * gamma + 0.001 * seed, 1e8 * (1 + 0.2 * gamma) + 1e6 * seed)
    for gamma in (1, 2, 5)
    for seed in range(3)
]
RATIOS = [
    experiment(
        gamma, seed, 0.93 - ratio / 20 - 0.1 / gamma, 5e8 * (1 - ratio) * (1 - 0.5 / gamma), pruned=ratio
    )
    for ratio in (0.0, 0.3, 0.5)
    for gamma in (2, 5)
    for seed in range(2)
]
PRUNED = [
    network("pruned", 54, 0.93 - ratio / 30) | {"pruned": ratio, "flops": 5e8 * (1 - ratio)}
    for ratio in (0.3, 0.5)
]


@pytest.mark.parametrize(
    ("experiments", "baselines"),
    [
        (SEEDS, [FULL, *SOLES, *CURVES]),
        (SEEDS[::3], [FULL]),
        (SEEDS[:1], []),
        ([{**SEEDS[0], "gamma": gamma} for gamma in (0.5, 1, 2, 3, 5, 7.5, 10, 20)], [FULL, *SOLES]),
        ([], [FULL, *SOLES]),
        (RATIOS, [FULL, *SOLES, *PRUNED]),
    ],
)
def test_front_in_every_case(tmp_path, drawn, experiments, baselines):
    path = tmp_path / "figure.png"
    trade_off.front(path, experiments=experiments, baselines=baselines, title=TITLE)
    drawn.check(path)
    for row in experiments:
        assert f"gamma {row['gamma']:g}" in drawn.words


def test_front_is_drawn_through_the_means_that_are_not_beaten(tmp_path, drawn):
    worse = [experiment(3, seed, 0.8, 1.5e8) for seed in range(2)]
    trade_off.front(tmp_path / "figure.png", experiments=[*SEEDS, *worse], baselines=[], title=TITLE)
    (steps,) = (line for line in drawn.figure.axes[0].lines if line.get_label() == "Pareto front")
    x, y = steps.get_data()
    np.testing.assert_allclose(x / 1e6, [121, 141, 141, 201, 201])
    np.testing.assert_allclose(y, [90.6, 90.6, 91.1, 91.1, 92.6])


def test_front_of_several_ratios_has_a_line_for_each(tmp_path, drawn):
    baselines = [FULL, *PRUNED]
    trade_off.front(tmp_path / "figure.png", experiments=RATIOS, baselines=baselines, title=TITLE)
    ax = drawn.figure.axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    for ratio, said in ((0, "not pruned"), (0.3, "30 % of the channels pruned")):
        of_gammas = 5e8 * (1 - ratio) * (1 - 0.5 / np.array([2, 5]))
        np.testing.assert_allclose(lines[said].get_xdata(), of_gammas)
    assert drawn.words.count("pruned, every block") == 1
    assert drawn.words.count("gamma 2") == drawn.words.count("gamma 5") == 3


def test_trade_off_is_the_same_bytes_again(tmp_path):
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        trade_off.trade_off(
            path, baselines=[FULL, *SOLES, *CURVES, *TUNED], blockdrop=[OURS], paper=[PAPER], title=TITLE
        )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
