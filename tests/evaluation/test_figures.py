"""Figures show what they are given, are readable in every case, and are the same bytes again."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text
from PIL import Image

from pipeline.benchmark import figures
from pipeline.evaluation import learning_curves, policy_figures
from pipeline.plotting import DPI, WIDTH, fitting
from pipeline.report import trade_off

pytestmark = pytest.mark.filterwarnings("error")  # of layouts that fail, and of missing glyphs

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TITLE = "ResNet-110: 93.60 % with 16.93 of 54 blocks (all blocks: 93.20 %)"


class Drawn:
    """The last figure that was saved, with the texts that are in the picture and where."""

    def __init__(self) -> None:
        self.figure: Figure | None = None
        self.texts: dict[Text, tuple[float, float, float, float]] = {}

    def find(self, kind: type) -> list:
        return self.figure.findobj(kind, include_self=False)

    def said(self) -> str:
        return "\n".join(text.get_text() for text in self.texts)

    def check(self, path: Path) -> None:
        """A PNG of the right width, no text cut off, and none on another."""
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width == WIDTH * DPI
        assert self.texts
        boxes = np.array(list(self.texts.values()))
        boxes += np.array([1, 1, -1, -1])  # a pixel may be shared
        names = [text.get_text() for text in self.texts]
        width, height = self.figure.bbox.size
        for name, (x0, y0, x1, y1) in zip(names, boxes, strict=True):
            assert min(x0, y0) >= 0, name
            assert (x1 <= width, y1 <= height) == (True, True), name
        for one in range(len(boxes)):
            x0, y0, x1, y1 = boxes[one + 1 :].T
            a0, b0, a1, b1 = boxes[one]
            on_it = np.flatnonzero((x0 < a1) & (x1 > a0) & (y0 < b1) & (y1 > b0))
            assert not len(on_it), (names[one], names[one + 1 + on_it[0]])


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    found, save, draw = Drawn(), Figure.savefig, Text.draw

    def note_figure(figure, *args, **kwargs):
        found.figure = figure
        found.texts.clear()
        return save(figure, *args, **kwargs)

    def note_text(text, renderer, *args, **kwargs):
        if text.get_visible() and text.get_text().strip():
            found.texts[text] = text.get_window_extent(renderer).extents
        return draw(text, renderer, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", note_figure)
    monkeypatch.setattr(Text, "draw", note_text)
    return found


# ----------------------------------------------------------------------------------- learning curves


def rows_of(epochs: int, num_blocks: int, *, learnt: int | None = None) -> list[dict[str, float]]:
    """A table of the curriculum (learnt None: one more block an epoch) or of the finetuning."""
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "validation_active_blocks": learnt or min(epoch, num_blocks)}
        for split in ("train", "validation"):
            row |= {
                f"{split}_{name}": epoch / epochs for name in ("accuracy", "reward", "entropy", "loss")
            }
        row |= {"train_reward": -epoch, "train_blocks": num_blocks / 2}
        row |= {"validation_blocks_mean": num_blocks / 3, "validation_effective_policies": epoch**2}
        rows.append({key: float(value) for key, value in row.items()})
    return rows


@pytest.mark.parametrize(
    ("curriculum", "finetune", "num_blocks"),
    [(20, 40, 15), (60, 3, 54), (2, 900, 6), (5, 0, 54), (0, 1, 6), (1, 0, 6), (1, 1, 15), (0, 0, 15)],
)
def test_learning_curves(tmp_path, drawn, curriculum, finetune, num_blocks):
    path = tmp_path / "new" / "curves.png"
    learning_curves.learning_curves(
        path,
        curriculum=rows_of(curriculum, num_blocks),
        finetune=rows_of(finetune, num_blocks, learnt=num_blocks),
        num_blocks=num_blocks,
    )
    drawn.check(path)
    assert ("imported" in drawn.said()) == (curriculum + finetune == 0)
    assert ("joint finetuning begins" in drawn.said()) == (curriculum * finetune > 0)


def test_both_stages_are_on_one_axis_and_say_where_the_curriculum_is(tmp_path, drawn):
    learning_curves.learning_curves(
        tmp_path / "curves.png",
        curriculum=rows_of(4, 6),
        finetune=rows_of(2, 6, learnt=6),
        num_blocks=6,
    )
    accuracy, _, blocks = drawn.figure.axes[:3]
    first, also_first, second = (line.get_xydata() for line in accuracy.lines[:3])
    np.testing.assert_allclose(first, [[1, 25], [2, 50], [3, 75], [4, 100]])
    np.testing.assert_allclose(first, also_first)  # training and validation
    np.testing.assert_allclose(second, [[5, 50], [6, 100]])
    assert accuracy.lines[-1].get_xdata()[0] == 4.5  # the border
    (waiting,) = (patch for patch in blocks.patches if isinstance(patch, StepPatch))
    np.testing.assert_array_equal(waiting.get_data().values, [5, 4, 3, 2])
    np.testing.assert_array_equal(waiting.get_data().edges, [0.5, 1.5, 2.5, 3.5, 4.5])


@pytest.mark.parametrize("epochs", [1, 20, 400])
def test_training_curve(tmp_path, drawn, epochs):
    path = tmp_path / "curve.png"
    learning_curves.training_curve(path, rows=rows_of(epochs, 15), title=TITLE)
    drawn.check(path)
    accuracy, loss = drawn.figure.axes
    assert accuracy.lines[0].get_ydata()[-1] == 100
    assert (loss.get_yscale(), len(loss.lines)) == ("log", 2)


def test_a_loss_of_zero_is_drawn_on_a_plain_scale(tmp_path, drawn):
    rows = [{**row, "train_loss": 0.0} for row in rows_of(3, 6)]
    learning_curves.training_curve(tmp_path / "curve.png", rows=rows, title="")
    assert drawn.figure.axes[1].get_yscale() == "linear"


# ------------------------------------------------------------------------------------------ policies


def test_frequent_policies_by_hand():
    a, b, c = [True, False, True], [False, True, True], [True, True, True]
    actions = np.array([a, b, a, c, b, b, c])
    labels = np.array([0, 0, 0, 0, 0, 1, 0])
    first, second = policy_figures.frequent_policies(actions, labels, 0, 2)
    # a, b and c have two images each: b drops the earliest block, then a
    assert (first.policy.tolist(), first.images.tolist()) == (b, [1, 4])
    assert (second.policy.tolist(), second.images.tolist()) == (a, [0, 2])
    assert first.share == second.share == pytest.approx(1 / 3)
    (only,) = policy_figures.frequent_policies(actions, labels, 1, 3)
    assert (only.policy.tolist(), only.share, only.images.tolist()) == (b, 1, [5])
    assert policy_figures.frequent_policies(actions, labels, 2, 3) == []


def test_shares_of_all_policies_of_a_class_add_up():
    rng = np.random.default_rng(0)
    actions, labels = rng.random((200, 4)) < 0.5, rng.integers(0, 3, 200)
    found = policy_figures.frequent_policies(actions, labels, 1, 16)
    assert sum(one.share for one in found) == pytest.approx(1)
    assert [one.share for one in found] == sorted((one.share for one in found), reverse=True)
    for one in found:
        assert (actions[one.images] == one.policy).all()
        assert (labels[one.images] == 1).all()


def test_spread_takes_both_ends():
    assert policy_figures.spread(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert policy_figures.spread(np.arange(3), 4).tolist() == [0, 1, 2]
    assert policy_figures.spread(np.array([7, 9]), 1).tolist() == [7]


def test_extremes_by_hand():
    blocks = np.array([5, 1, 9, 1, 9, 3])
    fewest, most = policy_figures.extremes(blocks, 2)
    assert (fewest.tolist(), most.tolist()) == ([1, 3], [2, 4])
    fewest, most = policy_figures.extremes(blocks, 100)  # half of the images each
    assert (fewest.tolist(), most.tolist()) == ([1, 3, 5], [2, 4, 0])
    fewest, most = policy_figures.extremes(np.full(5, 7), 2)  # equals in file order, none twice
    assert (fewest.tolist(), most.tolist()) == ([0, 1], [2, 3])
    assert [len(part) for part in policy_figures.extremes(np.array([4]), 2)] == [0, 0]


def test_means_by_quantile_by_hand():
    values, losses = np.array([4.0, 1, 2, 3, 8, 6]), np.array([0.4, 0.1, 0.2, 0.3, 0.6, 0.5])
    means, errors = policy_figures.means_by_quantile(values, losses, 3)
    np.testing.assert_allclose(means, [1.5, 3.5, 7])
    np.testing.assert_allclose(errors, [0.5, 0.5, 1])  # sqrt(1/2) / sqrt(2), ...
    assert policy_figures.means_by_quantile(values, losses, 6)[1].tolist() == [0] * 6


def some_images(
    count: int, num_blocks: int, classes: int, *, size: int = 32, one_policy: bool = False,
    accuracy: float = 0.7, missing: tuple[int, ...] = (),
) -> dict[str, np.ndarray]:  # fmt: skip
    """Images whose first pixel is their number, and what a policy that knows the class does."""
    rng = np.random.default_rng(0)
    labels = rng.choice([label for label in range(classes) if label not in missing], count)
    prototypes = rng.random((classes, 4, num_blocks)) < 0.4
    actions = prototypes[labels, rng.integers(0, 4, count) * rng.integers(0, 2, count)]
    if one_policy:
        actions[:] = actions[0]
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    right = rng.random(count) < accuracy
    return {
        "images": images,
        "labels": labels,
        "actions": actions,
        "predicted": np.where(right, labels, (labels + 1) % classes),
        "losses": rng.exponential(size=count),
    }


def draw_overview(path, data, classes, title=TITLE):
    policy_figures.policy_overview(
        path,
        actions=data["actions"],
        labels=data["labels"],
        correct=data["predicted"] == data["labels"],
        classes=classes,
        title=title,
    )


def draw_by_class(path, data, classes, title=TITLE, **options):
    own = {key: data[key] for key in ("images", "labels", "actions")}
    policy_figures.policies_by_class(path, classes=classes, title=title, **own, **options)


def draw_easy_and_hard(path, data, classes, title=TITLE):
    policy_figures.easy_and_hard(path, classes=classes, title=title, **data)


CASES = {
    "digits": (some_images(450, 15, 10, size=16), [str(digit) for digit in range(10)]),
    "ResNet-110": (some_images(300, 54, 10), CIFAR),
    "two classes, six blocks": (some_images(90, 6, 2), ["cat", "dog"]),
    "a hundred classes": (
        some_images(400, 15, 100, missing=(3,)),
        [f"{CIFAR[label % 10]} of the wide kind WWWWW {label}" for label in range(100)],
    ),
    "one policy, a class without images": (
        some_images(60, 15, 3, one_policy=True, missing=(1,)),
        ["$cost", "_$\\frac$", "{"],
    ),
    "all right": (some_images(60, 15, 2, accuracy=1), ["cat", "dog"]),
    "all wrong": (some_images(60, 15, 2, accuracy=0), ["cat", "dog"]),
    "three images": (some_images(3, 54, 10), CIFAR),
    "one image": (some_images(1, 6, 2), ["cat", "dog"]),
    "large images": (some_images(30, 15, 2, size=100), ["cat", "dog"]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("draw", [draw_overview, draw_by_class, draw_easy_and_hard])
def test_policies_in_every_case(tmp_path, drawn, draw, case):
    path = tmp_path / "figure.png"
    draw(path, *CASES[case], title=f"{TITLE}, {case}: " + "and so on " * len(case))
    drawn.check(path)


def test_overview_shows_the_shares_and_counts(tmp_path, drawn):
    data = some_images(80, 6, 3, missing=(1,))
    draw_overview(tmp_path / "figure.png", data, ["a", "b", "c"])
    (shares,) = (image.get_array() for image in drawn.figure.axes[0].images)
    actions, labels = data["actions"], data["labels"]
    np.testing.assert_allclose(shares[0], actions[labels == 0].mean(axis=0))
    np.testing.assert_allclose(shares[2], actions[labels == 2].mean(axis=0))
    np.testing.assert_allclose(shares[3], actions.mean(axis=0))  # all images
    assert shares.mask[1].all()
    assert "no test images" in drawn.said()
    correct, blocks = data["predicted"] == labels, actions.sum(axis=1)
    for ax, outcome in zip(drawn.figure.axes[1:3], (correct, ~correct), strict=True):
        for bar in ax.patches:
            kept = bar.get_x() + bar.get_width() / 2
            assert bar.get_height() == (blocks[outcome] == round(kept)).sum()
        assert sum(bar.get_height() for bar in ax.patches) == outcome.sum()


def test_classes_that_are_left_out_are_told(tmp_path, drawn):
    draw_overview(tmp_path / "figure.png", *CASES["a hundred classes"])
    assert "80 of 100 classes are not shown" in drawn.said()
    draw_by_class(tmp_path / "figure.png", *CASES["a hundred classes"])
    assert "the first 10 of 100 classes" in drawn.said()
    draw_by_class(tmp_path / "figure.png", *CASES["digits"])
    assert "classes" not in drawn.said()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_strips_and_images_are_of_the_class_and_policy(tmp_path, drawn, count):
    data = some_images(300, 15, 4, missing=(2,))
    path = tmp_path / "figure.png"
    draw_by_class(path, data, ["a", "b", "c", "d"], policies=count)
    drawn.check(path)
    found = [
        (label, one)
        for label in range(4)
        for one in policy_figures.frequent_policies(data["actions"], data["labels"], label, count)
    ]
    assert len(found) == 3 * count
    stages = [mesh.get_array().ravel() for mesh in drawn.find(QuadMesh)]
    strips = np.concatenate(stages).reshape(-1, 15)  # three meshes of five blocks each
    np.testing.assert_array_equal(strips, [one.policy for _, one in found])
    shares = [text.get_text() for text in drawn.texts if text.get_text().endswith(" %")]
    assert shares == [f"{100 * one.share:.0f} %" for _, one in found]
    shown = [image.get_array()[0, 0] for image in drawn.find(AxesImage)]
    numbers = [int(low) + 256 * int(high) for low, high, _ in shown]
    assert len(set(numbers)) == len(numbers) >= 2 * len(found)
    assert set(numbers) <= set(np.concatenate([one.images for _, one in found]))


def test_strips_are_where_their_images_are(tmp_path, drawn):
    data = some_images(100, 15, 2)
    draw_by_class(tmp_path / "figure.png", data, ["a", "b"])
    strips = np.concatenate([mesh.get_array().ravel() for mesh in drawn.find(QuadMesh)]).reshape(-1, 15)
    lefts = [mesh.get_coordinates()[0, 0] for mesh in drawn.find(QuadMesh)[::3]]
    for image in drawn.find(AxesImage):
        left, _, _, top = image.get_extent()
        below = [abs(y - top) < 0.3 and -0.01 < left - x < 2.5 for x, y in lefts]
        assert below.count(True) == 1
        number = image.get_array()[0, 0]
        taken = data["actions"][int(number[0]) + 256 * int(number[1])]
        np.testing.assert_array_equal(strips[below.index(True)], taken)


def test_easy_images_take_the_fewest_blocks_and_wrong_ones_are_framed(tmp_path, drawn):
    data = some_images(400, 15, 3)
    draw_easy_and_hard(tmp_path / "figure.png", data, ["a", "b", "c"])
    numbers = [image.get_array()[0, 0] for image in drawn.find(AxesImage)]
    shown = [int(low) + 256 * int(high) for low, high, _ in numbers]
    blocks = data["actions"].sum(axis=1)
    fewest, most = policy_figures.extremes(blocks, 14)
    assert shown == [*fewest, *most]
    frames = [patch for patch in drawn.figure.axes[0].patches if isinstance(patch, Rectangle)]
    wrong = data["predicted"][shown] != data["labels"][shown]
    assert len(frames) == wrong.sum() > 0
    captions = [text.get_text() for text in drawn.figure.axes[0].texts]
    assert captions.count(f"{blocks.min()} blocks") == (blocks[shown] == blocks.min()).sum()
    assert sum(said.startswith("→") for said in captions) == wrong.sum()
    means = drawn.figure.axes[3].lines[1].get_ydata()
    expected, _ = policy_figures.means_by_quantile(blocks.astype(float), data["losses"], 10)
    np.testing.assert_allclose(means, expected)


def test_without_extremes_none_are_claimed(tmp_path, drawn):
    data, classes = CASES["one policy, a class without images"]
    draw_easy_and_hard(tmp_path / "figure.png", data, classes)
    assert "every image takes" in drawn.said()
    assert "the most blocks" not in drawn.said()


# ----------------------------------------------------------------------------------------- trade-off


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
    found = trade_off.pareto_front([(cost, value) for cost, value in points])
    for i, (cost, value) in enumerate(points):
        better = (points[:, 0] <= cost) & (points[:, 1] >= value) & (points != (cost, value)).any(axis=1)
        assert (tuple(points[i]) in {tuple(points[j]) for j in found}) == (not better.any())
    assert sorted(set(points[found, 0])) == points[found, 0].tolist()


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
PAPER = {"accuracy": 0.936, "flops": 1.82e8, "label": "Wu et al., gamma 10"}


@pytest.mark.parametrize(
    ("baselines", "blockdrop", "paper"),
    [
        ([FULL, *SOLES, *CURVES, *TUNED], [OURS], [PAPER]),
        ([FULL, *SOLES, *CURVES, *TUNED], [OURS, {**OURS, "accuracy": 0.9361}], []),
        ([FULL, *({**row, "accuracy_std": 0.02} for row in CURVES)], [OURS], []),
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
        assert row["label"] in drawn.said()


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
    np.testing.assert_allclose(resnets.get_xdata()[-1], FULL["flops"] / 1e6)
    assert "MFLOPs" in ax.get_xlabel()
    above = ax.child_axes[0]
    np.testing.assert_allclose(above.get_xlim()[1] / 100, ax.get_xlim()[1] * 1e6 / FULL["flops"])
    assert {f"ResNet-{row['depth']}" for row in (FULL, *SOLES)} <= set(drawn.said().splitlines())


def experiment(gamma: float, seed: int, accuracy: float, flops: float) -> dict:
    return {
        "name": f"gamma-{gamma:g}-seed-{seed}", "gamma": gamma, "seed": seed,
        "accuracy": accuracy, "flops": flops, "blocks": 9.0,
    }  # fmt: skip


SEEDS = [
    experiment(gamma, seed, 0.9 + 0.005 * gamma + 0.001 * seed, 1e8 * (1 + 0.2 * gamma) + 1e6 * seed)
    for gamma in (1, 2, 5)
    for seed in range(3)
]


@pytest.mark.parametrize(
    ("experiments", "baselines"),
    [
        (SEEDS, [FULL, *SOLES, *CURVES]),
        (SEEDS[::3], [FULL]),
        (SEEDS[:1], []),
        ([{**SEEDS[0], "gamma": gamma} for gamma in (0.5, 1, 2, 3, 5, 7.5, 10, 20)], [FULL, *SOLES]),
        ([], [FULL, *SOLES]),
    ],
)
def test_front_in_every_case(tmp_path, drawn, experiments, baselines):
    path = tmp_path / "figure.png"
    trade_off.front(path, experiments=experiments, baselines=baselines, title=TITLE)
    drawn.check(path)
    for row in experiments:
        assert f"gamma {row['gamma']:g}" in drawn.said()


def test_front_is_drawn_through_the_means_that_are_not_beaten(tmp_path, drawn):
    worse = [experiment(3, seed, 0.8, 1.5e8) for seed in range(2)]
    trade_off.front(tmp_path / "figure.png", experiments=[*SEEDS, *worse], baselines=[], title=TITLE)
    (steps,) = (line for line in drawn.figure.axes[0].lines if line.get_label() == "Pareto front")
    x, y = steps.get_data()
    np.testing.assert_allclose(x, [121, 141, 141, 201, 201])
    np.testing.assert_allclose(y, [90.6, 90.6, 91.1, 91.1, 92.6])


# -------------------------------------------------------------------------------------------- timing


def timed(contestant: str, batch: int, precision: str, speedup: float, *, reliable: bool = True) -> dict:
    return {
        "kind": "blockdrop", "contestant": contestant, "batch": batch, "precision": precision,
        "speedup": speedup, "speedup_low": min(0.9, speedup), "speedup_high": max(1.2, speedup),
        "ideal": 2.5, "reliable": reliable,
    }  # fmt: skip


def swept(batches: tuple[int, ...], precisions: tuple[str, ...]) -> list[dict]:
    return [
        {"batch": batch, "precision": precision, "variant": variant, "keep_ratio": share,
         "milliseconds": batch * share, "static_milliseconds": 0.8 * batch, "speedup": 0.8 / share,
         "speedup_low": 0.9, "speedup_high": 1.6, "reliable": batch != 32}
        for batch in batches
        for precision in precisions
        for variant in ("few", "many")
        for share in (0.2, 0.6, 1.0)
    ]  # fmt: skip


EXECUTORS = ("masked", "gather", "grouped", "cuda_graphs", "native", "triton")


@pytest.mark.parametrize(
    ("executors", "batches", "precisions"),
    [
        (EXECUTORS, (1, 32, 128, 1024), ("fp32", "bf16")),
        (EXECUTORS[:4], (1, 32), ("fp32",)),
        (("native",), (1,), ("fp32",)),
    ],
)
def test_timing(tmp_path, drawn, executors, batches, precisions):
    times = [
        timed(name, batch, precision, 0.3 * (place + 1), reliable=batch != 32)
        for place, name in enumerate(executors)
        for batch in batches
        for precision in precisions
    ]
    times.append({**times[0], "kind": "static", "contestant": "eager"})
    figures.speedups(tmp_path / "times.png", times=times, title=TITLE)
    drawn.check(tmp_path / "times.png")
    assert set(executors) <= set(drawn.said().splitlines())
    assert ("no claim" in drawn.said()) == (32 in batches)
    figures.break_evens(tmp_path / "sweep.png", sweep=swept(batches, precisions), title=TITLE)
    drawn.check(tmp_path / "sweep.png")
    assert ("too noisy to compare" in drawn.said()) == (32 in batches)


def test_noisy_points_are_hollow(tmp_path, drawn):
    rows = swept((1, 32), ("fp32",))
    figures.break_evens(tmp_path / "figure.png", sweep=rows, title=TITLE)
    quiet, noisy = drawn.figure.axes[:2]
    assert not [line for line in quiet.lines if line.get_markerfacecolor() == "white"]
    hollow = [line for line in noisy.lines if line.get_markerfacecolor() == "white"]
    assert sorted(line.get_xdata()[0] for line in hollow) == [20, 20, 60, 60, 100, 100]


def test_an_interval_may_leave_its_median_out(tmp_path, drawn):
    row = timed("native", 1, "fp32", 2.0) | {"speedup_low": 2.1, "speedup_high": 2.3}
    figures.speedups(tmp_path / "figure.png", times=[row], title=TITLE)
    drawn.check(tmp_path / "figure.png")


# ------------------------------------------------------------------------------ all of them, and style

CALLS = {
    "learning_curves": lambda path: learning_curves.learning_curves(
        path, curriculum=rows_of(3, 6), finetune=rows_of(2, 6, learnt=6), num_blocks=6
    ),
    "training_curve": lambda path: learning_curves.training_curve(path, rows=rows_of(3, 6), title=TITLE),
    "policy_overview": lambda path: draw_overview(path, *CASES["all right"]),
    "policies_by_class": lambda path: draw_by_class(path, *CASES["all right"]),
    "easy_and_hard": lambda path: draw_easy_and_hard(path, *CASES["all right"]),
    "trade_off": lambda path: trade_off.trade_off(
        path, baselines=[FULL, *SOLES, *CURVES, *TUNED], blockdrop=[OURS], paper=[PAPER], title=TITLE
    ),
    "front": lambda path: trade_off.front(path, experiments=SEEDS, baselines=[FULL], title=TITLE),
    "speedups": lambda path: figures.speedups(
        path, times=[timed("native", 1, "fp32", 2.0)], title=TITLE
    ),
    "break_evens": lambda path: figures.break_evens(path, sweep=swept((1,), ("fp32",)), title=TITLE),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_gives_the_same_bytes(tmp_path, name):
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        CALLS[name](path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_figures_are_closed_and_say_no_version(tmp_path):
    CALLS["training_curve"](tmp_path / "a.png")
    assert plt.get_fignums() == []
    with Image.open(tmp_path / "a.png") as image:
        assert "Software" not in image.info


def test_fitting():
    assert fitting("cat", 1, 9) == "cat"
    assert fitting("", 1, 9) == ""
    assert fitting("cat", 0, 9) == "…"
    narrow, wide, bold = (
        fitting(*some) for some in (("i" * 99, 1, 9), ("W" * 99, 1, 9), ("W" * 99, 1, 9, "bold"))
    )
    assert narrow.endswith("i…")
    assert len(narrow) > 2 * len(wide) > 2 * len(bold)
