"""FLOPs of the networks, by the authors' convention: 2 per multiply-add, convolutions and linear
layers only, the policy network included.

PyTorch's own counter does the counting, on tensors without data; no class is patched.
Shapes: B images, K blocks.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.build import make_resnet, on_meta
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs per image.

    Attributes:
        always: what every image pays: stem, shortcuts, head, and the policy network if there is one.
        policy_net: the policy network's part of `always`.
        blocks: [K], what each block adds for the images that keep it.
        answers: whether an image that keeps no block pays for the policy network alone, which answers.
        pruned: what pruning took from the blocks, together.
    """

    always: int
    policy_net: int
    blocks: tuple[int, ...]
    answers: bool = False
    pruned: int = 0

    @property
    def every_block(self) -> int:
        """The ResNet, pruned or not, with every block and without a policy network."""
        return self.always - self.policy_net + sum(self.blocks)

    @property
    def full(self) -> int:
        """The same before it was pruned: what every saving is a share of."""
        return self.every_block + self.pruned

    def of(self, actions: Tensor) -> Tensor:
        """FLOPs [B], float64, of the images that take actions [B, K]."""
        per_block = torch.tensor(self.blocks, dtype=torch.float64, device=actions.device)
        with_resnet = self.always + actions.double() @ per_block
        if not self.answers:
            return with_resnet
        return torch.where(actions.bool().any(dim=1), with_resnet, float(self.policy_net))

    def block_shares(self) -> tuple[float, ...]:
        """[K], each block's share of what all blocks cost."""
        return tuple(block / sum(self.blocks) for block in self.blocks)

    def without_policy_net(self) -> "Cost":
        """The cost when the policy is known beforehand, as in a static network."""
        return replace(self, always=self.always - self.policy_net, policy_net=0, answers=False)


def _count(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, Tensor]:
    with FlopCounterMode(display=False) as counter:
        out = run(x)
    return counter.get_total_flops(), out


def _on_meta(module: M) -> M:
    """A copy with shapes and no data."""
    return copy.deepcopy(module).to("meta").eval()


def _unpruned(resnet: ResNet) -> ResNet:
    """The same network before it was pruned, with shapes and no data."""
    return on_meta(
        lambda: make_resnet(
            family=resnet.family,
            depth=resnet.depth,
            width=resnet.width,
            num_classes=resnet.num_classes,
        )
    ).eval()


@torch.no_grad()
def measure(resnet: ResNet, policy_net: PolicyNet | None, image_size: int) -> Cost:
    """Count the FLOPs of one image of `image_size` by `image_size` pixels."""
    resnet = _on_meta(resnet)
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    always, x = _count(resnet.stem, image)  # x: [1, C, H, W], what the first block sees
    blocks = []
    for block in resnet.flat_blocks():
        blocks.append(_count(block.residual, x)[0])
        # the shortcut runs for every image, and its output has the shape of the block's
        shortcut_flops, x = _count(block.shortcut, x)
        always += shortcut_flops
    always += _count(resnet.head, x)[0]
    policy_flops = 0
    if policy_net is not None:
        policy_flops = _count(_on_meta(policy_net), image)[0]
    pruned = 0
    if resnet.is_pruned:
        pruned = measure(_unpruned(resnet), None, image_size).every_block - always - sum(blocks)
    return Cost(
        always=always + policy_flops,
        policy_net=policy_flops,
        blocks=tuple(blocks),
        answers=policy_net is not None and policy_net.answers,
        pruned=pruned,
    )


def rewarded_shares(resnet: ResNet, image_size: int, block_cost: str) -> tuple[float, ...] | None:
    """What each block counts in the reward, as a share of all, K numbers.

    Args:
        block_cost: `flops`, or `equal` as in the paper, which gives None.
    """
    return measure(resnet, None, image_size).block_shares() if block_cost == "flops" else None
