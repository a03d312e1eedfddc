"""Figures of policies and trainings show what they are given and can be read in every case."""

import base64
import io
import itertools
import re
from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.image import AxesImage
from matplotlib.patches import StepPatch
from PIL import Image

from pipeline.evaluation import learning_curves, policy_figures
from pipeline.evaluation.policy_figures import ShownPolicies
from pipeline.plotting import fitting

pytestmark = pytest.mark.filterwarnings("error")  # of layouts that fail, and of missing glyphs

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TITLE = "ResNet-110: 93.60 % with 16.93 of 54 blocks (all blocks: 93.20 %)"


# learning curves


def rows_of(epochs: int, num_blocks: int, *, active: int | None = None) -> list[dict[str, float]]:
    """A table of the curriculum (active None: one more block an epoch) or of the finetuning."""
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "validation_active_blocks": active or min(epoch, num_blocks)}
        for split in ("train", "validation"):
            row |= {
                f"{split}_{name}": epoch / epochs
                for name in ("accuracy", "reward", "policy_entropy", "loss")
            }
        row |= {"train_reward": -epoch, "train_blocks": num_blocks / 2}
        row |= {"validation_blocks_mean": num_blocks / 3, "validation_effective_policies": epoch**2}
        rows.append({key: float(value) for key, value in row.items()})
    return rows


def draw_learning_curves(path, *, curriculum: int, finetune: int, num_blocks: int) -> None:
    learning_curves.learning_curves(
        path,
        curriculum=rows_of(curriculum, num_blocks),
        finetune=rows_of(finetune, num_blocks, active=num_blocks),
        num_blocks=num_blocks,
    )


@pytest.mark.parametrize(
    ("curriculum", "finetune", "num_blocks"),
    [(60, 3, 54), (2, 900, 6), (5, 0, 54), (0, 1, 6), (0, 0, 15)],
)
def test_learning_curves_in_every_case(tmp_path, drawn, curriculum, finetune, num_blocks):
    path = tmp_path / "new" / "curves.png"
    draw_learning_curves(path, curriculum=curriculum, finetune=finetune, num_blocks=num_blocks)
    drawn.check(path)
    assert ("imported" in drawn.words) == (curriculum + finetune == 0)
    assert ("joint finetuning begins" in drawn.words) == (curriculum * finetune > 0)


def test_learning_curves_put_both_stages_on_one_axis(tmp_path, drawn):
    draw_learning_curves(tmp_path / "curves.png", curriculum=4, finetune=2, num_blocks=6)
    accuracy, _, blocks = drawn.figure.axes[:3]
    training, validation, finetuning = (line.get_xydata() for line in accuracy.lines[:3])
    np.testing.assert_allclose(training, [[1, 25], [2, 50], [3, 75], [4, 100]])
    np.testing.assert_allclose(training, validation)
    np.testing.assert_allclose(finetuning, [[5, 50], [6, 100]])
    assert accuracy.lines[-1].get_xdata()[0] == 4.5  # the border
    (inactive,) = (patch for patch in blocks.patches if isinstance(patch, StepPatch))
    np.testing.assert_array_equal(inactive.get_data().values, [5, 4, 3, 2])
    np.testing.assert_array_equal(inactive.get_data().edges, [0.5, 1.5, 2.5, 3.5, 4.5])


# what is to be shown


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


def test_frequent_policies_of_a_class_add_up():
    rng = np.random.default_rng(0)
    actions, labels = rng.random((200, 4)) < 0.5, rng.integers(0, 3, 200)
    policies = policy_figures.frequent_policies(actions, labels, 1, 16)
    shares = [policy.share for policy in policies]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    for policy in policies:
        assert (actions[policy.images] == policy.policy).all()
        assert (labels[policy.images] == 1).all()


def test_spread_takes_both_ends():
    assert policy_figures.spread(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert policy_figures.spread(np.arange(3), 4).tolist() == [0, 1, 2]
    assert policy_figures.spread(np.array([7, 9]), 1).tolist() == [7]


def test_extremes_by_hand():
    blocks = np.array([5, 1, 9, 1, 9, 3])
    for values, count, expected in (
        (blocks, 2, ([1, 3], [2, 4])),
        (blocks, 100, ([1, 3, 5], [2, 4, 0])),  # half of the images each
        (np.full(5, 7), 2, ([0, 1], [2, 3])),  # equals in file order, none twice
        (np.array([4]), 2, ([], [])),
    ):
        fewest, most = policy_figures.extremes(values, count)
        assert (fewest.tolist(), most.tolist()) == expected


def test_means_by_quantile_by_hand():
    values, losses = np.array([4.0, 1, 2, 3, 8, 6]), np.array([0.4, 0.1, 0.2, 0.3, 0.6, 0.5])
    means, errors = policy_figures.means_by_quantile(values, losses, 3)
    np.testing.assert_allclose(means, [1.5, 3.5, 7])
    np.testing.assert_allclose(errors, [0.5, 0.5, 1])  # sqrt(1/2) / sqrt(2), ...
    assert policy_figures.means_by_quantile(values, losses, 6)[1].tolist() == [0] * 6


# policies, drawn


def shown_policies(
    count: int, stages: tuple[int, ...], classes: list[str], *, size: int = 32,
    one_policy: bool = False, accuracy: float = 0.7, missing: tuple[int, ...] = (),
) -> ShownPolicies:  # fmt: skip
    """Images whose first pixel is their number, and what a policy that knows the class does."""
    rng = np.random.default_rng(0)
    labels = rng.choice([label for label in range(len(classes)) if label not in missing], count)
    prototypes = rng.random((len(classes), 4, sum(stages))) < 0.4
    actions = prototypes[labels, rng.integers(0, 4, count) * rng.integers(0, 2, count)]
    if one_policy:
        actions[:] = actions[0]
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return ShownPolicies(
        images=images,
        labels=labels,
        predicted=np.where(rng.random(count) < accuracy, labels, (labels + 1) % len(classes)),
        actions=actions,
        losses=rng.exponential(size=count),
        classes=classes,
        stages=stages,
        title=TITLE,
    )


def numbers_of(images: list[AxesImage]) -> list[int]:
    """Which images of `shown_policies` were drawn."""
    pixels = [image.get_array()[0, 0] for image in images]
    return [int(pixel[0]) + 256 * int(pixel[1]) for pixel in pixels]


WIDE = [f"{CIFAR[label % 10]} of the wide kind WWWWW {label}" for label in range(100)]
CASES = {
    "digits": shown_policies(450, (5, 5, 5), [str(digit) for digit in range(10)], size=16),
    "ResNet-110": shown_policies(300, (18, 18, 18), CIFAR),
    "ResNet-50": shown_policies(90, (3, 4, 6, 3), ["cat", "dog"], size=100),
    "a hundred classes": shown_policies(400, (5, 5, 5), WIDE, missing=(3,)),
    "one policy, a class without images": shown_policies(
        60, (5, 5, 5), ["$cost", "_$\\frac$", "{"], one_policy=True, missing=(1,)
    ),
    "all correct": shown_policies(60, (5, 5, 5), ["cat", "dog"], accuracy=1),
    "all wrong": shown_policies(60, (5, 5, 5), ["cat", "dog"], accuracy=0),
    "one image": shown_policies(1, (2, 2, 2), ["cat", "dog"]),
}
FIGURES = {
    "overview": policy_figures.policy_overview,
    "by class": policy_figures.policies_by_class,
    "easy and hard": policy_figures.easy_and_hard,
}


@pytest.mark.parametrize(
    ("figure", "case"),
    [
        *itertools.product(FIGURES, ["one policy, a class without images", "one image"]),
        *itertools.product(["overview"], ["a hundred classes", "all correct", "all wrong"]),
        *itertools.product(["by class"], ["a hundred classes", "ResNet-110"]),
        *itertools.product(["easy and hard"], ["digits", "ResNet-50"]),
    ],
)
def test_policy_figures_in_every_case(tmp_path, drawn, figure, case):
    path, title = tmp_path / "figure.png", f"{TITLE}, {case}: " + "and so on " * len(case)
    FIGURES[figure](path, replace(CASES[case], title=title))
    drawn.check(path)


def test_policy_overview_shows_keep_ratios_and_counts(tmp_path, drawn):
    shown = shown_policies(80, (2, 2, 2), ["a", "b", "c"], missing=(1,))
    policy_figures.policy_overview(tmp_path / "figure.png", shown)
    (ratios,) = (image.get_array() for image in drawn.figure.axes[0].images)
    for row, images in ((0, shown.labels == 0), (2, shown.labels == 2), (3, slice(None))):
        np.testing.assert_allclose(ratios[row], shown.actions[images].mean(axis=0))
    assert ratios.mask[1].all()
    assert "no test images" in drawn.words
    for ax, rows in zip(drawn.figure.axes[1:3], (shown.correct, ~shown.correct), strict=True):
        for bar in ax.patches:
            kept = round(bar.get_x() + bar.get_width() / 2)
            assert bar.get_height() == (shown.blocks[rows] == kept).sum()
        assert sum(bar.get_height() for bar in ax.patches) == rows.sum()


def test_policy_figures_say_which_classes_they_leave_out(tmp_path, drawn):
    path = tmp_path / "figure.png"
    policy_figures.policy_overview(path, CASES["a hundred classes"])
    assert "80 of 100 classes are not shown" in drawn.words
    policy_figures.policies_by_class(path, CASES["a hundred classes"])
    assert "the first 10 of 100 classes" in drawn.words
    policy_figures.policies_by_class(path, CASES["digits"])
    assert "classes" not in drawn.words


@pytest.mark.parametrize("count", [1, 4])
def test_policies_by_class_shows_images_that_take_the_policy(tmp_path, drawn, count):
    shown = shown_policies(300, (5, 5, 5), ["a", "b", "c", "d"], missing=(2,))
    path = tmp_path / "figure.png"
    policy_figures.policies_by_class(path, shown, policies=count)
    drawn.check(path)
    expected = [
        policy
        for label in range(4)
        for policy in policy_figures.frequent_policies(shown.actions, shown.labels, label, count)
    ]
    assert len(expected) == 3 * count
    with_policies = [ax for ax in drawn.figure.axes if ax.collections]
    seen: list[int] = []
    for ax, policy in zip(with_policies, expected, strict=True):
        (mesh,) = ax.collections
        cells = mesh.get_array().ravel()
        np.testing.assert_array_equal(np.flatnonzero(cells.mask), [5, 11])  # after five blocks each
        np.testing.assert_array_equal(cells.compressed(), policy.policy)
        assert f"{100 * policy.share:.0f} %, " in ax.get_title(loc="left")
        numbers = numbers_of(ax.images)
        assert set(numbers) <= set(policy.images)
        seen += numbers
    assert len(set(seen)) == len(seen) >= 2 * len(expected)


def test_easy_and_hard_shows_extremes_and_frames_wrong_ones(tmp_path, drawn):
    shown = shown_policies(400, (5, 5, 5), ["a", "b", "c"])
    policy_figures.easy_and_hard(tmp_path / "figure.png", shown)
    numbers, blocks = numbers_of(drawn.find(AxesImage)), shown.blocks
    assert numbers == np.concatenate(policy_figures.extremes(blocks, 14)).tolist()
    pictures = [ax for ax in drawn.figure.axes if ax.images]
    frames = [patch for ax in pictures for patch in ax.patches]
    wrong = ~shown.correct[numbers]
    assert len(frames) == wrong.sum() > 0
    captions = [text.get_text() for ax in pictures for text in ax.texts]
    assert captions.count(f"{blocks.min()} blocks") == (blocks[numbers] == blocks.min()).sum()
    assert sum(caption.startswith("→") for caption in captions) == wrong.sum()
    means, _ = policy_figures.means_by_quantile(blocks.astype(float), shown.losses, 10)
    np.testing.assert_allclose(drawn.figure.axes[-1].lines[1].get_ydata(), means)


def test_svg_holds_photos_in_their_resolution_and_the_rest_as_lines(tmp_path):
    shown = shown_policies(40, (2, 2, 2), ["a", "b"], size=300)
    policy_figures.easy_and_hard(tmp_path / "figure.png", shown)
    svg = (tmp_path / "figure.svg").read_text()
    pictures = re.findall(r'href="data:image/png;base64,([^"]*)"', svg)
    assert len(pictures) == 28
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert image.size == (policy_figures.PIXELS, policy_figures.PIXELS)
    assert svg.count("<path") > 50


def test_easy_and_hard_without_extremes_claims_none(tmp_path, drawn):
    case = CASES["one policy, a class without images"]
    policy_figures.easy_and_hard(tmp_path / "figure.png", case)
    assert "every image takes" in drawn.words
    assert "the most blocks" not in drawn.words


# all of them, and style


@pytest.mark.parametrize("name", [*FIGURES, "learning curves"])
def test_figure_is_the_same_bytes_again_and_closed(tmp_path, name):
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        if name in FIGURES:
            FIGURES[name](path, CASES["all correct"])
        else:
            draw_learning_curves(path, curriculum=3, finetune=2, num_blocks=6)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert plt.get_fignums() == []
    svg = (tmp_path / "a.svg").read_text()
    assert "<dc:date>" not in svg
    assert mpl.__version__ not in svg
    with Image.open(tmp_path / "a.png") as image:
        assert "Software" not in image.info  # which would name a version


def test_fitting_cuts_by_the_width_of_letters():
    assert fitting("cat", 1, 9) == "cat"
    assert fitting("", 1, 9) == ""
    assert fitting("cat", 0, 9) == "…"
    narrow, wide = fitting("i" * 99, 1, 9), fitting("W" * 99, 1, 9)
    assert narrow.endswith("i…")
    assert len(narrow) > 2 * len(wide) > 2 * len(fitting("W" * 99, 1, 9, "bold"))
