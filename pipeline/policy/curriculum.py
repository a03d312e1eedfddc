"""The curriculum: from the last block to the first, one after another is left to the policy.

Shapes: B images, K blocks.
"""

from fractions import Fraction

import torch
from torch import Tensor


def num_active_blocks(epoch: int, *, num_blocks: int, epochs_per_block: float) -> int:
    """How many of the last blocks are decided by the policy in an epoch (counted from 0).

    Section 3, "curriculum learning": it starts with the last block, and the authors add one every
    epoch (`epochs_per_block` = 1; 0.5 adds two an epoch), until all K are decided.
    """
    # the decimal that params.yaml has: as floats, 7 / 0.07 is less than 100
    return min(num_blocks, 1 + int(epoch / Fraction(str(epochs_per_block))))


def active_mask(count: int, num_blocks: int, device: torch.device | str = "cpu") -> Tensor:
    """[K] bool, True for the last `count` blocks."""
    return torch.arange(num_blocks, device=device) >= num_blocks - count


def keep_inactive(actions: Tensor, active: Tensor) -> Tensor:
    """Actions [B, K] in which every block that is not active [K] yet is kept."""
    return actions | ~active
