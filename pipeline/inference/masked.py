"""The reference executor: runs a block on every image, then discards its result for images that drop it.

So a block costs no time only if all images of a batch drop it. Published code of BlockDrop and of
related methods works like this too, for batches of more than one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.inference.base import Executor, Networks
from pipeline.inference.fused import FusedBlock, FusedNetwork, FusedPolicyNet
from pipeline.models.policies import greedy_actions
from pipeline.models.resnet import Block


@dataclass(frozen=True)
class _TrainedBlock:
    """A block as it was trained, layer by layer, with the methods of a FusedBlock."""

    block: Block

    def skip(self, x: Tensor) -> Tensor:
        return self.block.shortcut(x)

    def keep(self, x: Tensor, skipped: Tensor) -> Tensor:
        return torch.relu(skipped + self.block.residual(x))


class Masked(Executor):
    """Runs a block on every image and takes the result only for images that keep it.

    As in the authors' code, a block is skipped only when no image of the batch keeps it. In fp32 the
    networks run as they were trained, layer by layer. In bf16 batch norm is folded in before the weights
    are rounded, as in every other executor: layer by layer, rounding would cost more.
    """

    name = "masked"

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        self.fused = None if precision == "fp32" else FusedNetwork(networks.resnet, self.dtype)
        policy_net = networks.policy_net
        self.fused_policy = (
            None if policy_net is None or self.fused is None else FusedPolicyNet(policy_net, self.dtype)
        )

    def _decide(self, inputs: Tensor) -> Tensor:
        if self.fused_policy is not None:
            return self.fused_policy.actions(inputs)
        assert self.networks.policy_net is not None
        return greedy_actions(torch.sigmoid(self.networks.policy_net.eval()(inputs)))

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        resnet = self.networks.resnet.eval()
        x = inputs.to(self.dtype).contiguous(memory_format=torch.channels_last)
        x = resnet.stem(x) if self.fused is None else self.fused.stem(x)
        blocks: Sequence[_TrainedBlock | FusedBlock] = (
            [_TrainedBlock(b) for b in resnet.flat_blocks()] if self.fused is None else self.fused.blocks
        )
        used = actions.any(dim=0).tolist()
        for index, block in enumerate(blocks):
            skipped = block.skip(x)  # [B, C, H, W]
            if used[index]:
                keep = actions[:, index, None, None, None]  # [B, 1, 1, 1]
                x = torch.where(keep, block.keep(x, skipped), skipped)
            else:
                x = skipped
        return resnet.head(x) if self.fused is None else self.fused.head(x)
