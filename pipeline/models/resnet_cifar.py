"""ResNets for CIFAR: He et al. 2016, section 4.2 (depth 6n+2), with the BlockDrop authors' shortcuts.

Shapes: B images, K blocks, N classes, C channels, H and W pixels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.architectures import InnerChannels, stage_sizes
from pipeline.models.resnet import BatchNorm, Block, ResNet, make_blocks


class PoolPadShortcut(nn.Module):
    """The authors' shortcut where the shape changes: average pooling, then zero channels appended.

    It has no weights, and it runs also when the block is dropped.
    """

    def __init__(self, *, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C + extra, H / stride, W / stride]."""
        return F.pad(F.avg_pool2d(x, self.stride), (0, 0, 0, 0, 0, self.extra_channels))


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(channels)
        changes_shape = stride != 1 or in_channels != channels
        self.shortcut: nn.Module = (
            PoolPadShortcut(stride=stride, extra_channels=channels - in_channels)
            if changes_shape
            else nn.Identity()
        )

    def convolutions(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


def cifar_resnet(
    *,
    depth: int,
    width: int = 16,
    num_classes: int = 10,
    inner_channels: InnerChannels | None = None,
) -> ResNet:
    """A ResNet with K = 3n blocks in three stages.

    Args:
        depth: 6n+2: 8, 14, 20, 32, 44, 56, 110, ...
        width: channels of the first stage; the next two have twice and four times as many.
        inner_channels: of each block of a pruned network.

    Raises:
        ValueError: the depth is not 6n+2.
    """
    stages = stage_sizes("cifar", depth)
    return ResNet(
        family="cifar",
        depth=depth,
        width=width,
        conv1=nn.Conv2d(3, width, 3, padding=1, bias=False),
        pool=nn.Identity(),
        blocks=make_blocks(BasicBlock, stages, width),
        fc=nn.Linear(width * 2 ** (len(stages) - 1), num_classes),
        inner_channels=inner_channels,
    )
