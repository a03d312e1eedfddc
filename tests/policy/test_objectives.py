"""Reward, entropies and losses against closed forms."""

import math

import pytest
import torch

from pipeline.models.policies import greedy_actions, policy_statistics
from pipeline.policy import objectives

K = 4
ALPHA = 0.8


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.tensor([0.7, -0.4, 0.1, 1.5], dtype=torch.float64, requires_grad=True)


def sampling_prob(logits: torch.Tensor) -> torch.Tensor:
    return objectives.bounded_sampling_prob(torch.sigmoid(logits), ALPHA)


def test_policy_gradient_loss_is_a_mean_over_the_batch():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([3.0, -1.0], requires_grad=True)
    loss = objectives.policy_gradient_loss(log_probs, advantages)
    assert loss.item() == pytest.approx((3.0 - 2.0) / 2)
    loss.backward()
    assert log_probs.grad.tolist() == [-1.5, 0.5]
    assert advantages.grad is None


@pytest.mark.parametrize(
    ("correct", "num_kept", "gamma", "expected"),
    [(True, 0, 3.0, 1.0), (True, K, 3.0, 0.0), (True, 1, 3.0, 1 - 1 / 16), (False, 1, 3.0, -3.0),
     (False, K, 0.0, 0.0)],
)  # fmt: skip
def test_reward_at_its_corners(correct, num_kept, gamma, expected):
    actions = torch.arange(K)[None] < num_kept
    assert objectives.reward(torch.tensor([correct]), actions, gamma).item() == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_exploration_is_bounded_on_both_sides(alpha):
    ends = objectives.bounded_sampling_prob(torch.tensor([0.0, 0.5, 1.0]), alpha)
    torch.testing.assert_close(ends, torch.tensor([1 - alpha, 0.5, alpha]))


def test_log_prob_is_that_of_independent_bernoullis():
    prob = torch.tensor([[0.2, 0.5, 0.7, 0.8], [0.3, 0.3, 0.6, 0.2]])
    actions = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]])
    expected = torch.distributions.Bernoulli(prob).log_prob(actions.float()).sum(dim=1)
    torch.testing.assert_close(objectives.log_prob(actions, prob), expected)
    active = torch.tensor([False, False, True, True])
    expected = torch.distributions.Bernoulli(prob[:, 2:]).log_prob(actions[:, 2:].float()).sum(dim=1)
    torch.testing.assert_close(objectives.log_prob(actions, prob, active), expected)


def test_entropy_is_the_closed_form_and_is_largest_at_one_half():
    logits = torch.tensor([[-2.0, 0.0, 0.3, 4.0]])
    expected = torch.distributions.Bernoulli(logits=logits).entropy().sum(dim=1)
    torch.testing.assert_close(objectives.entropy(logits), expected)
    assert objectives.entropy(torch.zeros(1, K)).item() == pytest.approx(K * math.log(2))
    at_half = torch.zeros(1, K, requires_grad=True)
    objectives.entropy(at_half).sum().backward()
    torch.testing.assert_close(at_half.grad, torch.zeros(1, K))


def test_entropy_and_its_gradient_stay_finite():
    logits = torch.tensor([[-200.0, 200.0, 90.0, -90.0]], requires_grad=True)
    entropy = objectives.entropy(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(logits.grad).all()


def test_greedy_keeps_a_block_from_one_half_on():
    assert greedy_actions(torch.tensor([[0.49, 0.5, 0.51]])).tolist() == [[False, True, True]]


def test_policy_statistics_count_policies_and_their_diversity():
    actions = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 1]]).bool()
    statistics = policy_statistics(actions)
    assert statistics["unique_policies"] == 3
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert statistics["effective_policies"] == pytest.approx(math.exp(entropy))
    assert statistics["blocks_mean"] == 1.25
    assert statistics["blocks_std"] == pytest.approx(math.sqrt(0.1875))
    assert policy_statistics(actions[:2])["effective_policies"] == 1


def test_authors_entropy_is_that_of_their_code(logits):
    """Their code's numbers in double precision: sum of -p log p over blocks, whatever is learnt."""
    prob = sampling_prob(logits)
    by_hand = sum(-p * math.log(p) for p in prob.tolist())
    assert objectives.authors_entropy(prob[None]).item() == pytest.approx(by_hand)
    (slopes,) = torch.autograd.grad(objectives.authors_entropy(prob[None]).sum(), logits)
    keep_prob = torch.sigmoid(logits)
    expected = -(prob.log() + 1) * (2 * ALPHA - 1) * keep_prob * (1 - keep_prob)
    torch.testing.assert_close(slopes, expected)


def test_the_authors_entropy_stays_finite_at_both_ends():
    prob = torch.tensor([[0.0, 1.0]], requires_grad=True)
    objectives.authors_entropy(prob).sum().backward()
    assert torch.isfinite(prob.grad).all()
