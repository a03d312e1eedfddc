"""What several test modules make: checkpoints."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from builders import NORMALISATION
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline.models import checkpoint
from pipeline.models.checkpoint import SIDECAR, WEIGHTS, Checkpoint
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet_cifar import cifar_resnet


def networks(seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    return Checkpoint(
        stage="finetune",
        resnet=cifar_resnet(depth=8, width=4, num_classes=3),
        policy_net=PolicyNet(num_blocks=3, depth=8, width=4, input_size=8),
        normalisation=NORMALISATION,
        image_size=16,
        classes=("cat", "dog", "hält"),
        metrics={"accuracy": 0.1 + 0.2, "difficulty_spearman": None},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(networks(), tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, key: str, value: object) -> None:
    """Another value in the sidecar."""
    content = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    *sections, last = key.split(".")
    place = content
    for section in sections:
        place = place[section]
    place[last] = value
    (folder / SIDECAR).write_text(json.dumps(content), encoding="utf-8")


def replace_weights(folder: Path, content: bytes) -> None:
    """Other weights, with a sidecar that agrees."""
    (folder / WEIGHTS).write_bytes(content)
    edit(folder, "weights_sha256", hashlib.sha256(content).hexdigest())


def change_tensors(folder: Path, change) -> None:
    tensors = load_tensors((folder / WEIGHTS).read_bytes())
    change(tensors)
    replace_weights(folder, save_tensors(tensors))
