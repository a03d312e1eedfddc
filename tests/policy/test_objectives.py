"""Reward, losses and the estimator against closed forms and enumerations of all policies."""

import itertools
import math

import pytest
import torch

from pipeline.models.policies import greedy_actions, policy_statistics
from pipeline.policy import objectives

K = 4
ALL_POLICIES = torch.tensor(list(itertools.product([0, 1], repeat=K))).bool()  # [16, K]
GAMMA, ALPHA = 3.0, 0.8


def is_correct(actions: torch.Tensor) -> torch.Tensor:
    """A made-up network: correct when the second block runs with the first or the last."""
    return actions[:, 1] & (actions[:, 0] | actions[:, 3])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.tensor([0.7, -0.4, 0.1, 1.5], dtype=torch.float64, requires_grad=True)


def sampling_prob(logits: torch.Tensor) -> torch.Tensor:
    return objectives.bounded_sampling_prob(torch.sigmoid(logits), ALPHA)


def probability_of(actions: torch.Tensor, prob: torch.Tensor) -> torch.Tensor:
    return torch.where(actions, prob, 1 - prob).prod(dim=1)


def exact_gradient(logits: torch.Tensor) -> torch.Tensor:
    """d/dlogits of the expected reward, by enumeration of all 2^K policies."""
    rewards = objectives.reward(is_correct(ALL_POLICIES), ALL_POLICIES, GAMMA).double()
    expected = (probability_of(ALL_POLICIES, sampling_prob(logits)) * rewards).sum()
    return torch.autograd.grad(expected, logits)[0]


def test_expectation_of_the_estimator_is_the_exact_gradient(logits):
    greedy = greedy_actions(torch.sigmoid(logits)).expand(1, K)
    baseline = float(objectives.reward(is_correct(greedy), greedy, GAMMA))
    weights = probability_of(ALL_POLICIES, sampling_prob(logits).detach())[:, None]
    expected = (weights * estimates(logits, baseline)).sum(dim=0)
    torch.testing.assert_close(expected, exact_gradient(logits))


def estimates(logits: torch.Tensor, baseline: float) -> torch.Tensor:
    """What the estimator gives for each of the 16 policies, [16, K]."""
    prob = sampling_prob(logits)
    gradients = []
    for actions in ALL_POLICIES.split(1):
        advantage = objectives.reward(is_correct(actions), actions, GAMMA) - baseline
        loss = objectives.policy_gradient_loss(
            objectives.log_prob(actions, prob.expand(1, K)), advantage
        )
        gradients.append(-torch.autograd.grad(loss, logits, retain_graph=True)[0])
    return torch.stack(gradients)


def test_the_self_critical_baseline_changes_the_variance_and_not_the_mean(logits):
    greedy = greedy_actions(torch.sigmoid(logits)).expand(1, K)
    baseline = float(objectives.reward(is_correct(greedy), greedy, GAMMA))
    weights = probability_of(ALL_POLICIES, sampling_prob(logits).detach())[:, None]
    without, with_baseline = estimates(logits, 0.0), estimates(logits, baseline)
    mean = (weights * without).sum(dim=0)
    torch.testing.assert_close(mean, (weights * with_baseline).sum(dim=0))
    spread = [(weights * (e - mean) ** 2).sum() for e in (without, with_baseline)]
    assert spread[0] != pytest.approx(float(spread[1]))


def test_following_the_estimates_raises_the_expected_reward(logits):
    rewards = objectives.reward(is_correct(ALL_POLICIES), ALL_POLICIES, GAMMA).double()

    def expected(at: torch.Tensor) -> float:
        return float((probability_of(ALL_POLICIES, sampling_prob(at.detach())) * rewards).sum())

    weights = probability_of(ALL_POLICIES, sampling_prob(logits).detach())[:, None]
    direction = (weights * estimates(logits, 0.3)).sum(dim=0)
    assert expected(logits + 0.1 * direction) > expected(logits)


def test_loss_is_the_mean_over_the_batch_and_advantages_take_no_gradient():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([3.0, -1.0], requires_grad=True)
    loss = objectives.policy_gradient_loss(log_probs, advantages)
    assert loss.item() == pytest.approx((3.0 - 2.0) / 2)
    loss.backward()
    assert log_probs.grad.tolist() == [-1.5, 0.5]
    assert advantages.grad is None


@pytest.mark.parametrize(
    ("correct", "num_kept", "expected"),
    [
        (True, 0, 1.0),
        (True, K, 0.0),
        (True, 2, 1 - 0.25),
        (True, 1, 1 - 1 / 16),
        (False, 0, -GAMMA),
        (False, K, -GAMMA),
    ],
)
def test_reward_at_its_corners(correct, num_kept, expected):
    actions = torch.arange(K)[None] < num_kept
    assert objectives.reward(torch.tensor([correct]), actions, GAMMA).item() == pytest.approx(expected)


def test_reward_without_penalty_is_zero_for_a_wrong_prediction():
    assert objectives.reward(torch.tensor([False]), torch.ones(1, K), 0.0).item() == 0


@pytest.mark.parametrize("alpha", [0.6, 0.8, 0.95, 1.0])
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


def test_entropy_and_its_gradient_are_finite_for_saturated_decisions():
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


def test_the_authors_entropy_has_one_term_of_the_bounded_probabilities_over_all_blocks(logits):
    """Their code's numbers in double precision: sum of -p log p over blocks, whatever is learnt."""
    prob = sampling_prob(logits)
    by_hand = sum(-p * math.log(p) for p in prob.tolist())
    assert objectives.authors_entropy(prob[None]).item() == pytest.approx(by_hand)
    (slopes,) = torch.autograd.grad(objectives.authors_entropy(prob[None]).sum(), logits)
    keep_prob = torch.sigmoid(logits)
    expected = -(prob.log() + 1) * (2 * ALPHA - 1) * keep_prob * (1 - keep_prob)
    torch.testing.assert_close(slopes, expected)


def test_the_authors_entropy_is_largest_where_a_block_would_be_dropped():
    keep_prob = torch.linspace(0, 1, 1001)[:, None]
    best = keep_prob[
        objectives.authors_entropy(objectives.bounded_sampling_prob(keep_prob, ALPHA)).argmax()
    ].item()
    assert best == pytest.approx((1 / math.e - (1 - ALPHA)) / (2 * ALPHA - 1), abs=1e-3)
    assert best < 0.5


def test_the_authors_entropy_stays_finite_at_both_ends():
    prob = torch.tensor([[0.0, 1.0]], requires_grad=True)
    objectives.authors_entropy(prob).sum().backward()
    assert torch.isfinite(prob.grad).all()
