"""What a policy is trained for: its settings, and reward and losses as pure functions of tensors.

Shapes: B images, K blocks. Notation of Wu et al. 2018, section 3: s keep probabilities, u actions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Phase = Literal["frozen", "learning", "fixed"]


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """How a policy is rewarded and explored, and how the gradient of its reward is estimated.

    Attributes:
        gamma: penalty of a wrong prediction (Eq. 3).
        alpha: bound of the exploration, s' = alpha s + (1 - alpha)(1 - s).
        entropy: the bonus for exploration: `binary` (`entropy`, over active blocks) or `authors`
            (`authors_entropy`, over all).
        entropy_coef: weight of that entropy, summed over blocks, in the loss.
        entropy_epochs: in which the policy learns and that weight falls, to 1/epochs of it in the last;
            None: it stays.
        frozen_epochs: in which the policy waits, and the ResNet learns under actions sampled from it.
        train_epochs: for which the policy learns then; after them it is fixed, and the ResNet learns
            under it as it is deployed. None: it learns to the end.
        marginal_entropy_coef: weight of the entropy of a batch's mean policy (`marginal_entropy_loss`).
        epochs_per_block: pace of the curriculum; None: every decision is active from the start.
        estimator: a name in `estimators.py`.
        num_flips: blocks of an image whose other action is tried in a step, for `local_expectation`.
        soft_reward: reward the probability of the label instead of a correct prediction.
        block_shares: what each block costs as a share of all, K numbers; None: equal, as in the paper.
    """

    gamma: float
    alpha: float
    entropy: Literal["binary", "authors"] = "binary"
    entropy_coef: float
    entropy_epochs: int | None = None
    frozen_epochs: int = 0
    train_epochs: int | None = None
    marginal_entropy_coef: float = 0.0
    epochs_per_block: float | None = None
    estimator: str = "self_critical"
    num_flips: int = 0
    soft_reward: bool = False
    block_shares: tuple[float, ...] | None = None

    def phase_of(self, epoch: int) -> Phase:
        """Whether in an epoch (from 0) the policy still waits, learns, or is fixed already."""
        if epoch < self.frozen_epochs:
            return "frozen"
        if self.train_epochs is not None and epoch >= self.frozen_epochs + self.train_epochs:
            return "fixed"
        return "learning"

    def entropy_coef_of(self, epoch: int) -> float:
        """The entropy's weight in an epoch (from 0): it falls linearly while the policy learns."""
        epochs_learnt = max(0, epoch - self.frozen_epochs)
        if self.entropy_epochs is None:
            return self.entropy_coef
        return self.entropy_coef * max(0.0, 1 - epochs_learnt / self.entropy_epochs)


class Reward:
    """Eq. 3 with the penalty, the block costs and the notion of "correct" of one objective."""

    def __init__(self, objective: PolicyObjective, device: torch.device) -> None:
        self.objective = objective
        shares = objective.block_shares
        self.block_shares = None if shares is None else torch.tensor(shares, device=device)  # [K]

    def __call__(self, correct: Tensor, actions: Tensor) -> Tensor:
        """Of images [B] that ran actions [B, K]; `correct` as `reward` takes it."""
        shares = None if self.block_shares is None else self.block_shares.to(actions.device)
        return reward(correct, actions, self.objective.gamma, shares)

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B] of predictions [B, N]: whether each is correct, or the probability of its label."""
        if self.objective.soft_reward:
            return torch.softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
        return logits.argmax(dim=1) == labels


def bounded_sampling_prob(keep_prob: Tensor, alpha: float) -> Tensor:
    """The sampling distribution s' = alpha s + (1 - alpha)(1 - s), so that exploration never stops.

    Section 3, "bounded exploration"; the authors take alpha = 0.8, which keeps s' in [0.2, 0.8].
    """
    return alpha * keep_prob + (1 - alpha) * (1 - keep_prob)


def keep_ratio(actions: Tensor, block_shares: Tensor | None = None) -> Tensor:
    """|u|_0 / K, [B, K] to [B]; with `block_shares` [K], which add up to 1, u weighted by them."""
    kept = actions.float()
    return kept.mean(dim=1) if block_shares is None else kept @ block_shares


def reward(correct: Tensor, actions: Tensor, gamma: float, block_shares: Tensor | None = None) -> Tensor:
    """Eq. 3: 1 - (|u|_0 / K)^2 where the prediction is correct, -gamma where it is wrong.

    Args:
        correct: [B], bool; or float, the probability of the label: then this is the expected reward of
            a prediction that is drawn from the class probabilities, and a near miss is no far one.
        actions: [B, K], 1 or True where a block runs.
        gamma: penalty of a wrong prediction; the larger, the more blocks are worth keeping.
        block_shares: [K], what each block costs as a share of all; None: equal, as in the paper.

    Returns:
        [B] float32.
    """
    saved = 1 - keep_ratio(actions, block_shares).square()  # [B]
    if correct.dtype == torch.bool:
        return torch.where(correct, saved, -gamma)
    return correct * saved - (1 - correct) * gamma


def reward_gradient(
    likelihood: Tensor,
    gate_gradient: Tensor,
    actions: Tensor,
    sampling_prob: Tensor,
    gamma: float,
    block_shares: Tensor | None = None,
    *,
    trapezoidal: bool = False,
) -> Tensor:
    """Estimates the gradient of the expected reward in p, from one backward pass of the loss.

    The loss is the classification loss, and q = exp(-loss). The reward is R = q A - gamma, with
    A = 1 + gamma - s^2 and s the share of blocks kept. Actions are independent, u_k ~ Bernoulli(p_k).
    So the gradient of the expected reward in p_k is the mean of R(u with u_k = 1) - R(u with u_k = 0).
    Let q1, A1 belong to u_k = 1 and q0, A0 to u_k = 0. Then the difference is, exactly,

        (q1 - q0) (p A0 + (1 - p) A1) + (A1 - A0) (p q1 + (1 - p) q0).

    A0 and A1 are known. The last factor is the mean of the sampled q. Only q1 - q0 has to be estimated.
    A gate goes from 0 (the block is dropped) to 1 (it runs), and q1 - q0 follows from slopes of q on
    this way:

    - by default from the slope where the block runs (`estimators.StraightThrough`). It is known only
      there, so its weight is 1 / p_k.
    - `trapezoidal`: from the mean of the slopes at both ends (`estimators.ReinMax`). The weight of each
      is one over the probability of being at that end.

    Neither sees a block that turns a sure mistake into a sure success: there q is flat at both ends.

    Args:
        likelihood: [B], q.
        gate_gradient: [B, K], gradient of the image's loss in each gate, at the end where it is.
        actions: [B, K] bool.
        sampling_prob: [B, K], p.

    Returns:
        [B, K].
    """
    # s without block k, and what A loses when block k is added to it
    block_share = 1 / actions.shape[1] if block_shares is None else block_shares
    share_of_other_blocks = keep_ratio(actions, block_shares)[:, None] - actions * block_share  # [B, K]
    cost = (2 * share_of_other_blocks + block_share) * block_share  # A0 - A1, [B, K]
    # what a certain success is worth, p A0 + (1 - p) A1
    gain = 1 + gamma - share_of_other_blocks.square() - (1 - sampling_prob) * cost  # [B, K]
    # q1 - q0: slope of q = exp(-loss) is -q times that of the loss, over the probability of being there
    least = torch.finfo(sampling_prob.dtype).eps / 2  # nothing rarer is sampled but by a draw of 0
    inverse_prob = 1 / torch.where(actions, sampling_prob, 1 - sampling_prob).clamp_min(least)  # [B, K]
    weights = inverse_prob / 2 if trapezoidal else inverse_prob * actions
    return likelihood[:, None] * (gain * -gate_gradient * weights - cost)


def log_prob(actions: Tensor, prob: Tensor, active: Tensor | None = None) -> Tensor:
    """Log pi(u | x) = sum over blocks of log Bernoulli(u_k; p_k), [B, K] twice to [B].

    `active` [K] bool limits the sum to the blocks that the policy decides: a block that the curriculum
    still keeps took no random action, so it adds nothing and gets no gradient.
    The probabilities must be those that the actions were drawn from (the bounded ones), or the
    estimate of the gradient is biased.
    """
    prob_of_action = torch.where(actions.bool(), prob, 1 - prob)  # [B, K]
    per_block = prob_of_action.clamp_min(torch.finfo(prob.dtype).tiny).log()
    return (per_block if active is None else per_block * active).sum(dim=1)


def entropy(logits: Tensor, active: Tensor | None = None) -> Tensor:
    """Entropy of the policy in nats, summed over its (active) blocks, [B, K] to [B].

    Both terms, -p log p - (1-p) log(1-p), for p = sigmoid(logits); from the logits, so that it and
    its gradient stay finite when a decision saturates.
    """
    keep_prob = torch.sigmoid(logits)
    per_block = keep_prob * F.softplus(-logits) + (1 - keep_prob) * F.softplus(logits)  # [B, K]
    return (per_block if active is None else per_block * active).sum(dim=1)


def authors_entropy(sampling_prob: Tensor) -> Tensor:
    """What the authors' curriculum calls entropy: -p log p, summed over all K blocks, [B, K] to [B].

    It differs from `entropy` in three ways: p is the bounded s' and not s; the term for dropping is
    missing; and the sum includes the blocks that the curriculum still keeps. The largest value is at
    p = 1/e, which is s = 0.28 under alpha = 0.8. So it rewards dropping where `entropy` rewards
    exploring, and a block may be dropped as soon as it joins the curriculum.
    """
    return torch.special.entr(sampling_prob.clamp_min(1e-15)).sum(dim=1)


def marginal_entropy_loss(
    keep_prob: Tensor, mean_keep_prob: Tensor, active: Tensor | None = None
) -> Tensor:
    """A term whose gradient is minus that of the entropy of the mean policy: [B, K], [K] to a scalar.

    No part of the paper. That entropy, sum over blocks of H(E[s_k]) in nats, is largest where each block
    runs for half of the images. Without a bonus for it a block that helps on average ends up run by
    every image, and the policy as one for all. (The mutual information of image and decision is
    H(E[s_k]) - E[H(s_k)]: Krause et al. 2010, "Discriminative clustering by regularized information
    maximization". Here the second term is not taken off, so that tossing a coin for each image scores
    as well.)

    Args:
        mean_keep_prob: over the whole batch, of which keep_prob may hold a part.
    """
    mean = mean_keep_prob.detach().clamp(1e-4, 1 - 1e-4)  # [K]
    # dH(m)/dm = -logit(m), and each image's keep_prob is 1/B of the mean
    gradient = torch.logit(mean) if active is None else torch.logit(mean) * active
    return (gradient * keep_prob).sum(dim=1).mean()


def expectation_loss(reward_gradient: Tensor, sampling_prob: Tensor) -> Tensor:
    """- g p, summed over blocks, the mean over the batch: [B, K] twice to a scalar.

    Its gradient in the probabilities p is minus g, the estimated gradient of the expected reward.
    """
    return -(reward_gradient.detach() * sampling_prob).sum(dim=1).mean()


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-A log pi(u | x), the mean over the batch: [B] twice to a scalar.

    Its gradient is minus the REINFORCE estimate of the gradient of the expected reward (Eq. 5).
    The authors' finetuning sums this over the batch but averages the cross-entropy beside it. Here all
    terms are means over the batch, so that the entropy's weight means the same at every batch size.
    (Policy loss and cross-entropy reach different networks, so under Adam the scale of either is moot.)
    """
    return -(advantages.detach() * log_probs).mean()
