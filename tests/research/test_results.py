"""Rows of finished runs and what is written from them; the plain loop that ours is measured against."""

import argparse
import json
import re
import subprocess

import pytest
import torch
from PIL import Image
from repository_copy import ROOT

from pipeline.infra.errors import UserError
from pipeline.models.resnet import ResNet
from research import results, throughput

RIGHT = [1, 1, 1, 0]
EVALUATED = {
    "accuracy": 0.75, "blocks_mean": 8.0, "blocks_std": 1.0, "num_blocks": 15, "flops_mean": 7e7,
    "full_flops": 1.4e8, "unique_policies": 3, "effective_policies": 2.0, "shuffled_accuracy": 0.7,
}  # fmt: skip


@pytest.fixture
def finished(tmp_path):
    """A working tree as `dvc repro` leaves it, with four test images and one rival."""
    root = tmp_path / "work"
    for name in ("metrics/times", "plots/evaluate", "plots/baseline", "presets"):
        (root / name).mkdir(parents=True)
    preset = (ROOT / "presets/digits.yaml").read_text()
    (root / "presets/digits.yaml").write_text(preset)
    (root / "params.yaml").write_text(re.sub(r"^gamma: .*", "gamma: 2.5", preset, flags=re.M))
    (root / "metrics/evaluate.json").write_text(json.dumps(EVALUATED))
    timed = {"reliable_batch32_fp32": 1, "speedup_batch32_fp32": 1.537, "speedup_batch32_bf16": 9.0}
    (root / "metrics/benchmark.json").write_text(json.dumps({"benchmark": timed}))
    seconds = {"seconds": 120.0, "device": "CPU, 1 threads"}
    (root / "metrics/times/finetune.json").write_text(json.dumps(seconds))
    rows = "".join(f"{i},{right}\n" for i, right in enumerate(RIGHT))
    (root / "plots/evaluate/images.csv").write_text("image,correct\n" + rows)
    rows = "".join(f"{i},0,1,1\n" for i in range(4))
    (root / "plots/baseline/images.csv").write_text("image,sole-20,distribute-7,first-3\n" + rows)
    (root / "plots/baseline/curves.csv").write_text(
        "kind,depth,blocks,finetuned,flops,accuracy,accuracy_std\n"
        "sole,20,9,0,8e7,0.0,0.0\ndistribute,32,7,1,7e7,1.0,0.0\nfirst,32,3,0,4e7,1.0,0.0\n"
    )
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    return root


def test_row_has_results_rivals_and_what_it_takes_to_have_it_again(finished):
    row = results.row_of(finished, "digits")
    assert row["evaluate"] == EVALUATED
    assert row["test_images"] == 4
    assert len(row["commit"]) >= 7
    sole, tuned = row["rivals"]  # a rule that nobody finetuned is no rival
    assert (sole["name"], sole["blockdrop_minus_it"][0]) == ("sole-20", 0.75)
    assert (tuned["name"], tuned["blockdrop_minus_it"][0]) == ("distribute-7", -0.25)
    assert results.command_of(row) == "`make preset NAME=digits && dvc exp run -S gamma=2.5`"
    assert results.minutes_of(row) == "- + - + 2"


def test_table_and_figure_show_every_row(finished, tmp_path):
    rows = {"one": results.row_of(finished, "digits") | {"note": "Trained at night."}}
    text = results.table(rows)
    assert text.rstrip().endswith("Trained at night.")
    assert "| one | 2.5 | 0 | 75.00 % | 8.00 ± 1.00 of 15 | 7e+07 | 50.0 % | 3 (2.0) | 70.00 %" in text
    assert " | 70.00 % | -, 1.54, - | - + - + 2 | " in text
    assert "| one | sole-20 | 0.00 % | 8e+07 | +75.00 (" in text
    results.figure(tmp_path / "figure.png", list(rows.values()))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_published_numbers_stand_beside_their_data_set_alone(finished):
    row = results.row_of(finished, "digits")
    assert "Published" not in results.table({"one": row})
    row["params"]["data.source"] = "cifar10"
    text = results.table({"one": row})
    assert text.count("## Published on cifar10") == 1
    assert "| ResNet-32 with DynConv (CVPR 2020) | 93.58 % | 1.11e+08 |" in text
    assert "| BlockDrop in the paper, gamma 10 | 93.60 % | 1.81e+08 |" in text


def test_other_weights_to_start_from_have_a_table_and_a_figure_of_their_own(
    finished, monkeypatch, tmp_path
):
    row = results.row_of(finished, "digits")
    theirs, ours = (
        row | {"params": row["params"] | {"checkpoints.pretrain": checkpoint}}
        for checkpoint in ("import/their_resnet.t7", "pretrained/pretrain")
    )
    (tmp_path / results.ROWS).mkdir()
    for name, own in (("random", row), ("theirs", theirs), ("ours", ours)):
        (tmp_path / results.ROWS / f"{name}.json").write_text(json.dumps(own))
    drawn = {}
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "trade_off", lambda path, **given: drawn.update({path.name: given}))
    monkeypatch.setattr("sys.argv", ["results", "table"])
    results.main()
    tables = (tmp_path / "README.md").read_text().split("\n## ")[1:]
    assert [table.split("\n")[0] for table in tables] == [
        "ResNet-32 on digits", "ResNet-32 on digits, from their_resnet.t7"
    ]  # fmt: skip
    assert "| random |" in tables[0]
    assert "| ours |" in tables[0]
    assert "| theirs |" in tables[1]
    assert {name: len(given["blockdrop"]) for name, given in drawn.items()} == {
        "trade_off_digits_resnet32.png": 2, "trade_off_digits_resnet32_from_their_resnet.png": 1
    }  # fmt: skip


def test_the_figure_names_the_seed_where_there_are_several(finished, monkeypatch, tmp_path):
    row = results.row_of(finished, "digits")
    other = row | {"params": row["params"] | {"seed": 7}}
    drawn = {}
    monkeypatch.setattr(results, "trade_off", lambda path, **given: drawn.update(given))
    results.figure(tmp_path / "figure.png", [row])
    assert [point["label"] for point in drawn["blockdrop"]] == ["gamma 2.5"]
    results.figure(tmp_path / "figure.png", [row, other])
    assert [point["label"] for point in drawn["blockdrop"]] == ["gamma 2.5, seed 0", "gamma 2.5, seed 7"]


def test_unfinished_run_is_refused_with_a_remedy(finished):
    (finished / "metrics/evaluate.json").unlink()
    with pytest.raises(UserError, match=r"metrics/evaluate.json is missing; finish `dvc repro` first"):
        results.row_of(finished, "digits")


def test_the_plain_loop_computes_what_ours_does(small_resnet: ResNet):
    small_resnet.eval()
    images = torch.rand(5, 3, 8, 8)
    actions = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 1, 0]]).bool()
    found = throughput.masked(small_resnet, images, actions)
    torch.testing.assert_close(found, small_resnet(images, actions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", throughput.STAGES)
def test_throughput_times_every_loop_of_a_stage(stage):
    arguments = argparse.Namespace(
        stages=[stage], images=32, batch_size=16, rounds=1, workers=[0], depth=8, kept=0.5
    )
    rows = throughput.measure(arguments, torch.device("cpu"))
    ours = 1 if stage == "pretrain" else 2
    assert [row["loop"].split(",")[0] for row in rows] == ["plain"] + ["ours"] * ours
    assert all(row["images_per_second"] > 0 for row in rows)
    assert rows[0]["times_the_best_plain"] == 1.0


def test_throughput_of_decoding_is_that_of_the_images_of_a_folder(tmp_path):
    for number in range(2):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.jpg")
    (row,) = throughput.decoding(tmp_path, rounds=2, images=4, size=16)
    assert row["images_per_second"] > 0
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none holds no images \(.jpg, .jpeg, .png\); name a folder"):
        throughput.decoding(tmp_path / "none", rounds=1, images=1)
