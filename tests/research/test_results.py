"""Rows of finished runs, and the table and figure that are written from them."""

import json
import re
import subprocess
from dataclasses import replace

import pytest
from repository_copy import ROOT

from pipeline.infra.errors import UserError
from research import results

CORRECT = [1, 1, 1, 0]
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
    rows = "".join(f"{i},{correct}\n" for i, correct in enumerate(CORRECT))
    (root / "plots/evaluate/images.csv").write_text("image,correct\n" + rows)
    rows = "".join(f"{i},0,1,1\n" for i in range(4))
    (root / "plots/baseline/images.csv").write_text("image,sole-20,distribute-7,first-3\n" + rows)
    (root / "plots/baseline/curves.csv").write_text(
        "name,kind,depth,blocks,finetuned,flops,accuracy,accuracy_std\n"
        "sole-20,sole,20,9,0,8e7,0.0,0.0\ndistribute-7,distribute,32,7,1,7e7,1.0,0.0\n"
        "first-3,first,32,3,0,4e7,1.0,0.0\n"
    )
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    return root


def test_row_holds_results_rivals_and_how_to_repeat_it(finished, tmp_path):
    row = results.row_of(finished, "digits", note="Trained at night.")
    assert row.evaluate == EVALUATED
    assert row.test_images == 4
    assert len(row.commit) >= 7
    sole, tuned = row.rivals  # a rule that nobody finetuned is no rival
    assert (sole.name, sole.blockdrop_minus_it[0]) == ("sole-20", 0.75)
    assert (tuned.name, tuned.blockdrop_minus_it[0]) == ("distribute-7", -0.25)
    assert results.command_of(row) == "`make preset NAME=digits && dvc exp run -S gamma=2.5`"
    assert results.minutes_of(row) == "- + - + 2"
    row.save(tmp_path / "rows" / "one.json")
    loaded = results.Row.load(tmp_path / "rows" / "one.json")
    assert results.table({"one": loaded}) == results.table({"one": row})
    assert loaded.rivals[0].right_alone == [3, 0]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_and_figure_show_every_row(finished, tmp_path):
    row = results.row_of(finished, "digits", note="Trained at night.")
    text = results.table({"one": row})
    assert text.rstrip().endswith("Trained at night.")
    run, sole, _ = [cells_of(line) for line in text.splitlines() if line.startswith("| one ")]
    assert run == [
        "one", "2.5", "0", "75.00 %", "8.00 ± 1.00 of 15", "7e+07", "50.0 %", "3 (2.0)", "70.00 %",
        "-, 1.54, -", "- + - + 2", row.commit,
    ]  # fmt: skip
    assert sole[:4] == ["one", "sole-20", "0.00 %", "8e+07"]
    assert sole[4].startswith("+75.00 (")
    assert not sole[4].endswith("*")
    older = replace(row, rivals=[replace(row.rivals[0], right_alone=None)])
    assert " *" in results.rival_table({"one": older})
    results.figure(tmp_path / "figure.png", [row])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def with_params(row: results.Row, **changes: object) -> results.Row:
    return replace(row, params=row.params | {k.replace("__", "."): v for k, v in changes.items()})


def test_published_numbers_stand_beside_their_data_set_alone(finished):
    row = results.row_of(finished, "digits")
    assert "Published" not in results.table({"one": row})
    text = results.table({"one": with_params(row, data__source="cifar10")})
    assert text.count("## Published on cifar10") == 1
    published = [cells_of(line) for line in text.splitlines()]
    assert ["ResNet-32 with DynConv (CVPR 2020)", "93.58 %", "1.11e+08"] in published
    assert ["BlockDrop in the paper, gamma 10", "93.60 %", "1.81e+08"] in published


def test_networks_from_others_weights_have_their_own_table(finished, monkeypatch, tmp_path):
    row = results.row_of(finished, "digits")
    rows = {
        "random": row,
        "theirs": with_params(row, checkpoints__pretrain="import/their_resnet.t7"),
        "ours": with_params(row, checkpoints__pretrain="pretrained/pretrain"),
    }
    for name, made in rows.items():
        made.save(tmp_path / results.ROWS / f"{name}.json")
    drawn = {}
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "trade_off", lambda path, **given: drawn.update({path.name: given}))
    monkeypatch.setattr("sys.argv", ["results", "table"])
    results.main()
    tables = (tmp_path / "README.md").read_text().split("\n## ")[1:]
    titles = [table.split("\n")[0] for table in tables]
    assert titles == ["ResNet-32 on digits", "ResNet-32 on digits, from their_resnet.t7"]
    assert "| random " in tables[0]
    assert "| ours " in tables[0]
    assert "| theirs " in tables[1]
    assert {name: len(given["blockdrop"]) for name, given in drawn.items()} == {
        "trade_off_digits_resnet32.png": 2, "trade_off_digits_resnet32_from_their_resnet.png": 1
    }  # fmt: skip


def test_figure_labels_runs_that_differ_in_the_seed_once(finished, monkeypatch, tmp_path):
    row = results.row_of(finished, "digits")
    drawn = {}
    monkeypatch.setattr(results, "trade_off", lambda path, **given: drawn.update(given))
    paths = with_params(row, policy_net__paths=[0, 9], policy_net__depth=14)
    results.figure(tmp_path / "figure.png", [row, with_params(row, seed=7), paths])
    labels = [point["label"] for point in drawn["blockdrop"]]
    assert labels == ["gamma 2.5, block by block", "", "gamma 2.5, paths 0 and 9 by ResNet-14"]


def test_figure_leaves_pruned_networks_out(finished, monkeypatch, tmp_path):
    """The mean over DistributeK of the whole network and of a pruned one would be of neither."""
    row, drawn = results.row_of(finished, "digits"), []
    monkeypatch.setattr(results, "trade_off", lambda path, **content: drawn.append(content))
    pruned = with_params(row, prune__ratio=0.3)
    results.figure(tmp_path / "figure.png", [row, pruned])
    results.figure(tmp_path / "figure.png", [row])
    assert drawn[0] == drawn[1]
    results.figure(tmp_path / "figure.png", [pruned])
    assert len(drawn) == 2


@pytest.mark.parametrize("name", ["metrics/evaluate.json", "plots/baseline/curves.csv"])
def test_unfinished_run_is_refused_with_a_remedy(finished, name):
    (finished / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing; finish `dvc repro` first"):
        results.row_of(finished, "digits")


def test_rows_in_the_repository_can_be_read():
    for path in (ROOT / "results" / results.ROWS).glob("*.json"):
        assert results.Row.load(path).rivals
