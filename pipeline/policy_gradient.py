"""Reward, advantage and losses of BlockDrop, as pure functions of tensors.

Shapes: B images, K blocks. Notation of Wu et al. 2018, section 3: s keep probabilities, u actions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bounded(keep_prob: Tensor, alpha: float) -> Tensor:
    """The sampling distribution s' = alpha s + (1 - alpha)(1 - s), so that exploration never stops.

    Section 3, "bounded exploration"; the authors take alpha = 0.8, which keeps s' in [0.2, 0.8].
    """
    return alpha * keep_prob + (1 - alpha) * (1 - keep_prob)


def reward(correct: Tensor, actions: Tensor, gamma: float) -> Tensor:
    """Eq. 3: 1 - (|u|_0 / K)^2 where the prediction is right, -gamma where it is wrong.

    Args:
        correct: [B] bool.
        actions: [B, K], 1 or True where a block runs.
        gamma: penalty of a wrong prediction; the larger, the more blocks are worth keeping.

    Returns:
        [B] float32.
    """
    kept_share = actions.float().mean(dim=1)
    return torch.where(correct, 1 - kept_share.square(), torch.full_like(kept_share, -gamma))


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
    its gradient stay finite when a decision saturates. The authors' code has only the first term,
    which is largest at p = 1/e and so is no bonus for exploring but a pull towards dropping.
    """
    keep_prob = torch.sigmoid(logits)
    each = keep_prob * F.softplus(-logits) + (1 - keep_prob) * F.softplus(logits)
    return (each if learnt is None else each * learnt).sum(dim=1)


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-A log pi(u | x), the mean over the batch: [B] twice to a scalar.

    Its gradient is minus the REINFORCE estimate of the gradient of the expected reward (Eq. 5).
    The authors' finetuning sums this over the batch but averages the cross-entropy beside it. Here all
    terms are means over the batch, so that the entropy's weight means the same at every batch size.
    (Policy loss and cross-entropy reach different networks, so under Adam the scale of either is moot.)
    """
    return -(advantages.detach() * log_probs).mean()
