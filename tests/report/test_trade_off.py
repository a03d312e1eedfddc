"""The trade-off shows every network where it belongs, and can be read in every case."""

import math

import numpy as np
import pytest

from pipeline.report import trade_off

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
    trade_off.trade_off(path, baselines=baselines, blockdrop=blockdrop, paper=paper, title=TITLE)
    drawn.check(path)
    for row in (*blockdrop, *paper):
        assert row["label"] in drawn.words


def test_trade_off_is_about_what_may_compete(tmp_path, drawn):
    baselines = [FULL, *SOLES, *CURVES, *TUNED]
    trade_off.trade_off(tmp_path / "figure.png", baselines=baselines, blockdrop=[OURS], title=TITLE)
    ax = drawn.figure.axes[0]
    low, high = ax.get_ylim()
    serious = [100 * row["accuracy"] for row in (FULL, *SOLES, *TUNED, OURS)]
    assert low < min(serious) < max(serious) < high
    assert min(100 * row["accuracy"] for row in CURVES) < low  # they leave the frame
    assert high - low < 1.5 * (max(serious) - min(serious))
    resnets = next(line for line in ax.lines if line.get_marker() == "s")
    np.testing.assert_allclose(resnets.get_xdata()[-1], FULL["flops"])
    assert "100M" in [label.get_text() for label in ax.get_xticklabels()]
    above = ax.child_axes[0]
    np.testing.assert_allclose(above.get_xlim()[1] / 100, ax.get_xlim()[1] / FULL["flops"])
    assert {f"ResNet-{row['depth']}" for row in (FULL, *SOLES)} <= set(drawn.words.splitlines())


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
