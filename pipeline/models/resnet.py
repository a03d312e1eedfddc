"""A residual network as one flat list of blocks, any of which an image may skip (Wu et al. 2018).

A network is composed of a stem, K blocks and a last linear layer. `resnet_cifar.py` and
`resnet_imagenet.py` have the parts of the two families; `build.py` makes either by its name.
Shapes: B images, K blocks, N classes, C channels, H and W pixels, R rows that keep a block.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.architectures import Family, InnerChannels, inner_channels, stage_sizes
from pipeline.distributed import any_rank_ran
from pipeline.models.row_ops import kept_rows, put_rows, take_rows


def eval_batch_norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm by its running statistics, whatever its mode, and without moving them."""
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that normalises a single value of each channel by its running statistics.

    One value has no variance, so PyTorch refuses to train on it. Here such a batch is no mistake: late
    in a network a small image is one pixel, and a block may be kept by one image alone. That image is
    run as it would be deployed. Its block learns from it, and the statistics stay as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        single_value = self.training and input.numel() == input.shape[1]
        return eval_batch_norm(self, input) if single_value else super().forward(input)


class Block(nn.Module):
    """A residual and a shortcut: relu(shortcut(x) + residual(x)).

    A row that drops the block takes the shortcut alone, without the last ReLU. Where the shortcut has no
    weights, what comes in is non-negative already, so a ReLU would change nothing.
    """

    shortcut: nn.Module

    def convolutions(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The residual's convolutions with their batch norms; a ReLU is after each but the last."""
        raise NotImplementedError

    def narrow(self, channels: Sequence[int]) -> None:
        """Replace the residual's convolutions by fresh ones with these inner channels.

        The stream that the block reads and writes keeps its channels, so the shortcut stays as it is.
        """
        pairs = self.convolutions()
        (first, _), (last, _) = pairs[0], pairs[-1]
        widths = pairwise([first.in_channels, *channels, last.out_channels])
        for number, ((conv, _), (ins, outs)) in enumerate(zip(pairs, widths, strict=True), 1):
            side, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
            narrower = nn.Conv2d(ins, outs, side, stride=stride, padding=padding, bias=False)
            setattr(self, f"conv{number}", narrower)
            setattr(self, f"bn{number}", BatchNorm(outs))

    def residual(self, x: Tensor) -> Tensor:
        """F(x): what dropping the block saves."""
        *inner, (last_conv, last_bn) = self.convolutions()
        for conv, bn in inner:
            x = F.relu(bn(conv(x)), inplace=True)
        return last_bn(last_conv(x))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Run the block on `rows` [R] of x [B, C, H, W] (None: on all), the shortcut on every row."""
        shortcut = self.shortcut(x)
        if rows is None:
            return F.relu(shortcut + self.residual(x), inplace=True)
        taken = take_rows(x, rows)  # [R, C, H, W]
        shortcut_rows = taken if shortcut is x else take_rows(shortcut, rows)
        return put_rows(shortcut, rows, F.relu(shortcut_rows + self.residual(taken), inplace=True))


def make_blocks(
    block_type: Callable[..., Block], stages: Sequence[int], width: int, expansion: int = 1
) -> list[Block]:
    """The blocks from input to output; a later stage halves the resolution and doubles the channels.

    Args:
        block_type: makes a block of (in_channels, channels, stride=), of which `expansion` times
            `channels` come out.
        stages: blocks in each.
        width: channels of the first stage before they are expanded.
    """
    blocks: list[Block] = []
    in_channels = width
    for stage, size in enumerate(stages):
        channels = width * 2**stage
        for index in range(size):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(block_type(in_channels, channels, stride=stride))
            in_channels = channels * expansion
    return blocks


def require_shape(actions: Tensor, expected: tuple[int, int]) -> None:
    """Raise ValueError where actions are not [B, K]."""
    if tuple(actions.shape) != expected:
        raise ValueError(f"actions have shape {tuple(actions.shape)}, expected {expected}")


class ResNet(nn.Module):
    """Stem, K droppable blocks in one flat list, and a linear layer.

    Args:
        family, depth, width: what rebuilds it by `build.make_resnet`; `stages` follows from them.
        conv1: the stem's convolution to `width` channels.
        pool: between the stem's ReLU and the first block.
        blocks: from input to output.
        fc: from the last block's channels to the classes.
        inner_channels: of each block of a pruned network; None: it is not pruned.

    Raises:
        ValueError: `inner_channels` are not of these blocks.
    """

    def __init__(
        self,
        *,
        family: Family,
        depth: int,
        width: int,
        conv1: nn.Conv2d,
        pool: nn.Module,
        blocks: Sequence[Block],
        fc: nn.Linear,
        inner_channels: InnerChannels | None,
    ) -> None:
        super().__init__()
        self.family: Family = family
        self.depth = depth
        self.width = width
        self.stages = stage_sizes(family, depth)  # blocks in each
        self.conv1 = conv1
        self.bn1: nn.BatchNorm2d = BatchNorm(width)
        self.pool = pool
        self.blocks = nn.ModuleList(blocks)
        self.fc = fc
        if inner_channels is not None:
            for block, channels in zip(self.flat_blocks(), inner_channels, strict=True):
                block.narrow(channels)
        self.to(memory_format=torch.channels_last)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def num_classes(self) -> int:
        """N, the length of the logits."""
        return self.fc.out_features

    @property
    def num_blocks(self) -> int:
        """K, the length of a policy."""
        return len(self.blocks)

    @property
    def inner_channels(self) -> InnerChannels:
        """Channels between the convolutions of each block, K times one or (bottleneck) two numbers."""
        return tuple(
            tuple(conv.out_channels for conv, _ in block.convolutions()[:-1])
            for block in self.flat_blocks()
        )

    @property
    def is_pruned(self) -> bool:
        """Whether a block has fewer inner channels than its family, depth and width say."""
        return self.inner_channels != inner_channels(self.family, self.depth, self.width)

    def flat_blocks(self) -> list[Block]:
        """The K blocks from input to output."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def stem(self, images: Tensor) -> Tensor:
        """What runs before the blocks: [B, 3, H, W] to [B, C, H, W]."""
        x = images.contiguous(memory_format=torch.channels_last)
        return self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))

    def head(self, x: Tensor) -> Tensor:
        """What runs after the blocks: [B, C, H, W] to logits [B, N]."""
        return self.fc(x.mean(dim=(2, 3)))

    def forward(self, images: Tensor, actions: Tensor | None = None) -> Tensor:
        """Logits [B, N] of images [B, 3, H, W] under actions [B, K] (None: every block runs).

        A block runs only on the rows that keep it, in training too. The authors run it on every row
        and discard the rest, so images that drop a block still move its batch-norm statistics; here
        they do not, and a dropped block costs no time.

        Raises:
            ValueError: actions are not [B, K].
        """
        rows: Sequence[Tensor | None] = [None] * self.num_blocks
        runs = [True] * self.num_blocks
        if actions is not None:
            require_shape(actions, (len(images), self.num_blocks))
            rows = kept_rows(actions)  # the whole policy is known before the first block: K times [R]
            runs = self.which_run(rows)
        x = self.stem(images)  # [B, C, H, W]
        for block, block_rows, block_runs in zip(self.flat_blocks(), rows, runs, strict=True):
            x = block(x, block_rows) if block_runs else block.shortcut(x)
        return self.head(x)  # [B, N]

    def which_run(self, rows: Sequence[Tensor | None]) -> list[bool]:
        """Whether each block runs: where an image keeps it; in training an image of any process.

        A block that trains runs in every process or in none, on no rows where need be, because the batch
        norm of one process waits for the others (`distributed.SyncedBatchNorm`).
        """
        runs = [block_rows is None or block_rows.numel() > 0 for block_rows in rows]
        return any_rank_ran(runs) if self.training else runs
