"""Seeds pooled: an image counts once, and what does not fit together is refused."""

import json

import numpy as np
import pytest

from pipeline.infra.errors import UserError
from research.pooled import pooled_difference, table_of


def run(root, blockdrop, static, *, flops=4e7):
    for name in ("metrics", "plots/evaluate", "plots/baseline"):
        (root / name).mkdir(parents=True)
    evaluated = {"flops_mean": flops, "full_flops": 1e8, "shuffled_accuracy": 0.5}
    (root / "metrics/evaluate.json").write_text(json.dumps(evaluated))
    lines = [f"{i},{int(c)}\n" for i, c in enumerate(blockdrop)]
    (root / "plots/evaluate/images.csv").write_text("image,correct\n" + "".join(lines))
    lines = [f"{i},{int(c)}\n" for i, c in enumerate(static)]
    (root / "plots/baseline/images.csv").write_text("image,distribute-9\n" + "".join(lines))
    (root / "plots/baseline/curves.csv").write_text("name,flops\ndistribute-9,5e7\nrandom-3,1e7\n")
    return root


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


def test_table_has_means_over_seeds_and_each_difference(tmp_path):
    roots = [
        run(tmp_path / "a", [1, 1, 1, 0], [1, 1, 0, 0]),
        run(tmp_path / "b", [1, 1, 1, 1], [1, 1, 1, 1], flops=5e7),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_of(roots).splitlines()]
    assert lines[2][:3] == ["blockdrop", "87.50 +- 17.68 %", "45.0 +- 7.1 %"]
    assert lines[3][:2] == ["another image's policy", "50.00 +- 0.00 %"]
    assert lines[4][:3] == ["distribute-9", "75.00 +- 35.36 %", "50.0 +- 0.0 %"]
    assert lines[4][3].startswith("+12.50 (-")
    assert lines[4][4] == "+25.00, +0.00"


def test_runs_that_can_not_be_pooled_are_named(tmp_path):
    one = run(tmp_path / "a", [1, 1, 1, 0], [1, 1, 0, 0])
    with pytest.raises(UserError, match=r"other.*is missing; finish `dvc repro` there first"):
        table_of([one, tmp_path / "other"])
    with pytest.raises(UserError, match="different numbers of test images"):
        table_of([one, run(tmp_path / "b", [1, 1], [1, 1])])
