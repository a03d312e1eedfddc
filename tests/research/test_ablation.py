"""Ablations: one part of a recipe changed, several seeds, rows that are not trained twice."""

import json
import re
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from builders import NORMALISATION
from repository_copy import ROOT

from pipeline.config import Params, load
from pipeline.data.split import Split
from pipeline.flops import measure
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet_cifar import cifar_resnet
from research import ablation

CLASSES = tuple("abcdefghij")
TINY = ",".join([
    "resnet.depth=8", "resnet.width=4", "policy_net.width=4", "data.image_size=8", "static.num_kept=[1]",
    f"resnet.mean={list(NORMALISATION.mean)}", f"resnet.std={list(NORMALISATION.std)}",
    "curriculum.epochs=2", "curriculum.batch_size=16", "finetune.epochs=1", "finetune.batch_size=16",
])  # fmt: skip
PRESET = ablation.changed(load(ROOT / "presets/digits.yaml"), TINY)
PROVENANCE = ablation.Provenance(preset="tiny", set="-", commit="abc", torch="2")
CHANGES = {"curriculum": "curriculum.lr=0.5", "finetune": "finetune_policy.lr=0.5"}
DEEPER = "resnet.depth=14,curriculum.epochs=4"


@pytest.fixture
def make_setting(tmp_path, monkeypatch):
    """Random small networks, and 40 random images."""
    monkeypatch.setattr(ablation, "load_classes", lambda folder: CLASSES)
    torch.manual_seed(0)
    made = Checkpoint(
        stage="pretrain", resnet=cifar_resnet(depth=8, width=4), policy_net=None,
        normalisation=NORMALISATION,
        image_size=8, classes=CLASSES, metrics={},
    )  # fmt: skip
    checkpoint.save(made, tmp_path / "pretrain")
    policy_net = PolicyNet(num_blocks=3, width=4)
    checkpoint.save(
        replace(made, stage="curriculum", resnet=None, policy_net=policy_net), tmp_path / "curriculum"
    )
    images = torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8)
    split = Split(images=images, labels=torch.randint(10, (40,)))
    return lambda stage="finetune": ablation.Setting(
        stage=stage, preset=PRESET, provenance=PROVENANCE, resnet=tmp_path / "pretrain",
        policy_net=tmp_path / "curriculum", train=split, validation=split,
    )  # fmt: skip


def both(setting: ablation.Setting) -> dict:
    change = CHANGES[setting.stage]
    return {ablation.UNCHANGED: setting.preset, change: ablation.variant_of(setting, change)}


def test_changes_are_read_as_params_are():
    params = ablation.changed(
        PRESET, "finetune_policy.train_epochs=null, gamma=1e-05,resnet.mean=[0.1, 0.2,0.3]"
    )
    assert params.finetune_policy.train_epochs is None
    assert (params.gamma, params.resnet.mean) == (1e-5, (0.1, 0.2, 0.3))
    differing = {key for key, value in params.flat().items() if PRESET.flat()[key] != value}
    assert differing == {"gamma", "resnet.mean"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("finetune.distillation", "--set finetune.distillation: write KEY=VALUE"),
        ("=3", "write KEY=VALUE"),
        ("finetune_policy.alpha=[0", r"--set finetune_policy.alpha=\[0: no value"),
        ("finetune.distilation=0", "--set finetune.distilation: there is no such parameter"),
        ("finetune=0", "--set finetune: there is no such parameter"),
        ("gamma=1,finetune.distillation=2", "--set finetune.distillation: is 2, but .*equal to 1"),
        ("finetune_policy.train_epochs=1000", "train_epochs 1000 are more than finetune.epochs"),
    ],
)
def test_invalid_change_is_refused_by_name(text, said):
    with pytest.raises(UserError, match=said):
        ablation.changed(PRESET, text, flag="--set")


@pytest.mark.parametrize("text", ["curriculum.gamma=50", "seed=7", "finetune.epochs=1"])
def test_change_that_the_stage_does_not_read_is_refused(text, make_setting):
    with pytest.raises(UserError, match=f"--vary {text}: changes nothing that finetune reads"):
        ablation.variant_of(make_setting(), text)


@pytest.mark.parametrize("stage", list(ablation.READS))
def test_each_variant_and_seed_is_trained_once(stage, make_setting, tmp_path, monkeypatch):
    setting, out = make_setting(stage), tmp_path / "results" / "rows.csv"
    rows = ablation.run(setting, both(setting), [0, 1], out)
    change = CHANGES[stage]
    assert list(zip(rows["variant"], rows["seed"], strict=True)) == [
        (ablation.UNCHANGED, 0), (change, 0), (ablation.UNCHANGED, 1), (change, 1),
    ]  # fmt: skip
    assert rows["validation_accuracy"].between(0, 1).all()
    assert (rows["commit"] == "abc").all()
    rewards = rows["reward"].tolist()
    assert rewards[0] != rewards[1]  # the change counts
    again = out.read_bytes()
    monkeypatch.setattr(ablation, "row_of", lambda *_: pytest.fail("trained twice"))
    assert len(ablation.run(setting, both(setting), [1], out)) == 2
    assert out.read_bytes() == again
    first, other = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in ablation.summary(rows).splitlines()[2:]
    ]
    assert first[:2] == [ablation.UNCHANGED, "2"]
    assert other[:2] == [change, "2"]
    assert first[2].startswith(f"{100 * rows['validation_accuracy'][::2].mean():.2f} +- ")


@pytest.mark.parametrize("stage", list(ablation.READS))
def test_equal_seeds_alone_give_equal_weights(stage, make_setting):
    setting = make_setting(stage)

    def weights(seed):
        learner = ablation.trained(setting, PRESET.model_copy(update={"seed": seed}))
        return torch.cat([p.detach().flatten() for p in learner.policy_net.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_rows_of_other_settings_are_others(make_setting, tmp_path):
    setting, out = make_setting(), tmp_path / "rows.csv"

    def num_rows(preset: Params = PRESET, **changes: object) -> int:
        made = replace(setting, preset=preset, **changes)
        assert len(ablation.run(made, {ablation.UNCHANGED: preset}, [0], out)) == 1
        return len(pd.read_csv(out))

    assert num_rows() == 1
    assert num_rows(train=ablation.in_memory(setting.train, 20)) == 2
    assert num_rows(ablation.changed(PRESET, "gamma=9")) == 3
    assert num_rows(ablation.changed(PRESET, "pretrain.lr=3")) == 3  # which is not read


def test_row_of_another_process_is_not_written_twice(make_setting, tmp_path):
    setting, out = make_setting(), tmp_path / "rows.csv"
    row = ablation.row_of(setting, ablation.UNCHANGED, PRESET)
    ablation.add_row(out, row)
    ablation.add_row(out, row | {"reward": 3.0})
    assert len(pd.read_csv(out)) == 1
    ablation.add_row(out, row | {"seed": 1})
    assert len(pd.read_csv(out)) == 2


def test_scores_are_those_of_the_greedy_policy(make_setting):
    setting = make_setting()
    learner = ablation.learner_of(setting, PRESET)
    torch.nn.init.constant_(learner.policy_net.features.fc.weight, 0.0)
    learner.policy_net.features.fc.bias.data.copy_(torch.tensor([3.0, -3.0, 0.1]))
    scores = ablation.scores_of(learner, setting.validation, PRESET, gamma=4.0)
    assert scores.blocks_mean == 2
    assert scores.effective_policies == pytest.approx(1)
    assert scores.another_images_policy == scores.validation_accuracy
    accuracy = scores.validation_accuracy
    assert scores.reward == pytest.approx(accuracy * (1 - (2 / 3) ** 2) - (1 - accuracy) * 4.0)
    cost = measure(learner.resnet, learner.policy_net, 8)
    assert scores.flops == (cost.always + cost.blocks[0] + cost.blocks[2]) / cost.full


def test_training_that_diverges_is_no_row(make_setting, tmp_path):
    setting, out = make_setting(), tmp_path / "rows.csv"
    text = "finetune.optimizer=sgd,finetune.lr=1e9"
    said = r"finetune.lr=1e9, seed 0: .* not finite .*; lower a learning rate"
    with pytest.raises(UserError, match=said):
        ablation.run(setting, {text: ablation.variant_of(setting, text)}, [0], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEPER, r"expected \('cifar', 14"),
        ("resnet.mean=[0.0,0.0,0.0]", "input normalisation"),
        ("data.image_size=16", "image size is 8, expected 16"),
    ],
)
def test_data_preset_and_checkpoints_must_belong_together(text, said, make_setting):
    setting = make_setting()
    with pytest.raises(UserError, match=said):
        ablation.checked(replace(setting, preset=ablation.changed(PRESET, text)))
    assert ablation.checked(setting) is setting


def test_a_policy_for_another_network_is_refused(make_setting):
    setting = make_setting()
    other = checkpoint.load(setting.policy_net)
    checkpoint.save(replace(other, policy_net=PolicyNet(num_blocks=6, width=4)), setting.policy_net)
    with pytest.raises(UserError, match="number of blocks is 6, expected 3"):
        ablation.checked(setting)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "variant,seed,recipe\n<<<<<<< ours\n"])
def test_a_damaged_table_is_refused_by_name(content, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"rows.csv is no table of ablations .*; mend or move it"):
        ablation.rows_of(path)
    assert path.read_text() == content


def test_the_command_trains_and_prints_means(make_setting, tmp_path, monkeypatch, capsys):
    setting = make_setting()
    monkeypatch.setattr(ablation.presets, "load", lambda name, folder: PRESET)
    monkeypatch.setattr(ablation, "load_split", lambda folder, name, device: setting.train)
    monkeypatch.setattr(sys, "argv", [
        "ablation", "finetune", "--vary", "finetune_policy.lr=0.5", "--set", "finetune.epochs=2",
        "--images", "16", "--seeds", "3", "--resnet", str(setting.resnet),
        "--policy-net", str(setting.policy_net), "--out", str(tmp_path / "rows.csv"),
    ])  # fmt: skip
    ablation.main()
    assert re.search(r"^\| finetune_policy.lr=0.5 +\| 1 ", capsys.readouterr().out, re.MULTILINE)
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert json.loads(rows[["seed", "images", "epochs"]].to_json(orient="values")) == [[3, 16, 2]] * 2
    assert (rows["set"] == "finetune.epochs=2").all()


def test_missing_data_or_preset_is_named_with_a_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    monkeypatch.setattr(sys, "argv", ["ablation", "finetune"])
    with pytest.raises(SystemExit, match=r"error: data/prepared.*can't be read.*make repro"):
        ablation.main()
    monkeypatch.setattr(sys, "argv", ["ablation", "finetune", "--preset", "foo"])
    with pytest.raises(SystemExit, match=r"error: there is no preset 'foo'; choose .*digits"):
        ablation.main()
    monkeypatch.setattr(sys, "argv", ["ablation", "finetune", "--images", "0"])
    with pytest.raises(SystemExit):
        ablation.main()
    assert "--images: invalid positive value: '0'" in capsys.readouterr().err
    with pytest.raises(UserError, match="fits into memory"):
        ablation.in_memory(object())
