"""Small splits and networks that the tests share, and a quiet machine for those that measure time."""

import os
import signal
from pathlib import Path

import pytest
import quiet
import torch
from torch import nn

from pipeline.checkpoint import Checkpoint
from pipeline.executors.base import Executor, Networks, Output
from pipeline.inference import make_executor
from pipeline.policy_net import PolicyNet
from pipeline.resnet import ResNet
from pipeline.tensors import Normalisation, Split

# decided before mlflow or dvc is imported: tests tell nobody, and log only where they say so
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
# a shell's background jobs ignore Ctrl-C, and hand that on: what is tested here must hear it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # networks this small lose by sharing cores, most of all on a busy machine

# what would send a test's runs elsewhere, or give them another name
TRACKING_VARIABLES = (
    "BLOCKDROP_TRACKING",
    "DVC_EXP_BASELINE_REV",
    "DVC_EXP_NAME",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACKING_URI",
)

pytest_runtest_protocol = quiet.pytest_runtest_protocol
NORMALISATION = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


# seconds, in place of pyproject.toml's: for what takes minutes on a quiet machine
LIMITS = {"sweep": 3600, "slow": 3600, "e2e": 1800}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run DVC begin: they take minutes, for which several workers would wait at the end."""
    for item in items:
        limit = next((LIMITS[kind] for kind in LIMITS if item.get_closest_marker(kind)), None)
        if limit:
            item.add_marker(pytest.mark.timeout(limit))
    long = {item.path for item in items if item.get_closest_marker("e2e")}
    items.sort(key=lambda item: item.path not in long)


def make_split(count: int, *, size: int = 8, classes: int = 3, seed: int = 0) -> Split:
    """Images whose brightness tells the class, with noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draw)
    base = 40 + 80 * labels[:, None, None, None]
    noise = torch.randint(-30, 31, (count, size, size, 3), generator=draw)
    return Split(images=(base + noise).clamp(0, 255).byte(), labels=labels)


def enter_project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a project folder, whose own store is then logged to."""
    for name in TRACKING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.chdir(folder)


def small_pair(*, classes: tuple[str, ...], image_size: int | None, seed: int = 0) -> Checkpoint:
    """A ResNet-14 and its policy network, as if they were trained."""
    torch.manual_seed(seed)
    return Checkpoint(
        stage="finetune",
        resnet=trained(ResNet(depth=14, width=4, num_classes=len(classes))),
        policy_net=trained(PolicyNet(num_blocks=6, depth=8, width=4)),
        normalisation=NORMALISATION,
        image_size=image_size,
        classes=classes,
        metrics={},
    )


def trained(module: nn.Module, seed: int | None = None) -> nn.Module:
    """Batch norm as after a training, so that folding it wrongly shows."""
    if seed is not None:
        torch.manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 3)
    return module.eval()


class StandIn:
    """Executes any module that takes images and actions, as an executor does a ResNet."""

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    def __call__(self, images: torch.Tensor, actions: torch.Tensor | None = None) -> Output:
        return Output(
            logits=self.classify(self.networks.normalisation(images), actions), actions=actions
        )

    def classify(self, inputs: torch.Tensor, actions: torch.Tensor | None) -> torch.Tensor:
        if actions is not None and actions.dim() == 3:
            return torch.stack([self.classify(inputs, alone) for alone in actions])
        return self.networks.resnet.eval()(inputs, actions)


@pytest.fixture
def stand_ins(monkeypatch) -> None:
    """Let tests put simple rules in place of ResNets, which executors can't pack."""

    def make(networks: Networks, **options: str) -> Executor | StandIn:
        if isinstance(networks.resnet, ResNet):
            return make_executor(networks, **options)
        return StandIn(networks)

    monkeypatch.setattr("pipeline.inference.make_executor", make)
    monkeypatch.setattr("pipeline.policy_learning.make_executor", make)


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
