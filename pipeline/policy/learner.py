"""Learning a policy, with a frozen ResNet (the curriculum) or a learning one (joint finetuning).

Shapes: B images of a batch, K blocks, N classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.data.split import ImageSplit
from pipeline.data.transforms import Normalisation
from pipeline.device import autocast
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Networks
from pipeline.inference.predict import predict, predict_policy
from pipeline.models.policies import greedy_actions, policy_statistics
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.policy import objectives as pg
from pipeline.policy.curriculum import active_mask, keep_inactive, num_active_blocks
from pipeline.training.distillation import Distillation
from pipeline.training.loop import Batch, Metrics
from pipeline.training.optim import backward, update


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """How a policy is rewarded and explored, and how the gradient of its reward is estimated.

    Attributes:
        gamma: penalty of a wrong prediction (Eq. 3).
        alpha: bound of the exploration, s' = alpha s + (1 - alpha)(1 - s).
        entropy: the bonus for exploration: `binary` (`policy_gradient.entropy`, over learnt blocks) or
            `authors` (`policy_gradient.authors_entropy`, over all).
        entropy_coef: weight of that entropy, summed over blocks, in the loss.
        entropy_epochs: in which the policy is learnt and that weight falls, to 1/epochs of it in the
            last; None: it stays.
        frozen_epochs: in which the policy waits, and the ResNet learns under actions sampled from it.
        train_epochs: for which the policy is learnt then; after them it is fixed, and the ResNet learns
            under it as it is deployed. None: it is learnt to the end.
        marginal_entropy_coef: weight of the entropy of a batch's mean policy (`policy_gradient.sameness`).
        epochs_per_block: pace of the curriculum; None: every decision is learnt from the start.
        estimator: `self_critical` (the paper), `local_expectation` (frozen ResNet only),
            `straight_through` or `reinmax` (learning ResNet only); see `PolicyLearning`.
        num_flips: blocks of an image whose other action is tried in a step, for `local_expectation`.
        soft_reward: reward by the probability of the label, not by right or wrong.
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


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """What the policy says of a batch, each [B, K].

    Attributes:
        logits: of the keep probabilities s.
        sampling_prob: s', from which actions are drawn.
        sampled: u ~ Bernoulli(s'), bool; what is not learnt yet is kept.
        greedy: the policy as it is deployed, bool.
    """

    logits: Tensor
    sampling_prob: Tensor
    sampled: Tensor
    greedy: Tensor


Estimate = Callable[[Batch, PolicyOutput], tuple[Tensor, dict[str, Tensor]]]


class PolicyLearner:
    """Learning a policy with a frozen ResNet (the curriculum) or a learning one (joint finetuning).

    Actions are sampled, u ~ Bernoulli(s'). The gradient of the expected reward is estimated

    - `self_critical`: by REINFORCE with the greedy policy u~ as the baseline, advantage R(u) - R(u~)
      (Eq. 5). Any ResNet, two passes.
    - `local_expectation`: by R(u with u_k = 1) - R(u with u_k = 0) for `num_flips` learnt blocks k of each
      image, drawn anew in every step: without bias, and the other blocks' luck is the same in both
      terms (local expectation gradients: Titsias and Lazaro-Gredilla 2015). 1 + num_flips passes, asked for
      at once, so that the executor may run the blocks before a flip once.
    - `straight_through`: by the slope of the loss in each block's share, from the one pass that
      trains the ResNet anyway (`policy_gradient.reward_slopes`): no further pass at all, first order.
    - `reinmax`: by the mean of the slopes where the block runs and where it does not, for which dropped
      blocks are run forward too, with running statistics and without being learnt from: second order.

    Frozen, the ResNet stays in evaluation mode: no weight and no batch-norm statistic moves. In
    finetuning the sampled pass trains it, and a block's batch statistics are those of the images that
    run it. The greedy pass always runs in evaluation mode and moves nothing. (In the authors' finetuning
    it runs in training mode and moves the statistics, as do images that drop the block.)

    So in finetuning R(u) is the reward of the network with batch statistics, R(u~) that of the network
    as it is deployed. A baseline may be anything that does not depend on the sampled actions, so what is
    estimated is the former's gradient, but for one term: where u = u~ the advantage is 0 by definition,
    and is set so, not left to the difference between the two kinds of statistics.

    Unlike in the paper, the policy may be fixed after `train_epochs`: as long as actions are sampled,
    the ResNet learns on paths other than those that it will be run on. And it may be held for the first
    `frozen_epochs`: a ResNet that was never run without a block loses much by every drop, so a policy that
    learns beside it from the start may first learn to keep more than it began with.

    Args:
        distillation: the ResNet's loss; None: the ResNet is frozen.

    Raises:
        ValueError: the estimator does not fit a frozen or learning ResNet.
    """

    def __init__(
        self,
        resnet: ResNet,
        policy_net: PolicyNet,
        *,
        optimizer: torch.optim.Optimizer,
        rules: PolicyObjective,
        normalisation: Normalisation,
        precision: str,
        distillation: Distillation | None,
    ) -> None:
        estimators: dict[str, Estimate] = {"self_critical": self._self_critical}
        if distillation:
            estimators |= {
                "straight_through": partial(self._by_slopes, both_ends=False),
                "reinmax": partial(self._by_slopes, both_ends=True),
            }
        else:
            estimators["local_expectation"] = self._local_expectation
        if rules.estimator not in estimators:
            state = "learns" if distillation else "is frozen"
            raise ValueError(
                f"no estimator {rules.estimator} where the ResNet {state}: {', '.join(estimators)}"
            )
        if (rules.train_epochs is not None or rules.frozen_epochs) and not distillation:
            raise ValueError("with a held or fixed policy and a frozen ResNet nothing would learn")
        self.modules: dict[str, nn.Module] = {"policy_net": policy_net}
        if distillation:
            self.modules["resnet"] = resnet
        self.resnet = resnet
        self.policy_net = policy_net
        self.optimizer = optimizer
        self.rules = rules
        self.normalisation = normalisation
        self.precision = precision
        self.distillation = distillation
        self._estimate = estimators[rules.estimator]
        # a second column for each block says which are tried the other way
        self.noise_columns = resnet.num_blocks * (2 if rules.estimator == "local_expectation" else 1)
        device = next(policy_net.parameters()).device
        self.entropy_coef = rules.entropy_coef
        self.held = self.fixed = False
        self.learnt_count = resnet.num_blocks
        self.learnt = torch.ones(resnet.num_blocks, dtype=torch.bool, device=device)
        self.block_shares = (
            None if rules.block_shares is None else torch.tensor(rules.block_shares, device=device)
        )
        # frozen weights are packed once, and dropped blocks cost no time
        networks = Networks(resnet=resnet, policy_net=None, normalisation=normalisation)
        self.frozen = None if distillation else make_executor(networks, precision=precision)

    def begin_epoch(self, epoch: int) -> None:
        """Set whether the policy is learnt, which blocks' decisions are, and what the entropy weighs."""
        rules = self.rules
        self.held = epoch < rules.frozen_epochs
        learning = epoch - rules.frozen_epochs  # epochs in which the policy has learnt
        over = rules.entropy_epochs
        left = 1.0 if over is None or self.held else max(0.0, 1 - learning / over)
        self.entropy_coef = rules.entropy_coef * left
        self.fixed = rules.train_epochs is not None and learning >= rules.train_epochs
        num_blocks = self.resnet.num_blocks
        pace = self.rules.epochs_per_block
        self.learnt_count = (
            num_blocks
            if pace is None
            else num_active_blocks(epoch, num_blocks=num_blocks, epochs_per_block=pace)
        )
        device = next(self.policy_net.parameters()).device
        self.learnt = active_mask(self.learnt_count, num_blocks, device)

    def _decide(self, batch: Batch) -> PolicyOutput:
        with autocast(batch.images.device, self.precision):
            logits = self.policy_net(batch.images)
        logits = logits.float()
        keep_prob = torch.sigmoid(logits)
        sampling_prob = pg.bounded_sampling_prob(keep_prob, self.rules.alpha)
        noise = batch.noise[:, : self.resnet.num_blocks]
        return PolicyOutput(
            logits=logits,
            sampling_prob=sampling_prob,
            sampled=keep_inactive(noise < sampling_prob, self.learnt),
            greedy=keep_inactive(greedy_actions(keep_prob), self.learnt),
        )

    def _reward(self, right: Tensor, actions: Tensor) -> Tensor:
        return pg.reward(right, actions, self.rules.gamma, self.block_shares)

    def _right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is rewarded of predictions [B, N]: the label's probability, or right or wrong; [B]."""
        if self.rules.soft_reward:
            return torch.softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
        return logits.argmax(dim=1) == labels

    def _classify(self, batch: Batch, actions: Tensor, *, learn: bool) -> Tensor:
        """Class logits [B, N] of the ResNet that learns, under the actions."""
        self.resnet.train(learn)
        with torch.set_grad_enabled(learn), autocast(batch.images.device, self.precision):
            return self.resnet(batch.images, actions).float()

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step on the mean over the batch of policy gradient, entropy and classification loss."""
        self.optimizer.zero_grad()
        if self.held or self.fixed:
            return self._step_of_the_resnet(batch)
        self.policy_net.train()
        decisions = self._decide(batch)
        policy_loss, metrics = self._estimate(batch, decisions)
        entropy = pg.entropy(decisions.logits, self.learnt).mean()
        bonus = entropy
        if self.rules.entropy == "authors":
            bonus = pg.authors_entropy(decisions.sampling_prob).mean()
        loss = policy_loss - self.entropy_coef * bonus
        if self.rules.marginal_entropy_coef:
            keep_prob = torch.sigmoid(decisions.logits)
            mean = distributed.all_reduce_mean(keep_prob, batch.share)
            loss = loss + self.rules.marginal_entropy_coef * pg.marginal_entropy_loss(
                keep_prob, mean, self.learnt
            )
        backward(loss, batch)
        update(self.optimizer)
        return {
            **metrics,
            "entropy": entropy.detach() / self.learnt_count,  # per learnt block, at most ln 2
            "policy_loss": policy_loss.detach(),
        }

    def _step_of_the_resnet(self, batch: Batch) -> dict[str, Tensor]:
        """The ResNet learns under a policy whose optimiser passes it by.

        Fixed, it decides as it is deployed. Held, its actions are sampled as when it learns, by the
        batch's statistics.
        """
        self.policy_net.train(self.held)
        with torch.no_grad():
            decisions = self._decide(batch)
        actions = decisions.sampled if self.held else decisions.greedy
        logits = self._classify(batch, actions, learn=True)
        losses = self._learn(logits, batch)
        update(self.optimizer)
        # the reward that the estimator shows, so that its curve has no step
        critical = self.rules.estimator == "self_critical"
        right = self._right(logits.detach(), batch.labels) if critical else torch.exp(-losses)
        reward = self._reward(right, actions)
        metrics = self._metrics(batch, logits.detach(), reward, actions)
        metrics["cross_entropy"] = losses.mean()
        if critical:  # held, of the sampled actions too: no other pass is run
            metrics["greedy_reward"] = reward.mean()
        entropy = pg.entropy(decisions.logits, self.learnt).mean()
        return {
            **metrics,
            "entropy": entropy / self.learnt_count,
            "policy_loss": torch.zeros_like(entropy),
        }

    def _self_critical(self, batch: Batch, decisions: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        sampled, greedy = decisions.sampled, decisions.greedy
        if self.frozen is not None:
            both = self.frozen.classify(batch.images, torch.stack([greedy, sampled]))
            greedy_logits, logits = both.unbind()
        else:
            greedy_logits = self._classify(batch, greedy, learn=False)
            logits = self._classify(batch, sampled, learn=True)
        sampled_reward = self._reward(self._right(logits.detach(), batch.labels), sampled)
        greedy_reward = self._reward(self._right(greedy_logits, batch.labels), greedy)
        same = (sampled == greedy).all(dim=1)
        advantages = (sampled_reward - greedy_reward).masked_fill(same, 0.0)
        log_probs = pg.log_prob(sampled, decisions.sampling_prob, self.learnt)
        metrics = self._metrics(batch, greedy_logits, sampled_reward, greedy)
        metrics["greedy_reward"] = greedy_reward.mean()
        if self.distillation is not None:
            metrics["cross_entropy"] = self._learn(logits, batch).mean()
        return pg.policy_gradient_loss(log_probs, advantages), metrics

    def _local_expectation(
        self, batch: Batch, decisions: PolicyOutput
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sampled = decisions.sampled
        num_flips = min(self.rules.num_flips, self.learnt_count)
        lots = batch.noise[:, self.resnet.num_blocks :].masked_fill(~self.learnt, -1.0)
        chosen = lots.topk(num_flips, dim=1).indices  # [B, num_flips], without repetition
        was_kept = sampled.gather(1, chosen)
        tried = sampled.repeat(1 + num_flips, 1, 1)  # [1 + num_flips, B, K], the first as sampled
        tried[1:].scatter_(2, chosen.t()[:, :, None], ~was_kept.t()[:, :, None])
        assert self.frozen is not None
        passes = self.frozen.classify(batch.images, tried)
        rewards = torch.stack(
            [
                self._reward(self._right(logits, batch.labels), actions)
                for logits, actions in zip(passes, tried, strict=True)
            ]
        )
        gains = (rewards[1:] - rewards[0]).t() * torch.where(was_kept, -1.0, 1.0)
        slopes = torch.zeros_like(decisions.sampling_prob)
        slopes.scatter_(1, chosen, gains * (self.learnt_count / num_flips))  # each is chosen as often
        metrics = self._metrics(batch, passes[0], rewards[0], sampled)
        return pg.expectation_loss(slopes, decisions.sampling_prob), metrics

    def _by_slopes(
        self, batch: Batch, decisions: PolicyOutput, *, both_ends: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sampled = decisions.sampled
        gates = torch.ones_like(decisions.sampling_prob, requires_grad=True)
        self.resnet.train()
        with autocast(batch.images.device, self.precision):
            logits = self.resnet(batch.images, sampled, gates, try_dropped=both_ends)
        logits = logits.float()
        losses = self._learn(logits, batch)
        # no gradient at all where no block ran, here or of this process's images
        loss_slopes = torch.zeros_like(gates) if gates.grad is None else gates.grad
        # Where the paper's reward asks right or wrong: the probability of the label, or with a teacher
        # exp(-KL), which is 1 where the softened targets are met. The ResNet learns from the same loss,
        # so that its backward pass serves both.
        likelihood = torch.exp(-losses)
        slopes = pg.reward_gradient(
            likelihood,
            loss_slopes * (len(losses) / (batch.share or 1.0)),  # of each image's loss, not of its part
            sampled,
            decisions.sampling_prob.detach(),
            self.rules.gamma,
            self.block_shares,
            both_ends=both_ends,
        )
        rewards = self._reward(likelihood, sampled)
        metrics = self._metrics(batch, logits.detach(), rewards, sampled)
        metrics["cross_entropy"] = losses.mean()
        return pg.expectation_loss(slopes, decisions.sampling_prob), metrics

    def _learn(self, logits: Tensor, batch: Batch) -> Tensor:
        """Leave the ResNet's gradients of the loss, the mean over the batch; each image's loss, [B].

        Beside the policy's, with weight 1, as in the authors' finetuning. With a teacher what is logged
        as cross_entropy lacks the targets' own entropy (`Distillation`).
        """
        assert self.distillation is not None
        losses = self.distillation(logits, batch)
        backward(losses.mean(), batch)
        return losses.detach()

    def _metrics(
        self, batch: Batch, logits: Tensor, rewards: Tensor, actions: Tensor
    ) -> dict[str, Tensor]:
        """Mean reward of the sampled actions; accuracy and blocks of the greedy, where they were run."""
        return {
            "reward": rewards.mean(),
            "accuracy": (logits.argmax(dim=1) == batch.labels).float().mean(),
            "blocks": actions.float().sum(dim=1).mean(),
        }

    def validate(self, split: ImageSplit) -> Metrics:
        """The greedy policy: accuracy, reward, and how much it differs from image to image."""
        logits = predict_policy(
            self.policy_net, split, normalisation=self.normalisation, precision=self.precision
        )
        learnt = self.learnt.cpu()  # where `predict_policy` leaves the logits
        actions = keep_inactive(greedy_actions(torch.sigmoid(logits)), learnt)
        found = predict(
            self.resnet, split, actions, normalisation=self.normalisation, precision=self.precision
        )
        shares = None if self.block_shares is None else self.block_shares.cpu()
        rewards = pg.reward(found.correct, actions, self.rules.gamma, shares)
        entropy = pg.entropy(logits, learnt).mean() / learnt.sum()
        return {
            "accuracy": found.accuracy,
            "reward": float(rewards.mean()),
            "entropy": float(entropy),
            "active_blocks": float(learnt.sum()),
            **policy_statistics(actions),
        }
