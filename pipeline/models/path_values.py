"""Decisions by value: how likely each of a few paths is to be correct, and which pays best by Eq. 3.

A path is a fixed set of blocks. The policy network is a classifier here, and all that its decision sees
of an image is its own class probabilities: a network's confidence tells far better than a look at the
pixels whether more blocks would help. Because the values do not depend on gamma, one training serves
every gamma.

Shapes: B images, P paths, K blocks, N classes, F statistics.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.averaging import AveragedAnswers

DIAL_POINTS = 64  # budgets for which a gamma is kept
SMALLEST_LOGIT = 1e-6  # where two paths are equally good
LARGEST_LOGIT = 30.0  # of a keep probability: a block that every path keeps, or none, is certain


def statistics_of(log_probs: Tensor) -> Tensor:
    """What a decision sees of log probabilities [B, N]: [B, 3 + N] float32.

    The log-odds of the likeliest class, by how much it leads the second, the entropy (nats), and which
    class it is.
    """
    top = log_probs.topk(2, dim=1).values  # [B, 2]
    first = top[:, 0].clamp_max(-1e-6)  # a probability of 1 has infinite odds
    log_odds = first - torch.log1p(-first.exp())
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    which = F.one_hot(log_probs.argmax(dim=1), log_probs.shape[1])  # [B, N]
    numbers = torch.stack([log_odds, top[:, 0] - top[:, 1], entropy], dim=1)
    return torch.cat([numbers, which.to(numbers.dtype)], dim=1)


class PathValues(nn.Module):
    """Class logits of the policy network to decisions: the path with the largest expected reward.

    With q_j the probability that path j classifies the image correctly and c_j its share of the blocks,
    Eq. 3 gives path j the expected reward q_j (1 - c_j^2) - (1 - q_j) gamma.

    `policy/values.py` fits q and the average on validation images.

    Args:
        paths: for each of P paths a text with a 1 for every block that it keeps and a 0 for every other
            one. If a path keeps no block, the policy network answers there itself.
        num_classes: N.

    Attributes:
        costs: [P], c_j.
        gamma: the penalty of a wrong prediction in Eq. 3. It may be set to another value at any time.
        weight, bias: [P, F] and [P], from statistics to the logit of q.
        average: the policy network's answer averaged with the ResNet's, where blocks run.
        dial: [2, G], gammas and the mean FLOPs of a validation image under each, both rising.
    """

    mask: Tensor
    costs: Tensor
    gamma: Tensor
    weight: Tensor
    bias: Tensor
    dial: Tensor

    def __init__(self, paths: Sequence[str], *, num_classes: int) -> None:
        super().__init__()
        self.paths = tuple(paths)
        self.num_classes = num_classes
        kept = [[block == "1" for block in path] for path in paths]
        self.answers = not all(map(any, kept))
        # buffers: they are fitted, so no optimiser moves them
        self.register_buffer("mask", torch.tensor(kept), persistent=False)  # [P, K]
        self.register_buffer("costs", torch.zeros(len(kept)))
        self.register_buffer("gamma", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(len(kept), 3 + num_classes))
        self.register_buffer("bias", torch.zeros(len(kept)))
        self.average = AveragedAnswers()
        self.register_buffer("dial", torch.zeros(2, DIAL_POINTS))

    def correct_prob(self, class_logits: Tensor) -> Tensor:
        """q, [B, N] to [B, P]."""
        statistics = statistics_of(self.average.log_probs(class_logits))  # [B, F]
        return torch.sigmoid(F.linear(statistics, self.weight, self.bias))

    def rewards(self, class_logits: Tensor, gamma: Tensor | None = None) -> Tensor:
        """Each path's expected reward (Eq. 3), [B, N] to [B, P]; a gamma [] stands for `self.gamma`."""
        correct = self.correct_prob(class_logits)
        gamma = self.gamma if gamma is None else gamma
        return correct * (1 - self.costs**2) - (1 - correct) * gamma

    def forward(self, class_logits: Tensor, gamma: Tensor | None = None) -> Tensor:
        """Logits of the keep probabilities, [B, N] to [B, K]: positive exactly on the best path.

        A block's logit tells by how much the best path with it is better than the best one without it.
        For the blocks of the best path of all that is positive, for all others negative. A gamma []
        stands for `self.gamma`.
        """
        rewards = self.rewards(class_logits, gamma)  # [B, P]
        of_paths = rewards[:, :, None]  # [B, P, 1]
        with_block = of_paths.masked_fill(~self.mask, -torch.inf).amax(dim=1)  # [B, K]
        without_block = of_paths.masked_fill(self.mask, -torch.inf).amax(dim=1)  # [B, K]
        gap = (with_block - without_block).abs().clamp(SMALLEST_LOGIT, LARGEST_LOGIT)
        return torch.where(self.mask[rewards.argmax(dim=1)], gap, -gap)  # of equal paths the first

    def gamma_of(self, flops: float) -> float:
        """The gamma under which a validation image took so many FLOPs on average.

        Raises:
            ValueError: no gamma leads there.
        """
        gammas, means = (row.double().cpu().numpy() for row in self.dial)
        if not means[0] <= flops <= means[-1]:
            raise ValueError(f"it goes from {means[0]:.4g} to {means[-1]:.4g} FLOPs an image")
        return float(np.interp(flops, means, gammas))
