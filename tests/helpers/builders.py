"""What several test modules make: builders."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.data.split import Split
from pipeline.data.transforms import Normalisation
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.path_values import PathValues, statistics_of
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet_cifar import cifar_resnet

# what would send a test's runs elsewhere, or give them another name
TRACKING_VARIABLES = (
    "BLOCKDROP_TRACKING",
    "DVC_EXP_BASELINE_REV",
    "DVC_EXP_NAME",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACKING_URI",
)


NORMALISATION = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


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
        resnet=trained(cifar_resnet(depth=14, width=4, num_classes=len(classes))),
        policy_net=trained(PolicyNet(num_blocks=6, depth=8, width=4)),
        normalisation=NORMALISATION,
        image_size=image_size,
        classes=classes,
        metrics={},
    )


def pair_between_paths(
    images: torch.Tensor, paths: Sequence[str] = ("000", "100", "111")
) -> dict[str, nn.Module]:
    """A ResNet-8 and a policy network that chooses between paths of it: later ones for unsure images."""
    torch.manual_seed(0)
    values = PathValues(paths, num_classes=3)
    policy_net = PolicyNet(num_blocks=3, depth=8, width=4, path_values=values).eval()
    resnet = cifar_resnet(depth=8, width=4, num_classes=3)
    values.costs.copy_(torch.tensor([path.count("1") / 3 for path in paths]))
    values.average.own_share.fill_(0.3)
    values.average.temperature.fill_(1.5)
    values.average.resnet_temperature.fill_(0.8)
    values.gamma.fill_(1000.0)
    log_probs = values.average.log_probs(policy_net.features(NORMALISATION(images)).detach())
    slopes = torch.linspace(20, -20, len(paths))
    values.weight.normal_()
    values.weight[:, 0] += slopes
    values.bias.copy_(-slopes * statistics_of(log_probs)[:, 0].median())
    return {"resnet": resnet, "policy_net": policy_net}


def set_dial(values: PathValues, *, full_flops: float) -> None:
    """A dial as fitting it would make it: gammas from 0 to a million take 30 to 90 % of the FLOPs."""
    weights = torch.linspace(0, 1, values.dial.shape[1])
    values.dial.copy_(torch.stack([1e6 * weights, (0.3 + 0.6 * weights) * full_flops]))


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
