"""A ResNet for inference: batch norm folded into convolutions, and those fused with ReLUs.

Folding: w' = w gamma / sqrt(var + eps), b' = beta - mean gamma / sqrt(var + eps) for each output
channel, by PyTorch's own `fuse_conv_bn_weights`.
Shapes: B images, C channels, H and W pixels, N classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pipeline.models.policy_net import PolicyNet, average_down
from pipeline.models.resnet import Block, ResNet


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [O, I, H, W] and bias [O], fp32, of a convolution that includes its batch norm."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    return weight.detach(), bias.detach()


class FusedConv:
    """A convolution with its batch norm folded in, and on request the ReLU after it."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        weight, bias = fold(conv, bn)
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = bias.to(dtype)
        self.stride = conv.stride[0]
        self.padding = int(conv.padding[0])

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution of x alone, channels_last."""
        return F.conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding)

    def relu(self, x: Tensor) -> Tensor:
        """The convolution of x and its ReLU, channels_last."""
        return F.relu_(self(x))

    def add_relu_(self, x: Tensor, out: Tensor) -> Tensor:
        """In place: relu(out + conv(x)), written to `out`."""
        return out.add_(self(x)).relu_()


class OneDnnConv(FusedConv):
    """A fused convolution on CPUs, by the oneDNN kernels that torch.compile uses as well."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        super().__init__(conv, bn, dtype)
        # padding, stride, dilation, groups
        self.geometry = ([self.padding] * 2, [self.stride] * 2, [1, 1], 1)
        self.packed: dict[tuple[bool, torch.Size], Tensor] = {}

    def _weight_for(self, x: Tensor) -> Tensor:
        """The weight in the layout in which oneDNN convolves x.

        Where several threads share a convolution that layout depends on the number of images, and with a
        weight in another one it takes up to 50 times as long. So the weight is packed for one image, and
        for one thread; for several of each it is left to oneDNN, which packs it in every call.
        """
        one_thread = torch.get_num_threads() == 1
        if len(x) > 1 and not one_thread:
            return self.weight
        key = one_thread, x.shape[2:]
        if key not in self.packed:
            pack = torch.ops.mkldnn._reorder_convolution_weight
            self.packed[key] = pack(self.weight, *self.geometry, x.shape)
        return self.packed[key]

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._weight_for(x), self.bias, *self.geometry, then, [], ""
        )

    def relu(self, x: Tensor) -> Tensor:
        return self(x, "relu")

    def add_relu_(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            out, x, self._weight_for(x), self.bias, *self.geometry, "add", None, "relu", [], ""
        )


def _has_fused_onednn(dtype: torch.dtype) -> bool:
    """Whether PyTorch has these private operators in the form that is used here.

    On an x86 CPU without AVX-512 oneDNN has them in float32 alone.
    """
    try:
        with torch.no_grad():
            conv = OneDnnConv(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4).eval(), dtype)
            images = torch.zeros(1, 4, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
            conv.add_relu_(conv.relu(conv(images)), images)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


@dataclass(frozen=True)
class FusedBlock:
    """A block's convolutions and its shortcut, which is None where the shape stays.

    `inner` and `last` are the convolutions of the residual.
    """

    inner: tuple[FusedConv, ...]
    last: FusedConv
    shortcut: Callable[[Tensor], Tensor] | None

    def skip(self, x: Tensor) -> Tensor:
        """The output of a dropped block: the shortcut alone."""
        if self.shortcut is None:
            return x
        return self.shortcut(x).contiguous(memory_format=torch.channels_last)

    def keep(self, x: Tensor, skipped: Tensor) -> Tensor:
        """The output of a kept block, for `skipped` = skip(x), which is not changed."""
        return self.keep_(x, skipped.clone())

    def keep_(self, x: Tensor, skipped: Tensor) -> Tensor:
        """The output of a kept block, written into `skipped` = skip(x)."""
        for conv in self.inner:
            x = conv.relu(x)
        return self.last.add_relu_(x, skipped)


class FusedHead:
    """The mean over all pixels and the last linear layer."""

    def __init__(self, fc: nn.Linear, dtype: torch.dtype) -> None:
        self.weight, self.bias = fc.weight.detach().to(dtype), fc.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to logits [B, N] float32."""
        return F.linear(x.mean(dim=(2, 3)), self.weight, self.bias).float()


class FusedNetwork:
    """A ResNet, or the one inside a policy network, in evaluation mode."""

    def __init__(self, resnet: ResNet, dtype: torch.dtype) -> None:
        on_onednn = resnet.fc.weight.device.type == "cpu" and _has_fused_onednn(dtype)
        kind = OneDnnConv if on_onednn else FusedConv

        def fuse(block: Block) -> FusedBlock:
            *inner, last = (kind(conv, bn, dtype) for conv, bn in block.convolutions())
            shortcut: Callable[[Tensor], Tensor] | None = block.shortcut
            if isinstance(shortcut, nn.Identity):
                shortcut = None
            elif isinstance(shortcut, nn.Sequential):  # a convolution and its batch norm
                conv, bn = shortcut
                assert isinstance(conv, nn.Conv2d)
                assert isinstance(bn, nn.BatchNorm2d)
                shortcut = kind(conv, bn, dtype)
            return FusedBlock(inner=tuple(inner), last=last, shortcut=shortcut)

        self.conv1, self.pool = kind(resnet.conv1, resnet.bn1, dtype), resnet.pool
        self.blocks = [fuse(block) for block in resnet.flat_blocks()]
        self.head = FusedHead(resnet.fc, dtype)

    def stem(self, x: Tensor) -> Tensor:
        """The first block's input [B, C, H, W] of images x [B, 3, H, W], channels_last."""
        return self.pool(self.conv1.relu(x)).contiguous(memory_format=torch.channels_last)

    def forward(self, inputs: Tensor, policy: Sequence[bool] | None = None) -> Tensor:
        """Logits [B, N] float32 of inputs [B, 3, H, W] under one policy of K blocks (None: all run)."""
        x = self.stem(inputs)
        for block, keep in zip(self.blocks, policy or [True] * len(self.blocks), strict=True):
            skipped = block.skip(x)
            x = block.keep_(x, skipped) if keep else skipped
        return self.head(x)


class FusedPolicyNet:
    """A policy network in evaluation mode."""

    def __init__(
        self, policy_net: PolicyNet, dtype: torch.dtype, kind: Callable[..., Any] = FusedNetwork
    ) -> None:
        self.input_size = policy_net.input_size
        self.features = kind(policy_net.features, dtype)

    def actions(self, inputs: Tensor) -> Tensor:
        """Greedy actions [B, K] bool: a probability of at least 0.5 is a logit of at least 0."""
        return self.features.forward(average_down(inputs, self.input_size)) >= 0
