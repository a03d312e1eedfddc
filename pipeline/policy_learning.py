"""Learning a policy, with a frozen ResNet (the curriculum) or a learning one (joint finetuning).

Shapes: B images of a batch, K blocks, N classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import policy_gradient as pg
from pipeline.curriculum import learnt_count, learnt_mask, restrict
from pipeline.executors.base import Networks
from pipeline.inference import make_executor, predict, predict_policy
from pipeline.policies import greedy_actions, policy_statistics
from pipeline.policy_net import PolicyNet
from pipeline.resnet import ResNet
from pipeline.runtime import autocast
from pipeline.tensors import Images, Normalisation
from pipeline.training import Batch, Metrics


@dataclass(frozen=True, kw_only=True)
class PolicyRules:
    """How a policy is rewarded and explored.

    Attributes:
        gamma: penalty of a wrong prediction (Eq. 3).
        alpha: bound of the exploration, s' = alpha s + (1 - alpha)(1 - s).
        entropy_weight: weight of the policy's entropy, summed over blocks, in the loss.
        epochs_per_block: pace of the curriculum; None: every decision is learnt from the start.
    """

    gamma: float
    alpha: float
    entropy_weight: float
    epochs_per_block: float | None = None


class PolicyLearning:
    """Policy gradient with a self-critical baseline, with a frozen ResNet or a learning one.

    The one step for the curriculum (`finetune_resnet` False) and the joint finetuning (True):
    sampled actions u ~ Bernoulli(s'), the greedy policy u~ as the baseline, advantage R(u) - R(u~).

    Frozen, the ResNet stays in evaluation mode: no weight and no batch-norm statistic moves, unlike in
    the authors' code. In finetuning the sampled pass trains it, and a block's batch statistics are those
    of the images that run it; the greedy pass always runs in evaluation mode and moves nothing.

    So in finetuning R(u) is the reward of the network with batch statistics, R(u~) that of the network
    as it is deployed. A baseline may be anything that does not depend on the sampled actions, so what is
    estimated is the former's gradient, but for one term: where u = u~ the advantage is 0 by definition,
    and is set so, not left to the difference between the two kinds of statistics.
    """

    def __init__(
        self,
        resnet: ResNet,
        policy_net: PolicyNet,
        *,
        optimizer: torch.optim.Optimizer,
        rules: PolicyRules,
        normalisation: Normalisation,
        precision: str,
        finetune_resnet: bool,
    ) -> None:
        self.modules: dict[str, nn.Module] = {"policy_net": policy_net}
        if finetune_resnet:
            self.modules["resnet"] = resnet
        self.resnet = resnet
        self.policy_net = policy_net
        self.optimizer = optimizer
        self.rules = rules
        self.normalisation = normalisation
        self.precision = precision
        self.finetune_resnet = finetune_resnet
        self.num_actions = resnet.num_blocks
        self.learnt = torch.ones(resnet.num_blocks, dtype=torch.bool)
        # frozen weights are packed once, and dropped blocks cost no time
        networks = Networks(resnet=resnet, policy_net=None, normalisation=normalisation)
        self.frozen = None if finetune_resnet else make_executor(networks, precision=precision)

    def begin_epoch(self, epoch: int) -> None:
        """Let the curriculum decide which blocks' decisions are learnt."""
        num_blocks = self.num_actions
        pace = self.rules.epochs_per_block
        count = (
            num_blocks
            if pace is None
            else learnt_count(epoch, num_blocks=num_blocks, epochs_per_block=pace)
        )
        device = next(self.policy_net.parameters()).device
        self.learnt = learnt_mask(count, num_blocks, device)

    def _policy(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, sampling probabilities s', sampled actions and greedy actions, each [B, K]."""
        with autocast(batch.images.device, self.precision):
            logits = self.policy_net(batch.images)
        logits = logits.float()
        keep_prob = torch.sigmoid(logits)
        sampling_prob = pg.bounded(keep_prob, self.rules.alpha)
        assert batch.noise is not None  # `fit` draws it for every learner with actions
        sampled = restrict(batch.noise < sampling_prob, self.learnt)
        greedy = restrict(greedy_actions(keep_prob), self.learnt)
        return logits, sampling_prob, sampled, greedy

    def _classify(self, batch: Batch, actions: Tensor, *, learn: bool) -> tuple[Tensor, Tensor]:
        """Class logits [B, N] under the actions, and whether the prediction is right, [B]."""
        if self.frozen is not None:
            logits = self.frozen.classify(batch.images, actions)
            return logits, logits.argmax(dim=1) == batch.labels
        self.resnet.train(learn)
        with torch.set_grad_enabled(learn), autocast(batch.images.device, self.precision):
            logits = self.resnet(batch.images, actions)
        return logits.float(), logits.argmax(dim=1) == batch.labels

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step on the mean over the batch of policy gradient, entropy and cross-entropy."""
        rules = self.rules
        self.policy_net.train()
        logits, sampling_prob, sampled, greedy = self._policy(batch)
        _, greedy_correct = self._classify(batch, greedy, learn=False)
        class_logits, sampled_correct = self._classify(batch, sampled, learn=self.finetune_resnet)
        sampled_reward = pg.reward(sampled_correct, sampled, rules.gamma)
        greedy_reward = pg.reward(greedy_correct, greedy, rules.gamma)
        same = (sampled == greedy).all(dim=1)
        advantages = (sampled_reward - greedy_reward).masked_fill(same, 0.0)
        log_probs = pg.log_prob(sampled, sampling_prob, self.learnt)
        policy_loss = pg.policy_gradient_loss(log_probs, advantages)
        entropy = pg.entropy(logits, self.learnt).mean()
        loss = policy_loss - rules.entropy_weight * entropy
        metrics = {
            "reward": sampled_reward.mean(),
            "greedy_reward": greedy_reward.mean(),
            "accuracy": greedy_correct.float().mean(),
            "blocks": greedy.float().sum(dim=1).mean(),
            "entropy": entropy.detach() / self.learnt.sum(),  # per learnt block, at most ln 2
            "policy_loss": policy_loss.detach(),
        }
        if self.finetune_resnet:
            cross_entropy = F.cross_entropy(class_logits, batch.labels)
            loss = loss + cross_entropy
            metrics["cross_entropy"] = cross_entropy.detach()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return metrics

    def validate(self, split: Images) -> Metrics:
        """The greedy policy: accuracy, reward, and how much it differs from image to image."""
        logits = predict_policy(
            self.policy_net, split, normalisation=self.normalisation, precision=self.precision
        )
        learnt = self.learnt.cpu()  # where `predict_policy` leaves the logits
        actions = restrict(greedy_actions(torch.sigmoid(logits)), learnt)
        found = predict(
            self.resnet, split, actions, normalisation=self.normalisation, precision=self.precision
        )
        rewards = pg.reward(found.correct, actions, self.rules.gamma)
        entropy = pg.entropy(logits, learnt).mean() / learnt.sum()
        return {
            "accuracy": found.accuracy,
            "reward": float(rewards.mean()),
            "entropy": float(entropy),
            "learnt_blocks": float(learnt.sum()),
            **policy_statistics(actions),
        }
