"""Small networks, images and policies for the tests of executors."""

import torch
from builders import NORMALISATION, trained

from pipeline.inference.base import Networks
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet_cifar import cifar_resnet

SIZE = 16


def make_networks(
    *, depth=14, width=8, input_size=None, policy=True, seed=0, inner_channels=None
) -> Networks:
    torch.manual_seed(seed)
    sizes = {"depth": depth, "width": width, "inner_channels": inner_channels}
    resnet = trained(cifar_resnet(**sizes, num_classes=5), seed)
    policy_net = trained(
        PolicyNet(num_blocks=resnet.num_blocks, width=width, input_size=input_size), seed + 1
    )
    return Networks(
        resnet=resnet, policy_net=policy_net if policy else None, normalisation=NORMALISATION
    )


def make_images(
    count: int, height: int = SIZE, width: int | None = None, *, seed: int = 0
) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, height, width or height, 3), generator=draw).byte()


POLICIES = {
    "random": lambda b, k: torch.rand(b, k, generator=torch.Generator().manual_seed(3)) < 0.4,
    "all kept": lambda b, k: torch.ones(b, k, dtype=torch.bool),
    "all dropped": lambda b, k: torch.zeros(b, k, dtype=torch.bool),
    "first of stages dropped": lambda b, k: (torch.arange(k) % (k // 3) != 0).expand(b, k),
    "only first of stages": lambda b, k: (torch.arange(k) % (k // 3) == 0).expand(b, k),
    "one image keeps": lambda b, k: torch.eye(b, k, dtype=torch.bool),
    "two policies": lambda b, k: (torch.arange(b) % 2 == 0)[:, None] ^ (torch.arange(k) % 2 == 0),
}
