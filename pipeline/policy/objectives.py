"""Reward, advantage and losses of BlockDrop, as pure functions of tensors.

Shapes: B images, K blocks. Notation of Wu et al. 2018, section 3: s keep probabilities, u actions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bounded_sampling_prob(keep_prob: Tensor, alpha: float) -> Tensor:
    """The sampling distribution s' = alpha s + (1 - alpha)(1 - s), so that exploration never stops.

    Section 3, "bounded exploration"; the authors take alpha = 0.8, which keeps s' in [0.2, 0.8].
    """
    return alpha * keep_prob + (1 - alpha) * (1 - keep_prob)


def keep_ratio(actions: Tensor, block_shares: Tensor | None = None) -> Tensor:
    """|u|_0 / K, [B, K] to [B]; with `block_shares` [K], which add up to 1, u weighted by them."""
    kept = actions.float()
    return kept.mean(dim=1) if block_shares is None else kept @ block_shares


def reward(right: Tensor, actions: Tensor, gamma: float, block_shares: Tensor | None = None) -> Tensor:
    """Eq. 3: 1 - (|u|_0 / K)^2 where the prediction is right, -gamma where it is wrong.

    Args:
        right: [B], bool; or float, the probability of the label: then this is the expected reward of
            a prediction that is drawn from the class probabilities, and a near miss is no far one.
        actions: [B, K], 1 or True where a block runs.
        gamma: penalty of a wrong prediction; the larger, the more blocks are worth keeping.
        block_shares: [K], what each block costs as a share of all; None: equal, as in the paper.

    Returns:
        [B] float32.
    """
    saved = 1 - keep_ratio(actions, block_shares).square()
    return (
        torch.where(right, saved, -gamma)
        if right.dtype == torch.bool
        else (right * saved - (1 - right) * gamma)
    )


def reward_gradient(
    likelihood: Tensor,
    loss_slopes: Tensor,
    actions: Tensor,
    sampling_prob: Tensor,
    gamma: float,
    block_shares: Tensor | None = None,
    *,
    both_ends: bool = False,
) -> Tensor:
    """The reward's slope in each action, from one backward pass of the classification loss.

    Under independent actions u_k ~ Bernoulli(p_k) the gradient of the expected reward in p_k is the mean
    of R(u with u_k = 1) - R(u with u_k = 0), where R = q (1 - s^2 + gamma) - gamma with q = exp(-loss)
    and s the share kept. With A for the bracket and indices for the two actions that is, exactly,
    (q1 - q0) (p A0 + (1 - p) A1) + (A1 - A0) (p q1 + (1 - p) q0): both A are known, and the last factor
    is the mean of the sampled q. What is left, q1 - q0, is estimated from slopes of q on the way from
    the block's dropping to its running:

    - from the slope where the block runs, weighted by 1 / p_k because it is known there alone (a
      straight-through gradient: Bengio et al. 2013, arXiv 1308.3432), right to first order;
    - with `both_ends`, from the mean of the slopes at both ends, each weighted by one over the
      probability of being there: the trapezoid rule, right to second order (ReinMax: Liu et al. 2023,
      "Bridging discrete and backpropagation: straight-through and beyond").

    Beside a ResNet that learns the first sees little but costs: gradient descent takes the mean slope in
    the scale of a residual to 0, however much worse the network would be without it. Neither sees a
    block that turns a sure mistake into a sure success, where q is flat at both ends.

    Args:
        likelihood: [B], q.
        loss_slopes: [B, K], slope of the image's loss in the share of a block, where it is.
        actions: [B, K] bool.
        sampling_prob: [B, K], p.

    Returns:
        [B, K].
    """
    share = keep_ratio(actions, block_shares)[:, None]
    each = 1 / actions.shape[1] if block_shares is None else block_shares
    others = share - actions * each
    cost = (2 * others + each) * each  # A0 - A1
    worth = 1 + gamma - others.square() - (1 - sampling_prob) * cost  # p A0 + (1 - p) A1
    least = torch.finfo(sampling_prob.dtype).eps / 2  # nothing rarer is sampled but by a draw of 0
    there = 1 / torch.where(actions, sampling_prob, 1 - sampling_prob).clamp_min(least)
    weights = there / 2 if both_ends else there * actions
    return likelihood[:, None] * (worth * -loss_slopes * weights - cost)


def log_prob(actions: Tensor, keep_prob: Tensor, learnt: Tensor | None = None) -> Tensor:
    """Log pi(u | x) = sum over blocks of log Bernoulli(u_k; p_k), [B, K] twice to [B].

    `learnt` [K] bool limits the sum to the blocks whose decision is learnt: a block that the
    curriculum still keeps took no random action, so it adds nothing and gets no gradient.
    The probabilities must be those that the actions were drawn from (the bounded ones), or the
    estimate of the gradient is biased.
    """
    taken = torch.where(actions.bool(), keep_prob, 1 - keep_prob)
    each = taken.clamp_min(torch.finfo(taken.dtype).tiny).log()
    return (each if learnt is None else each * learnt).sum(dim=1)


def entropy(logits: Tensor, learnt: Tensor | None = None) -> Tensor:
    """Entropy of the policy in nats, summed over its (learnt) blocks, [B, K] to [B].

    Both terms, -p log p - (1-p) log(1-p), for p = sigmoid(logits); from the logits, so that it and
    its gradient stay finite when a decision saturates.
    """
    keep_prob = torch.sigmoid(logits)
    each = keep_prob * F.softplus(-logits) + (1 - keep_prob) * F.softplus(logits)
    return (each if learnt is None else each * learnt).sum(dim=1)


def authors_entropy(sampling_prob: Tensor) -> Tensor:
    """What the authors' curriculum calls entropy: -p log p, summed over all K blocks, [B, K] to [B].

    It differs from `entropy` in three ways: p is the bounded s' and not s; the term for dropping is
    missing; and the sum includes the blocks that the curriculum still keeps. The largest value is at
    p = 1/e, which is s = 0.28 under alpha = 0.8. So it rewards dropping where `entropy` rewards
    exploring, and a block may be dropped as soon as it joins the curriculum.
    """
    return torch.special.entr(sampling_prob.clamp_min(1e-15)).sum(dim=1)


def marginal_entropy_loss(
    keep_prob: Tensor, mean_keep_prob: Tensor, learnt: Tensor | None = None
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
    mean = mean_keep_prob.detach().clamp(1e-4, 1 - 1e-4)
    slopes = torch.logit(mean) if learnt is None else torch.logit(mean) * learnt
    return (slopes * keep_prob).sum(dim=1).mean()


def expectation_loss(slopes: Tensor, sampling_prob: Tensor) -> Tensor:
    """- slope p, summed over blocks, the mean over the batch: [B, K] twice to a scalar.

    Its gradient in the probabilities p is minus `slopes`, the estimated slopes of the expected reward.
    """
    return -(slopes.detach() * sampling_prob).sum(dim=1).mean()


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-A log pi(u | x), the mean over the batch: [B] twice to a scalar.

    Its gradient is minus the REINFORCE estimate of the gradient of the expected reward (Eq. 5).
    The authors' finetuning sums this over the batch but averages the cross-entropy beside it. Here all
    terms are means over the batch, so that the entropy's weight means the same at every batch size.
    (Policy loss and cross-entropy reach different networks, so under Adam the scale of either is moot.)
    """
    return -(advantages.detach() * log_probs).mean()
