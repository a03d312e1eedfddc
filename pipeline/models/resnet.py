"""Residual networks as one flat list of blocks, any of which an image may skip.

Here the networks for CIFAR; imagenet_resnet.py has those for ImageNet, with the same interface.
Shapes: B images, K blocks, N classes, C channels, H and W pixels, R rows that keep a block.
Architecture: He et al. 2016, section 4.2 (depth 6n+2), with the shortcuts of the BlockDrop authors.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.architectures import Family
from pipeline.distributed import any_rank_ran, here
from pipeline.models.row_ops import _as_rows, kept_rows, put_rows, take_rows

STAGES = 3  # of a CIFAR ResNet; each after the first halves the resolution and doubles the channels


def blocks_per_stage(depth: int) -> int:
    """N of a CIFAR ResNet of depth 6n+2.

    Raises:
        ValueError: no n gives that depth.
    """
    n, remainder = divmod(depth - 2, 2 * STAGES)
    if remainder or n < 1:
        below = 6 * max(n, 1) + 2
        raise ValueError(
            f"depth {depth} is not 6n+2 with n >= 1; the nearest are {below} and {below + 6}"
        )
    return n


class _Ran(torch.autograd.Function):
    """What a block makes of its rows; backward, the slope in their gates too."""

    @staticmethod
    def forward(ctx: Any, ran: Tensor, shortcut: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(ran, shortcut)
        return ran.view_as(ran)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        ran, shortcut = ctx.saved_tensors
        (gradient,) = gradients
        # not the difference of two products, which bfloat16 would round away
        return gradient, None, _slopes(gradient, ran - shortcut)


class _Tried(torch.autograd.Function):
    """`x` as it is; backward, the slope in the gates of `rows`, had a block changed them by `change`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, change: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(rows, change)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor]:
        rows, change = ctx.saved_tensors
        (gradient,) = gradients
        return gradient, None, None, _slopes(take_rows(gradient, rows), change)


def _slopes(gradient: Tensor, change: Tensor) -> Tensor:
    """<gradient, change> of each image, [R, C, H, W] twice to [R] float32."""
    return torch.linalg.vecdot(_as_rows(gradient), _as_rows(change)).float()


def _as_deployed(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm by its running statistics, whatever its mode, and moving none."""
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that normalises a single value of each channel by its running statistics.

    One value has no variance, so PyTorch refuses to train on it. Here such a batch is no mistake: late
    in a network a small image is one pixel, and a block may be kept by one image alone. That image is
    run as it would be deployed. Its block learns from it, and the statistics stay as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        alone = self.training and input.numel() == input.shape[1]
        return _as_deployed(self, input) if alone else super().forward(input)


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


Norm = Callable[[nn.BatchNorm2d, Tensor], Tensor]


class Block(nn.Module):
    """A residual and a shortcut: relu(shortcut(x) + residual(x)).

    A row that drops the block takes the shortcut alone, without the last ReLU. Where the shortcut has no
    weights, what comes in is non-negative already, so a ReLU would change nothing.
    """

    shortcut: nn.Module

    def convolutions(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The residual's convolutions with their batch norms; a ReLU is after each but the last."""
        raise NotImplementedError

    def residual(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """F(x): what dropping the block saves. `norm` takes the place of batch norm's own pass."""
        *inner, last = self.convolutions()
        for conv, bn in inner:
            x = F.relu(bn(conv(x)) if norm is None else norm(bn, conv(x)), inplace=True)
        conv, bn = last
        return bn(conv(x)) if norm is None else norm(bn, conv(x))

    def forward(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        gates: Tensor | None = None,
        *,
        untaken: Tensor | None = None,
        runs: bool = False,
    ) -> Tensor:
        """Run the block on `rows` of x [B, C, H, W] (None: on all), the shortcut on every row.

        Args:
            gates: [B] ones; a gate's gradient is <dL/dout, change> of its image, the change being what
                comes out with the block less what comes out without it.
            untaken: rows that drop the block and whose gates get a gradient nonetheless: the block is
                tried on them as it would be deployed, and changes nothing.
            runs: run it on no rows too, because other processes run it and their batch norm waits.
        """
        shortcut = self.shortcut(x)
        if rows is None:
            ran = F.relu(shortcut + self.residual(x), inplace=True)
            return ran if gates is None else _Ran.apply(ran, shortcut, gates)
        out = shortcut
        if rows.numel() or runs:
            taken = take_rows(x, rows)
            beside = taken if shortcut is x else take_rows(shortcut, rows)
            ran = F.relu(beside + self.residual(taken), inplace=True)
            if gates is not None:
                ran = _Ran.apply(ran, beside, gates.index_select(0, rows))
            out = put_rows(shortcut, rows, ran)
        if untaken is not None and untaken.numel() and gates is not None:
            with torch.no_grad():
                taken = take_rows(x, untaken)
                beside = taken if shortcut is x else take_rows(shortcut, untaken)
                residual = self.residual(taken, _as_deployed)
                change = F.relu(beside + residual, inplace=True).sub_(beside)
            out = _Tried.apply(out, untaken, change, gates.index_select(0, untaken))
        return out


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

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
        """Both."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class ResNet(nn.Module):
    """A CIFAR ResNet of depth 6n+2 with K = 3n droppable blocks in one flat list.

    Args:
        depth: 6n+2 (He et al. 2016): 8, 14, 20, 32, 44, 56, 110, ...
        width: channels of the first stage; the next two have twice and four times as many.
        num_classes: outputs of the last linear layer.

    Raises:
        ValueError: the depth is not 6n+2.
    """

    family: ClassVar[Family] = "cifar"

    def __init__(self, *, depth: int, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.stages = self._stage_sizes(depth)
        self.depth = depth
        self.width = width
        self.conv1 = self._first_convolution()
        self.bn1: nn.BatchNorm2d = BatchNorm(width)
        self.pool: nn.Module = nn.Identity()  # between the stem's ReLU and the first block
        blocks, channels = self._make_blocks()
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(channels, num_classes)
        self.to(memory_format=torch.channels_last)
        self._initialise()

    def _stage_sizes(self, depth: int) -> tuple[int, ...]:
        """Blocks in each stage."""
        return (blocks_per_stage(depth),) * STAGES

    def _first_convolution(self) -> nn.Conv2d:
        return nn.Conv2d(3, self.width, 3, padding=1, bias=False)

    def _make_blocks(self) -> tuple[list[Block], int]:
        """The blocks from input to output, and the channels of the last one."""
        kind = self._block_type()
        blocks: list[Block] = []
        in_channels = self.width
        for stage, count in enumerate(self.stages):
            channels = self.width * 2**stage
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(kind(in_channels, channels, stride=stride))
                in_channels = channels * kind.expansion
        return blocks, in_channels

    def _block_type(self) -> type[Any]:
        """Makes a block of (in_channels, channels, stride=); `expansion` times `channels` come out."""
        return BasicBlock

    def _initialise(self) -> None:
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

    def forward(
        self,
        images: Tensor,
        actions: Tensor | None = None,
        gates: Tensor | None = None,
        *,
        try_dropped: bool = False,
    ) -> Tensor:
        """Logits [B, N] of images [B, 3, H, W] under actions [B, K] (None: every block runs).

        A block runs only on the rows that keep it, in training too. The authors run it on every row
        and discard the rest, so images that drop a block still move its batch-norm statistics; here
        they do not, and a dropped block costs no time.

        Args:
            gates: [B, K] ones, each the share of the way from what comes out of a block's shortcut
                alone to what comes out of the block. They change no result; their gradient is the
                loss's slope at that end of the way where the image is: where it runs the block.
            try_dropped: also where it drops it, for which the block is run once more, forward alone, as
                it would be deployed; else these gates' gradient is 0.

        Raises:
            ValueError: actions are not [B, K].
        """
        expected = (images.shape[0], self.num_blocks)
        if actions is not None and tuple(actions.shape) != expected:
            raise ValueError(f"actions have shape {tuple(actions.shape)}, expected {expected}")
        rows: Sequence[Tensor | None] = [None] * self.num_blocks
        untaken: Sequence[Tensor | None] = [None] * self.num_blocks
        if actions is not None and try_dropped:  # both at once, for a single wait
            both = kept_rows(torch.cat([actions.bool(), ~actions.bool()], dim=1))
            every = torch.arange(len(images), device=images.device)
            rows = both[: self.num_blocks]
            untaken = [every if one is None else one for one in both[self.num_blocks :]]
        elif actions is not None:
            rows = kept_rows(actions)
        columns: Sequence[Tensor | None] = [None] * self.num_blocks if gates is None else gates.unbind(1)
        runs = [False] * self.num_blocks
        if self.training and actions is not None and here().size > 1:
            runs = any_rank_ran([r is None or r.numel() > 0 for r in rows])
        x = self.stem(images)
        for block, block_rows, column, block_untaken, block_runs in zip(
            self.flat_blocks(), rows, columns, untaken, runs, strict=True
        ):
            x = block(x, block_rows, column, untaken=block_untaken, runs=block_runs)
        return self.head(x)
