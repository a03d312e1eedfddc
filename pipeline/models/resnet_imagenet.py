"""ResNets for ImageNet: torchvision's blocks in one flat list.

He et al. 2016, table 1, in torchvision's version: a bottleneck strides in its 3x3 convolution. The
BlockDrop authors' networks are the same, and count the same FLOPs.
Shapes: B images, K blocks, N classes, C channels, H and W pixels.
"""

from typing import ClassVar

from torch import nn
from torchvision.models.resnet import BasicBlock as TorchvisionBasic
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck

from pipeline.architectures import IMAGENET_BOTTLENECK, InnerChannels, stage_sizes
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


def imagenet_resnet(
    *,
    depth: int,
    width: int = 64,
    num_classes: int = 1000,
    inner_channels: InnerChannels | None = None,
) -> ResNet:
    """A ResNet whose stem quarters the side, with K blocks in four stages.

    Args:
        depth: 18, 34 (basic blocks), 50, 101, 152 (bottlenecks), or a small one of architectures.py.
        width: channels of the first stage before they are expanded; 64 in all published networks.
        inner_channels: of each block of a pruned network.

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
        inner_channels=inner_channels,
    )
