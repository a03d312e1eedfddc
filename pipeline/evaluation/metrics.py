"""What a policy is worth beyond its accuracy: does looking at the image pay?

Shapes: M images of a split, K blocks, P policies.
"""

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from pipeline.data.split import ImageSplit
from pipeline.data.transforms import Normalisation
from pipeline.flops import Cost
from pipeline.inference.predict import accuracies_of, correct_under
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet


def shuffled_accuracy(
    resnet: ResNet,
    split: ImageSplit,
    actions: Tensor,
    *,
    normalisation: Normalisation,
    policy_net: PolicyNet | None = None,
    repeats: int,
    draw: torch.Generator,
) -> float:
    """Accuracy when every image takes another image's policy, the mean of some shuffles.

    The same policies in the same numbers, so the same cost; what accuracy loses is what looking at the
    image buys. Each shuffle is one random cycle through all images, so no image keeps its own row.
    """
    others = torch.empty(repeats, *actions.shape, dtype=actions.dtype)
    for shuffle in others:
        cycle = torch.randperm(len(split), generator=draw)
        shuffle[cycle] = actions[cycle.roll(1)]
    right = correct_under(resnet, split, others, normalisation=normalisation, policy_net=policy_net)
    return sum(accuracies_of(right)) / repeats


def single_policy_candidates(actions: Tensor, cost: Cost, budget: float, limit: int) -> Tensor:
    """Policies [P, K] bool that one could give to all images at no more than `budget` FLOPs each.

    From the policies [M, K] of some images: the `limit` most frequent ones within the budget, and for
    each number of blocks the policy of the most often kept blocks. No policy network runs for these,
    unless it answers itself.
    """
    distinct, counts = torch.unique(actions, dim=0, return_counts=True)
    by_frequency = distinct[counts.argsort(descending=True, stable=True)]
    order = actions.double().mean(dim=0).argsort(descending=True, stable=True)
    top = torch.zeros(len(order) + 1, len(order), dtype=torch.bool)
    for count in range(len(order) + 1):
        top[count, order[:count]] = True
    static = cost if cost.answers else cost.without_policy_net()
    affordable = [some[static.of(some) <= budget] for some in (by_frequency.bool(), top)]
    found = torch.cat([affordable[0][:limit], affordable[1]])
    keys, first = np.unique(found.numpy(), axis=0, return_index=True)
    return found[np.sort(first)] if len(keys) else found


def best_single_policy(
    resnet: ResNet,
    split: ImageSplit,
    candidates: Tensor,
    *,
    normalisation: Normalisation,
    policy_net: PolicyNet | None = None,
) -> tuple[Tensor, float]:
    """The policy [K] of candidates [P, K] that is right most often on a split, and how often.

    `policy_net` is one that answers itself.
    """
    for_all = candidates[:, None].expand(-1, len(split), -1)
    accuracies = accuracies_of(
        correct_under(resnet, split, for_all, normalisation=normalisation, policy_net=policy_net)
    )
    best = int(np.argmax(accuracies))  # the first of equals, so the most frequent
    return candidates[best], accuracies[best]


def difficulty_spearman(
    losses: Tensor, blocks: Tensor, *, resamples: int, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Spearman's rank correlation of difficulty and effort, with a 95 % bootstrap interval.

    Args:
        losses: [M], the full network's loss on each image.
        blocks: [M], how many blocks the image took.

    Returns:
        Correlation, lower and upper end; None three times when all images take equally many blocks,
        where the correlation is not defined.
    """
    if len(torch.unique(blocks)) < 2 or len(torch.unique(losses)) < 2:
        return None, None, None
    x, y = losses.double().numpy(), blocks.double().numpy()
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        rows = rng.integers(0, len(x), len(x))
        if np.ptp(x[rows]) > 0 and np.ptp(y[rows]) > 0:
            found.append(float(spearmanr(x[rows], y[rows]).statistic))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(spearmanr(x, y).statistic), float(low), float(high)
