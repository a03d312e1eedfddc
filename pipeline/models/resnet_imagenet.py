"""ResNets for ImageNet: torchvision's blocks in one flat list.

He et al. 2016, table 1, in torchvision's version: a bottleneck strides in its 3x3 convolution. The
BlockDrop authors' networks are the same, and count the same FLOPs.
Shapes: B images, K blocks, N classes, C channels, H and W pixels.
"""

import re
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock as TorchvisionBasic
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck

from pipeline.architectures import IMAGENET_BOTTLENECK, stage_sizes
from pipeline.models.resnet import BatchNorm, Block, ResNet, make_blocks


class _ImageNetBlock(Block):
    """What both of torchvision's blocks get: a shortcut that runs on its own.

    Where the shape changes the shortcut is a 1x1 convolution with batch norm, which always runs. A row
    that drops such a block takes its output as it is, negative numbers included: so do the authors,
    whose ReLU is on the kept branch alone, and so were their networks finetuned.
    """

    expansion: ClassVar[int]
    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    conv2: nn.Conv2d
    bn2: nn.BatchNorm2d

    def project(self, in_channels: int, channels: int, stride: int) -> None:
        """Set the shortcut for an output of `channels`."""
        if stride == 1 and in_channels == channels:
            self.shortcut = nn.Identity()
            return
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), BatchNorm(channels)
        )


class BasicBlock(_ImageNetBlock, TorchvisionBasic):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__(in_channels, channels, stride, norm_layer=BatchNorm)
        self.project(in_channels, channels * self.expansion, stride)

    def convolutions(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class Bottleneck(_ImageNetBlock, TorchvisionBottleneck):
    """1x1, 3x3 and 1x1 convolutions; four times `channels` come out."""

    expansion = 4
    conv3: nn.Conv2d
    bn3: nn.BatchNorm2d

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__(in_channels, channels, stride, norm_layer=BatchNorm)
        self.project(in_channels, channels * self.expansion, stride)

    def convolutions(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


def imagenet_resnet(*, depth: int, width: int = 64, num_classes: int = 1000) -> ResNet:
    """A ResNet whose stem quarters the side, with K blocks in four stages.

    Args:
        depth: 18, 34 (basic blocks), 50, 101, 152 (bottlenecks), or a small one of architectures.py.
        width: channels of the first stage before they are expanded; 64 in all published networks.

    Raises:
        ValueError: there is no such depth.
    """
    stages = stage_sizes("imagenet", depth)
    block_type = Bottleneck if depth in IMAGENET_BOTTLENECK else BasicBlock
    return ResNet(
        family="imagenet",
        depth=depth,
        width=width,
        conv1=nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        pool=nn.MaxPool2d(3, stride=2, padding=1),
        blocks=make_blocks(block_type, stages, width, block_type.expansion),
        fc=nn.Linear(width * 2 ** (len(stages) - 1) * block_type.expansion, num_classes),
    )


_LAYER = re.compile(r"^layer([1-4])\.(0|[1-9]\d{0,3})\.(.+)$")


def stages_of(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks in each stage of a network whose weights have torchvision's names."""
    indices = [(int(m[1]), int(m[2])) for m in map(_LAYER.match, weights) if m]
    return tuple(1 + max((i for s, i in indices if s == stage), default=-1) for stage in range(1, 5))


def from_torchvision(weights: Mapping[str, Tensor], sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Torchvision's weights under the names that `imagenet_resnet` has for them."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = _LAYER.match(name)
        if match:
            stage, index, rest = int(match[1]), int(match[2]), match[3]
            name = f"blocks.{sum(sizes[: stage - 1]) + index}.{rest.replace('downsample', 'shortcut')}"
        renamed[name] = tensor
    return renamed
