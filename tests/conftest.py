"""Small splits and networks that the tests share."""

import os

import pytest
import torch

from pipeline.resnet import ResNet
from pipeline.tensors import Normalisation, Split

# decided before mlflow or dvc is imported: tests tell nobody, and log only where they say so
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
torch.set_num_threads(1)  # networks this small lose by sharing cores, most of all on a busy machine

NORMALISATION = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def make_split(count: int, *, size: int = 8, classes: int = 3, seed: int = 0) -> Split:
    """Images whose brightness tells the class, with noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draw)
    base = 40 + 80 * labels[:, None, None, None]
    noise = torch.randint(-30, 31, (count, size, size, 3), generator=draw)
    return Split(images=(base + noise).clamp(0, 255).byte(), labels=labels)


@pytest.fixture
def train_split() -> Split:
    return make_split(48)


@pytest.fixture
def validation_split() -> Split:
    return make_split(24, seed=1)


@pytest.fixture
def small_resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet(depth=8, width=4, num_classes=3)
