"""Estimators of the gradient of the expected reward, one class each.

Actions are sampled, u ~ Bernoulli(s'), so the reward R(u) has no gradient in the policy. Each estimator
gives a loss whose gradient in the policy's logits is minus an estimate of that of E[R(u)]:

- `SelfCritical` (frozen or learning ResNet, 2 passes): (R(u) - R(u~)) grad log pi(u), the paper's Eq. 5
- `LocalExpectation` (frozen, 1 + num_flips passes): R(u_k = 1) - R(u_k = 0) for num_flips blocks k
- `StraightThrough` (learning, 1 pass): slope of the loss where a block runs, exact to first order
- `ReinMax` (learning, 1 pass and dropped blocks forward): slopes at both ends, exact to second order

To add one: write a class, enter it in the tables at the end, and name it in config.py.
Shapes: B images of a batch, K blocks, N classes, F flips.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.inference.base import Executor
from pipeline.policy import objectives
from pipeline.policy.objectives import PolicyObjective, Reward
from pipeline.policy.trained_resnet import TrainedResNet
from pipeline.training.loop import Batch

StepMetrics = dict[str, Tensor]  # scalars on the device


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """What the policy makes of a batch.

    Attributes:
        logits: [B, K], of the keep probabilities s.
        sampling_prob: [B, K], s', from which actions are drawn.
        sampled: [B, K] bool, u ~ Bernoulli(s'); a block that is not active is kept.
        greedy: [B, K] bool, u~, the policy as it is deployed.
        active: [K] bool, the blocks that the policy decides; the curriculum keeps the others.
        num_active: how many that are.
    """

    logits: Tensor
    sampling_prob: Tensor
    sampled: Tensor
    greedy: Tensor
    active: Tensor
    num_active: int


class Estimator(Protocol):
    """Estimates the gradient of the expected reward.

    Attributes:
        noise_tables: tables [B, K] of noise that a step draws from; actions come from the first.
    """

    noise_tables: ClassVar[int]

    def __call__(self, batch: Batch, policy: PolicyOutput) -> tuple[Tensor, StepMetrics]:
        """The policy's loss, the mean over the batch, and what is to be logged of the step."""


class JointEstimator(Estimator, Protocol):
    """One beside a ResNet that learns: a call leaves the ResNet's gradients too."""

    def metrics(self, batch: Batch, actions: Tensor, logits: Tensor, losses: Tensor) -> StepMetrics:
        """The same metrics of a step in which the ResNet alone learnt, under these actions.

        They go by the reward that `__call__` shows, so that its curve has no jump.
        """


class SelfCritical:
    """REINFORCE with the greedy policy as the baseline: advantage R(u) - R(u~) (Eq. 5).

    Where the ResNet learns, R(u) is the reward of the network with batch statistics, R(u~) that of the
    network as it is deployed, and the greedy pass moves nothing. (In the authors' finetuning it runs in
    training mode and moves the statistics.) A baseline may be anything that does not depend on the
    sampled actions, so what is estimated is the former's gradient, but for one term: where u = u~ the
    advantage is 0 by definition, and is set so, not left to the difference of the statistics.
    """

    noise_tables: ClassVar[int] = 1

    def __init__(
        self, resnet: Executor | TrainedResNet, objective: PolicyObjective, reward: Reward
    ) -> None:
        self.resnet = resnet
        self.reward = reward

    def __call__(self, batch: Batch, policy: PolicyOutput) -> tuple[Tensor, StepMetrics]:
        sampled, greedy = policy.sampled, policy.greedy
        losses = None
        if isinstance(self.resnet, TrainedResNet):
            # greedy first: the sampled pass moves the batch statistics
            greedy_logits = self.resnet.classify(batch.images, greedy)
            logits, losses = self.resnet.learn(batch, sampled)
        else:
            both = self.resnet.classify(batch.images, torch.stack([greedy, sampled]))  # [2, B, N]
            greedy_logits, logits = both.unbind()

        # Eq. 5: A = R(u) - R(u~)
        rewards = self.reward(self.reward.correct(logits, batch.labels), sampled)  # [B]
        baseline = self.reward(self.reward.correct(greedy_logits, batch.labels), greedy)  # [B]
        same = (sampled == greedy).all(dim=1)
        advantages = (rewards - baseline).masked_fill(same, 0.0)
        log_probs = objectives.log_prob(sampled, policy.sampling_prob, policy.active)  # [B]

        metrics = step_metrics(batch, greedy_logits, rewards, greedy)
        metrics["greedy_reward"] = baseline.mean()
        if losses is not None:
            metrics["cross_entropy"] = losses.mean()
        return objectives.policy_gradient_loss(log_probs, advantages), metrics

    def metrics(self, batch: Batch, actions: Tensor, logits: Tensor, losses: Tensor) -> StepMetrics:
        rewards = self.reward(self.reward.correct(logits, batch.labels), actions)
        metrics = step_metrics(batch, logits, rewards, actions)
        metrics["cross_entropy"] = losses.mean()
        metrics["greedy_reward"] = rewards.mean()  # of sampled actions too: no other pass is run
        return metrics


class LocalExpectation:
    """R(u with u_k = 1) - R(u with u_k = 0) for `num_flips` active blocks k of each image.

    The blocks are drawn anew in every step, so the estimate has no bias, and the other blocks' luck is
    the same in both terms (local expectation gradients: Titsias and Lazaro-Gredilla 2015). All passes
    are asked for at once, so that the executor may run the blocks before a flip once.
    """

    noise_tables: ClassVar[int] = 2  # the second ranks an image's blocks

    def __init__(self, resnet: Executor, objective: PolicyObjective, reward: Reward) -> None:
        self.resnet = resnet
        self.num_flips = objective.num_flips
        self.reward = reward

    def __call__(self, batch: Batch, policy: PolicyOutput) -> tuple[Tensor, StepMetrics]:
        sampled = policy.sampled  # [B, K]
        num_blocks = sampled.shape[1]
        num_flips = min(self.num_flips, policy.num_active)

        # each image's F active blocks with the highest scores: a draw without repetition
        flip_scores = batch.noise[:, num_blocks:].masked_fill(~policy.active, -1.0)  # [B, K]
        flipped = flip_scores.topk(num_flips, dim=1).indices  # [B, F]
        was_kept = sampled.gather(1, flipped)  # [B, F]

        # 1 + F policies an image: as sampled, then with one block each the other way round
        policies = sampled.repeat(1 + num_flips, 1, 1)  # [1 + F, B, K]
        policies[1:].scatter_(2, flipped.t()[:, :, None], ~was_kept.t()[:, :, None])
        logits = self.resnet.classify(batch.images, policies)  # [1 + F, B, N]
        rewards = torch.stack(
            [
                self.reward(self.reward.correct(of_policy, batch.labels), actions)
                for of_policy, actions in zip(logits, policies, strict=True)
            ]
        )  # [1 + F, B]

        # R(u_k = 1) - R(u_k = 0): a flip turned k off where it was kept, on where it was dropped
        gains = (rewards[1:] - rewards[0]).t() * torch.where(was_kept, -1.0, 1.0)  # [B, F]
        gradient = torch.zeros_like(policy.sampling_prob)  # [B, K]
        # a block is among the F with probability F / num_active, for which the factor makes up
        gradient.scatter_(1, flipped, gains * (policy.num_active / num_flips))
        metrics = step_metrics(batch, logits[0], rewards[0], sampled)
        return objectives.expectation_loss(gradient, policy.sampling_prob), metrics


class StraightThrough:
    """The slope of the loss in each block's gate, from the one pass that trains the ResNet anyway.

    It costs no further pass and is exact to first order (a straight-through gradient: Bengio et al.
    2013, arXiv 1308.3432). `objectives.reward_gradient` has the formula.

    Its reward is not the paper's, which asks whether the prediction is correct. Here it is the
    probability of the label; with a teacher it is exp(-KL), which is 1 where the ResNet gives the soft
    targets. The ResNet learns from the same loss, so one backward pass serves both.

    Beside a ResNet that learns, this estimator sees little but what a block costs. Gradient descent
    takes the mean slope in the scale of a residual to 0, however much worse the network would be without
    that block.
    """

    noise_tables: ClassVar[int] = 1
    trapezoidal: ClassVar[bool] = False

    def __init__(self, resnet: TrainedResNet, objective: PolicyObjective, reward: Reward) -> None:
        self.resnet = resnet
        self.gamma = objective.gamma
        self.reward = reward

    def __call__(self, batch: Batch, policy: PolicyOutput) -> tuple[Tensor, StepMetrics]:
        sampled = policy.sampled  # [B, K]
        logits, losses, gate_gradient = self.resnet.learn_with_gates(
            batch, sampled, try_dropped=self.trapezoidal
        )  # [B, N], [B], [B, K]
        gradient = objectives.reward_gradient(
            torch.exp(-losses),
            gate_gradient,
            sampled,
            policy.sampling_prob.detach(),
            self.gamma,
            self.reward.block_shares,
            trapezoidal=self.trapezoidal,
        )  # [B, K]
        loss = objectives.expectation_loss(gradient, policy.sampling_prob)
        return loss, self.metrics(batch, sampled, logits, losses)

    def metrics(self, batch: Batch, actions: Tensor, logits: Tensor, losses: Tensor) -> StepMetrics:
        rewards = self.reward(torch.exp(-losses), actions)  # [B]
        metrics = step_metrics(batch, logits, rewards, actions)
        metrics["cross_entropy"] = losses.mean()
        return metrics


class ReinMax(StraightThrough):
    """The mean of the slopes where a block runs and where it does not: exact to second order.

    That is the trapezoid rule (Liu et al. 2023, "Bridging discrete and backpropagation:
    straight-through and beyond"). For the slope where a block does not run, dropped blocks are run
    forward too. They use running statistics and learn nothing.
    """

    trapezoidal: ClassVar[bool] = True


def step_metrics(batch: Batch, logits: Tensor, rewards: Tensor, actions: Tensor) -> StepMetrics:
    """Means over the batch, of logits [B, N], rewards [B] and actions [B, K]."""
    return {
        "reward": rewards.mean(),
        "accuracy": (logits.argmax(dim=1) == batch.labels).float().mean(),
        "blocks": actions.float().sum(dim=1).mean(),
    }


WITH_FROZEN_RESNET: dict[str, Callable[..., Estimator]] = {
    "self_critical": SelfCritical,
    "local_expectation": LocalExpectation,
}
WITH_LEARNING_RESNET: dict[str, Callable[..., JointEstimator]] = {
    "self_critical": SelfCritical,
    "straight_through": StraightThrough,
    "reinmax": ReinMax,
}
E = TypeVar("E", bound=Estimator)


def frozen_estimator(resnet: Executor, objective: PolicyObjective, reward: Reward) -> Estimator:
    """The estimator that the objective names, for a frozen ResNet; ValueError: it does not fit one."""
    return _named(WITH_FROZEN_RESNET, objective.estimator, "is frozen")(resnet, objective, reward)


def joint_estimator(resnet: TrainedResNet, objective: PolicyObjective, reward: Reward) -> JointEstimator:
    """The estimator that the objective names, for a learning ResNet; ValueError: it does not fit one."""
    return _named(WITH_LEARNING_RESNET, objective.estimator, "learns")(resnet, objective, reward)


def _named(known: dict[str, Callable[..., E]], name: str, state: str) -> Callable[..., E]:
    if name not in known:
        raise ValueError(f"no estimator {name} where the ResNet {state}: {', '.join(known)}")
    return known[name]
