"""Gather the images that keep a block, run it on them, write them back.

Shapes: B images, K blocks, R rows that keep a block, C channels, H and W pixels.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.inference.base import Executor, Networks
from pipeline.inference.fused import FusedNetwork, FusedPolicyNet
from pipeline.inference.threads import map_torch
from pipeline.models.row_ops import kept_rows, take_rows

SMALLEST_PART = 8  # images for which a worker is worth waking


def in_parts(count: int, workers: int) -> list[slice]:
    """Split `count` images into at most `workers` nearly equal parts of SMALLEST_PART or more."""
    parts = max(1, min(workers, count // SMALLEST_PART))
    edges = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def put_rows_(x: Tensor, rows: Tensor, new: Tensor) -> None:
    """x[rows] = new, in place, for channels_last x [B, C, H, W] and new [R, C, H, W]."""
    flat = x.permute(0, 2, 3, 1).view(x.shape[0], -1)
    flat.index_copy_(0, rows, new.permute(0, 2, 3, 1).view(len(rows), -1))


class Packed(Executor):
    """What executors on packed networks share: the policy network, and a part of the batch a worker."""

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        self.network = FusedNetwork(networks.resnet, self.dtype)
        self.policy_net = (
            None if networks.policy_net is None else FusedPolicyNet(networks.policy_net, self.dtype)
        )
        self.workers = torch.get_num_threads() if self.device.type == "cpu" else 1

    def _decide(self, inputs: Tensor) -> Tensor:
        policy_net = self.policy_net
        assert policy_net is not None
        return self._by_parts(lambda part: policy_net.actions(inputs[part]), len(inputs))

    def _by_parts(self, run: Callable[[slice], Tensor], count: int) -> Tensor:
        """run(part) for every part of a batch, and what they give in one tensor."""
        parts = in_parts(count, self.workers)
        return torch.cat(map_torch(torch.no_grad()(run), parts, workers=self.workers))

    def _stem(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.network.stem.relu(inputs)


class Gather(Packed):
    """Any mix of policies. The policy is known before the ResNet starts, so one look finds all rows."""

    name = "gather"

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        return self._by_parts(lambda part: self._part(inputs[part], actions[part]), len(inputs))

    def _part(self, inputs: Tensor, actions: Tensor) -> Tensor:
        x = self._stem(inputs)
        for block, rows in zip(self.network.blocks, kept_rows(actions), strict=True):
            skipped = block.skip(x)
            if rows is None:
                x = block.keep_(x, skipped)
                continue
            if len(rows) > 0:
                kept = block.keep_(take_rows(x, rows), take_rows(skipped, rows))
                put_rows_(skipped, rows, kept)
            x = skipped
        return self.network.head(x)
