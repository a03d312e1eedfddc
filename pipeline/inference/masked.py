"""The reference, and what public code of this family does above batch 1: run, then throw away."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.inference.base import Executor, Networks
from pipeline.inference.fused import FusedBlock, FusedNetwork, FusedPolicyNet
from pipeline.models.policies import greedy_actions
from pipeline.models.resnet import Block


@dataclass(frozen=True)
class _Layers:
    """A block as it was trained, layer by layer; its two methods are those of a PackedBlock."""

    block: Block

    def skip(self, x: Tensor) -> Tensor:
        return self.block.shortcut(x)

    def keep(self, x: Tensor, skipped: Tensor) -> Tensor:
        return torch.relu(skipped + self.block.residual(x))


class Masked(Executor):
    """A block on every image, and its result only where it is kept.

    As in the authors' code, it skips a block only when no image of the batch keeps it. In fp32 the
    networks run as they were trained, layer by layer. In bf16 batch norm is folded in before weights are
    rounded, as in every other executor: layer by layer, more would be lost to rounding.
    """

    name = "masked"

    def __init__(self, networks: Networks, *, precision: str = "fp32") -> None:
        super().__init__(networks, precision=precision)
        self.packed = None if precision == "fp32" else FusedNetwork(networks.resnet, self.dtype)
        policy_net = networks.policy_net
        self.packed_policy = (
            None if policy_net is None or self.packed is None else FusedPolicyNet(policy_net, self.dtype)
        )

    def _decide(self, inputs: Tensor) -> Tensor:
        if self.packed_policy is not None:
            return self.packed_policy.actions(inputs)
        assert self.networks.policy_net is not None
        return greedy_actions(torch.sigmoid(self.networks.policy_net.eval()(inputs)))

    def _classify(self, inputs: Tensor, actions: Tensor) -> Tensor:
        resnet = self.networks.resnet.eval()
        x = inputs.to(self.dtype).contiguous(memory_format=torch.channels_last)
        x = resnet.stem(x) if self.packed is None else self.packed.stem.relu(x)
        blocks: Sequence[_Layers | FusedBlock] = (
            [_Layers(b) for b in resnet.flat_blocks()] if self.packed is None else self.packed.blocks
        )
        used = actions.any(dim=0).tolist()
        for index, block in enumerate(blocks):
            skipped = block.skip(x)
            if used[index]:
                keep = actions[:, index, None, None, None]
                x = torch.where(keep, block.keep(x, skipped), skipped)
            else:
                x = skipped
        return resnet.head(x) if self.packed is None else self.packed.head(x)
