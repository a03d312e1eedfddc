"""Policies as they are taken: from probabilities to actions, and how diverse a set of them is.

Shapes: M images, K blocks.
"""

import torch
from torch import Tensor


def greedy_actions(keep_prob: Tensor) -> Tensor:
    """The most likely policy u~ [B, K] bool: a block runs where its probability is at least 0.5."""
    return keep_prob >= 0.5


def policy_statistics(actions: Tensor) -> dict[str, float]:
    """How many blocks run, and how many policies there really are, for actions [M, K].

    `effective_policies` is exp of the entropy (nats) of the histogram of policies: the number of
    equally frequent policies that would be as diverse. 1 means one policy for all images.
    """
    blocks = actions.double().sum(dim=1)
    _, counts = torch.unique(actions, dim=0, return_counts=True)
    shares = counts.double() / counts.sum()
    return {
        "blocks_mean": float(blocks.mean()),
        "blocks_std": float(blocks.std(correction=0)),
        "unique_policies": float(len(counts)),
        "effective_policies": float(torch.special.entr(shares).sum().exp()),
    }


CERTAIN = 0.01  # nats a decision, where a coin toss has 0.69


def collapse(*, keep_ratio: float, entropy: float | None) -> str | None:
    """In what way a policy has collapsed, with the likely remedy; None where it has not.

    Args:
        keep_ratio: of all decisions that are learnt, how many keep their block, greedily.
        entropy: nats a decision, mean over images and learnt blocks; None where it is to fall to 0.
    """
    if keep_ratio == 1:
        return "it keeps every block of every image; lower gamma, or raise entropy_coef"
    if keep_ratio == 0:
        return "it drops every block of every image; raise gamma"
    if entropy is not None and entropy < CERTAIN:
        return (
            f"it no longer explores (entropy {entropy:.2g} nats a decision); raise entropy_coef, or "
            "lower the policy's learning rate"
        )
    return None
