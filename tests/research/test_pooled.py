"""Seeds pooled: an image counts once, and what does not fit together is refused."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.infra.errors import UserError
from research import pooled
from research.pooled import pooled_difference, table_of
from research.results import Rival, Row, packed, unpacked


def run(blockdrop, static, *, flops=4e7):
    def rival(name, correct):
        return Rival(
            name=name, kind="distribute", depth=32, blocks=9, accuracy=0.5, flops=5e7,
            blockdrop_minus_it=(0, 0, 0), correct=correct,
        )  # fmt: skip

    return Row(
        preset="digits",
        changes={},
        params={"data.source": "cifar10"},
        commit="abc",
        machine={},
        test_images=len(blockdrop),
        evaluate={"flops_mean": flops, "full_flops": 1e8, "shuffled_accuracy": 0.5},
        rivals=[rival("distribute-9", packed(np.array(static))), rival("older", "")],
        times={},
        correct=packed(np.array(blockdrop)),
    )


@pytest.mark.parametrize("images", [1, 8, 1003])
def test_a_row_keeps_which_images_were_correct(images):
    correct = np.random.default_rng(images).random(images) < 0.7
    np.testing.assert_array_equal(unpacked(packed(correct), images), correct)


def test_seeds_that_agree_are_no_more_evidence_than_one():
    draw = np.random.default_rng(0)
    first, second = draw.random(1000) < 0.9, draw.random(1000) < 0.85
    one = pooled_difference(first[None], second[None])
    three = pooled_difference(np.stack([first] * 3), np.stack([second] * 3))
    assert three[0] == pytest.approx(one[0])
    assert three[1] == pytest.approx(one[1])
    other = pooled_difference(
        np.stack([first, draw.permutation(first)]), np.stack([second, draw.permutation(second)])
    )
    assert other[1][1] - other[1][0] < one[1][1] - one[1][0]


def test_table_has_means_over_seeds_and_each_difference():
    runs = {
        "a": run([1, 1, 1, 0], [1, 1, 0, 0]),
        "b": run([1, 1, 1, 1], [1, 1, 1, 1], flops=5e7),
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_of(runs).splitlines()]
    assert lines[2][:3] == ["blockdrop", "87.50 +- 17.68 %", "45.0 +- 7.1 %"]
    assert lines[3][:2] == ["another image's policy", "50.00 +- 0.00 %"]
    assert lines[4][:3] == ["distribute-9", "75.00 +- 35.36 %", "50.0 +- 0.0 %"]
    assert lines[4][3].startswith("+12.50 (-")
    assert lines[4][4] == "+25.00, +0.00"
    assert len(lines) == 5  # of the older rival nobody knows which images


def test_runs_that_can_not_be_pooled_are_named(tmp_path, monkeypatch):
    one = run([1, 1, 1, 0], [1, 1, 0, 0])
    with pytest.raises(UserError, match="different test images"):
        table_of({"a": one, "b": run([1, 1], [1, 1])})
    with pytest.raises(UserError, match="different test images"):
        table_of({"a": one, "b": replace(one, params={"data.source": "cifar100"})})
    with pytest.raises(UserError, match="b is an older row, without single images; record it again"):
        table_of({"a": one, "b": replace(one, correct="")})
    monkeypatch.setattr(pooled, "FOLDER", tmp_path)
    one.save(tmp_path / "rows/known.json")
    assert pooled.load("known").correct == one.correct
    with pytest.raises(UserError, match="results has no row 'other', but known"):
        pooled.load("other")
