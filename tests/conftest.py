"""Small splits and networks that the tests share, and a quiet machine for those that measure time."""

import os
import signal

import pytest
import serial
import torch
from builders import make_split

from pipeline.data.split import Split
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Executor, Networks, Output
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_cifar import cifar_resnet

# decided before mlflow or dvc is imported: tests tell nobody, and log only where they say so
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
# a shell's background jobs ignore Ctrl-C, and hand that on: what is tested here must hear it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # networks this small lose by sharing cores, most of all on a busy machine


pytest_runtest_protocol = serial.pytest_runtest_protocol


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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test has the same networks, whatever ran before it: fixtures draw weights without a seed."""
    torch.manual_seed(0)


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

    monkeypatch.setattr("pipeline.inference.predict.make_executor", make)
    monkeypatch.setattr("pipeline.policy.learner.make_executor", make)


@pytest.fixture
def train_split() -> Split:
    return make_split(48)


@pytest.fixture
def validation_split() -> Split:
    return make_split(24, seed=1)


@pytest.fixture
def small_resnet() -> ResNet:
    torch.manual_seed(0)
    return cifar_resnet(depth=8, width=4, num_classes=3)


@pytest.fixture
def drawn(monkeypatch):
    """The figure that was saved last, and the texts in it."""
    from drawing import Drawn  # matplotlib, which few tests need

    return Drawn(monkeypatch)
