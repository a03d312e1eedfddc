"""Ablations: one part of a recipe changed, several seeds, rows that are not trained twice."""

import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import NORMALISATION
from repository_copy import ROOT

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint
from pipeline.errors import UserError
from pipeline.params import load
from pipeline.policy_net import PolicyNet
from pipeline.resnet import ResNet
from pipeline.tensors import Split
from tools import ablation

PRESET = load(ROOT / "presets/digits.yaml")
TINY = {
    "resnet.depth": 8, "resnet.width": 4, "policy_net.width": 4, "data.image_size": 8,
    "resnet.mean": list(NORMALISATION.mean), "resnet.std": list(NORMALISATION.std), "static.kept": [1],
    "curriculum.epochs": 2, "curriculum.batch_size": 16, "finetune.epochs": 1, "finetune.batch_size": 16,
}  # fmt: skip
CHANGES = {"curriculum": "curriculum.lr=0.5", "finetune": "finetune.policy_lr=0.5"}


@pytest.fixture
def setting(tmp_path):
    """Random small networks, and 40 random images."""
    torch.manual_seed(0)
    resnet = ResNet(depth=8, width=4)
    made = Checkpoint(
        stage="pretrain", resnet=resnet, policy_net=None, normalisation=NORMALISATION,
        image_size=8, classes=tuple("abcdefghij"), metrics={},
    )  # fmt: skip
    checkpoint.save(made, tmp_path / "pretrain")
    policy_net = PolicyNet(num_blocks=3, width=4)
    checkpoint.save(
        replace(made, stage="curriculum", resnet=None, policy_net=policy_net), tmp_path / "curriculum"
    )
    images = torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8)
    split = Split(images=images, labels=torch.randint(10, (40,)))
    return lambda stage: ablation.Setting(
        stage=stage, resnet=tmp_path / "pretrain", policy_net=tmp_path / "curriculum",
        train=split, validation=split,
    )  # fmt: skip


def test_changes_are_read_as_params_are():
    assert ablation.parsed("finetune.policy_epochs=null,gamma=1e-05") == {
        "finetune.policy_epochs": None,
        "gamma": 1e-05,
    }
    found = ablation.changed(PRESET, {"finetune.distillation": 0.5, "gamma": 3.0})
    assert (found.finetune.distillation, found.gamma) == (0.5, 3.0)
    differing = {key for key, value in found.flat().items() if PRESET.flat()[key] != value}
    assert differing == {"finetune.distillation", "gamma"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("finetune.distillation", "write KEY=VALUE"),
        ("=3", "write KEY=VALUE"),
        ("finetune.distilation=0", "finetune.distilation: there is no such parameter"),
        ("finetune=0", "finetune: there is no such parameter"),
        ("finetune.distillation=2", r"finetune.distillation=2: .*less than or equal to 1"),
        ("finetune.policy_epochs=1000", "policy_epochs 1000 are more than epochs"),
    ],
)
def test_a_change_that_params_refuse_is_refused_by_name(text, said):
    with pytest.raises(UserError, match=said):
        ablation.changed(PRESET, ablation.parsed(text))


@pytest.mark.parametrize("stage", ablation.STAGES)
def test_each_variant_and_seed_is_one_row_and_none_is_trained_twice(
    stage, setting, tmp_path, monkeypatch, capsys
):
    as_it_is = ablation.changed(PRESET, TINY)
    change = CHANGES[stage]
    variants = {
        ablation.AS_IT_IS: as_it_is,
        change: ablation.changed(as_it_is, ablation.parsed(change)),
    }
    out = tmp_path / "results" / "rows.csv"
    ablation.run(setting(stage), variants, [0, 1], out)
    rows = pd.read_csv(out)
    assert list(zip(rows["variant"], rows["seed"], strict=True)) == [
        (ablation.AS_IT_IS, 0), (change, 0), (ablation.AS_IT_IS, 1), (change, 1),
    ]  # fmt: skip
    assert rows["validation_accuracy"].between(0, 1).all()
    assert (rows["flops"] > 0).all()
    assert (rows["reward"][::2].to_numpy() != rows["reward"][1::2].to_numpy()).all()  # the change counts
    again = out.read_bytes()
    monkeypatch.setattr(ablation, "row_of", lambda *_: pytest.fail("trained twice"))
    ablation.run(setting(stage), variants, [0, 1], out)
    assert out.read_bytes() == again
    text = ablation.summary(rows)
    first, other = text.splitlines()[2:]
    assert first.startswith(f"| {ablation.AS_IT_IS} | 2 | ")
    assert other.startswith(f"| {change} | 2 | ")
    assert f"{100 * rows['validation_accuracy'][::2].mean():.2f} +- " in first


def test_what_is_judged_is_the_policy_as_it_is_deployed(setting):
    params = ablation.changed(PRESET, TINY)
    own = setting("finetune")
    learner = ablation.learner_of(own, params)
    torch.nn.init.constant_(learner.policy_net.features.fc.weight, 0.0)
    learner.policy_net.features.fc.bias.data.copy_(torch.tensor([3.0, -3.0, 0.1]))
    found = ablation.judged(learner, own.validation, params)
    assert found["blocks_mean"] == 2
    assert found["effective_policies"] == pytest.approx(1)
    assert found["another_images_policy"] == found["validation_accuracy"]
    right = found["validation_accuracy"]
    assert found["reward"] == pytest.approx(right * (1 - (2 / 3) ** 2) - (1 - right) * params.gamma)


def test_missing_data_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    monkeypatch.setattr(sys, "argv", ["ablation", "finetune"])
    with pytest.raises(SystemExit, match=r"error: data/prepared.*can't be read.*dvc repro"):
        ablation.main()
    with pytest.raises(UserError, match="fits into memory"):
        ablation.first_images(object(), 3)
