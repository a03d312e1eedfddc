"""Gather the images that keep a block, run it on them, write them back.

Shapes: B images, K blocks, R rows that keep a block, C channels, H and W pixels.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.inference.base import Executor, Networks
from pipeline.inference.fused import FusedNetwork, FusedPolicyNet
from pipeline.inference.threads import map_torch
from pipeline.models.row_ops import kept_rows, take_rows

SMALLEST_PART = 8  # images for which a thread is worth starting


def in_parts(count: int, threads: int) -> list[slice]:
    """Split `count` images into at most `threads` nearly equal parts of SMALLEST_PART or more."""
    parts = max(1, min(threads, count // SMALLEST_PART))
    edges = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def put_rows_(x: Tensor, rows: Tensor, new: Tensor) -> None:
    """x[rows] = new, in place, for channels_last x [B, C, H, W] and new [R, C, H, W]."""
    flat = x.permute(0, 2, 3, 1).view(x.shape[0], -1)  # [B, H * W * C], the same memory
    flat.index_copy_(0, rows, new.permute(0, 2, 3, 1).view(len(rows), -1))  # [R, H * W * C]


class FusedExecutor(Executor):
    """An executor on fused networks, which gives each thread a part of the batch."""

    network_kind: ClassVar[type[Any]] = FusedNetwork

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        self.network = self.network_kind(networks.resnet, self.dtype)
        self.policy_net = None
        if networks.policy_net is not None:
            self.policy_net = FusedPolicyNet(networks.policy_net, self.dtype, self.network_kind)
        self.threads = torch.get_num_threads() if self.device.type == "cpu" else 1

    def _decide(self, inputs: Tensor) -> Tensor:
        policy_net = self.policy_net
        assert policy_net is not None
        return self._by_parts(lambda part: policy_net.actions(inputs[part]), len(inputs))

    def _by_parts(self, run: Callable[[slice], Tensor], count: int) -> Tensor:
        """Concatenate run(part) for every part of a batch of `count` images."""
        parts = in_parts(count, self.threads)
        return torch.cat(map_torch(torch.no_grad()(run), parts, threads=self.threads))

    def _prepared(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.dtype).contiguous(memory_format=torch.channels_last)


class Gather(FusedExecutor):
    """Fast at any mix of policies.

    The whole policy is known before the ResNet starts, so the rows of all blocks are found at once.
    """

    name = "gather"

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        return self._by_parts(lambda part: self._part(inputs[part], actions[part]), len(inputs))

    def _part(self, inputs: Tensor, actions: Tensor) -> Tensor:
        x = self.network.stem(self._prepared(inputs))
        for block, rows in zip(self.network.blocks, kept_rows(actions), strict=True):
            output = block.skip(x)  # [B, C, H, W], right for the images that drop the block
            if rows is None:  # every image keeps it
                x = block.keep_(x, output)
                continue
            if len(rows) > 0:
                residual_rows = block.keep_(take_rows(x, rows), take_rows(output, rows))  # [R, C, H, W]
                put_rows_(output, rows, residual_rows)
            x = output
        return self.network.head(x)
