"""ResNets for ImageNet with the interface of resnet.py: torchvision's blocks in one flat list.

He et al. 2016, table 1, in torchvision's version: a bottleneck strides in its 3x3 convolution. The
BlockDrop authors' networks are the same, and count the same FLOPs.
Shapes: B images, K blocks, N classes, C channels, H and W pixels.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock as TorchvisionBasic
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck

from pipeline.architectures import IMAGENET_BOTTLENECK, Family, stage_sizes
from pipeline.models.resnet import BatchNorm, Block, ResNet


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
        """Both."""
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
        """All three."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


class ImageNetResNet(ResNet):
    """A ResNet for ImageNet: a stem that quarters the side, then four stages.

    Args:
        depth: 18, 34 (basic blocks), 50, 101, 152 (bottlenecks), or a small one of families.py.
        width: channels of the first stage before they are expanded; 64 in all published networks.
        num_classes: outputs of the last linear layer.

    Raises:
        ValueError: there is no such depth.
    """

    family: ClassVar[Family] = "imagenet"

    def __init__(self, *, depth: int, width: int = 64, num_classes: int = 1000) -> None:
        super().__init__(depth=depth, width=width, num_classes=num_classes)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def _stage_sizes(self, depth: int) -> tuple[int, ...]:
        return stage_sizes("imagenet", depth)

    def _first_convolution(self) -> nn.Conv2d:
        return nn.Conv2d(3, self.width, 7, stride=2, padding=3, bias=False)

    def _block_type(self) -> type[Any]:
        return Bottleneck if self.depth in IMAGENET_BOTTLENECK else BasicBlock


_PLACED = re.compile(r"^layer([1-4])\.(0|[1-9]\d{0,3})\.(.+)$")


def stages_of(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks in each stage of a network whose weights have torchvision's names."""
    placed = [(int(m[1]), int(m[2])) for m in map(_PLACED.match, weights) if m]
    return tuple(1 + max((b for s, b in placed if s == stage), default=-1) for stage in range(1, 5))


def from_torchvision(weights: Mapping[str, Tensor], sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Torchvision's weights under the names that ImageNetResNet has for them."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        placed = _PLACED.match(name)
        if placed:
            index = sum(sizes[: int(placed[1]) - 1]) + int(placed[2])
            name = f"blocks.{index}.{placed[3].replace('downsample', 'shortcut')}"
        found[name] = tensor
    return found
