"""The training loop and what it can train: a classifier, a policy, or both jointly. No I/O here.

Everything random in an epoch is drawn when the epoch starts, as one table with a row for each image,
from (seed, stage, epoch) alone. So what happens to an image depends neither on the batch it is in nor
on the device, and a run that is resumed at an epoch goes on exactly as it would have.

Shapes: B images of a batch, M images of a split, K blocks, N classes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import policy_gradient as pg
from pipeline.curriculum import learnt_count, learnt_mask, restrict
from pipeline.evaluation import Predictions, policy_statistics, predict, predict_policy
from pipeline.policy_net import PolicyNet
from pipeline.resnet import ResNet
from pipeline.runtime import autocast, generator
from pipeline.tensors import Augmentation, Normalisation, Split, batches

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step sees.

    Attributes:
        images: [B, 3, H, W] float32, augmented and normalised.
        labels: [B] int64.
        noise: [B, K] uniform in [0, 1), against which actions are drawn; None where none are.
    """

    images: Tensor
    labels: Tensor
    noise: Tensor | None


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """An epoch's number (from 0), its means over the training images, and its validation."""

    epoch: int
    train: Metrics
    validation: Metrics


class Learner(Protocol):
    """Something that learns from batches."""

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    num_actions: int

    def begin_epoch(self, epoch: int) -> None:
        """Set what changes from epoch to epoch."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step; the batch means of its metrics, as scalars on the device."""

    def validate(self, split: Split) -> Metrics:
        """Metrics on images that are not trained on."""


def fit(
    learner: Learner,
    *,
    train: Split,
    validation: Split,
    epochs: int,
    batch_size: int,
    schedule: Callable[[float], float],
    augmentation: Augmentation,
    normalisation: Normalisation,
    key: tuple[int | str, ...],
    start_epoch: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[EpochResult]:
    """Train epoch by epoch, yielding after each, so that the caller can log, save or stop.

    Args:
        schedule: factor of the learning rates at a share of the training done, [0, 1) to [0, 1].
        key: (seed, stage), from which every random table is drawn.
        start_epoch: the first epoch to run; earlier ones are taken as done.
        on_step: called with (steps done, steps in all) of the epoch, for a progress bar.
    """
    base_rates = [group["initial_lr"] for group in learner.optimizer.param_groups]
    device = train.images.device
    for epoch in range(start_epoch, epochs):
        draw = generator(*key, epoch)
        order = torch.randperm(len(train), generator=draw)
        crops = augmentation.draw(len(train), draw).to(device)
        noise = torch.rand(len(train), learner.num_actions, generator=draw).to(device)
        learner.begin_epoch(epoch)
        totals: dict[str, Tensor] = {}
        parts = batches(order.to(device), batch_size)
        for step, rows in enumerate(parts):
            factor = schedule((epoch + step / len(parts)) / epochs)
            for group, rate in zip(learner.optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            images = normalisation(augmentation(train.images[rows], crops[rows]))
            metrics = learner.step(
                Batch(images=images, labels=train.labels[rows], noise=noise[rows])
            )
            for name, value in metrics.items():  # summed on the device: no wait for it in a step
                totals[name] = totals.get(name, torch.zeros((), device=device)) + value * len(rows)
            on_step(step + 1, len(parts))
        means = {name: float(total) / len(train) for name, total in totals.items()}
        yield EpochResult(epoch=epoch, train=means, validation=learner.validate(validation))


def constant(progress: float) -> float:
    """The same learning rate throughout."""
    return 1.0


def cosine(progress: float, *, warmup: float = 0.0) -> float:
    """Linear warm-up over the first share `warmup`, then half a cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def step_down(progress: float, *, at: float, factor: float = 0.1) -> float:
    """The authors' finetuning: times 0.1 from a share `at` of the training on."""
    return factor if progress >= at else 1.0


def make_optimizer(
    name: str, groups: list[dict[str, object]], *, weight_decay: float
) -> torch.optim.Optimizer:
    """`adam` (decoupled weight decay) or `sgd` (Nesterov momentum 0.9) over parameter groups.

    Each group's `lr` is kept as `initial_lr`, which schedules multiply.
    """
    for group in groups:
        group["initial_lr"] = group["lr"]
    if name == "sgd":
        return torch.optim.SGD(
            groups, lr=0.0, momentum=0.9, nesterov=True, weight_decay=weight_decay
        )
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay)


class Classification:
    """Cross-entropy training of a ResNet that runs every block (pretraining)."""

    num_actions = 0

    def __init__(
        self,
        resnet: ResNet,
        *,
        optimizer: torch.optim.Optimizer,
        normalisation: Normalisation,
        precision: str,
        label_smoothing: float = 0.0,
    ) -> None:
        self.modules: dict[str, nn.Module] = {"resnet": resnet}
        self.resnet = resnet
        self.optimizer = optimizer
        self.normalisation = normalisation
        self.precision = precision
        self.label_smoothing = label_smoothing

    def begin_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step on the mean cross-entropy of the batch."""
        self.resnet.train()
        with autocast(batch.images.device, self.precision):
            logits = self.resnet(batch.images)
        logits = logits.float()
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        correct = logits.argmax(dim=1) == batch.labels
        return {"loss": loss.detach(), "accuracy": correct.float().mean()}

    def validate(self, split: Split) -> Metrics:
        """Loss and accuracy with every block."""
        found = predict(
            self.resnet, split, normalisation=self.normalisation, precision=self.precision
        )
        return {"loss": float(found.losses.mean()), "accuracy": found.accuracy}


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
    the authors' code. In finetuning the sampled pass trains it, and each block's batch statistics come
    from the images that run it; the greedy pass always runs in evaluation mode and moves nothing.
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
        sampled = restrict(batch.noise < sampling_prob, self.learnt)
        greedy = restrict(pg.greedy_actions(keep_prob), self.learnt)
        return logits, sampling_prob, sampled, greedy

    def _classify(self, batch: Batch, actions: Tensor, *, learn: bool) -> tuple[Tensor, Tensor]:
        """Class logits [B, N] under the actions, and whether the prediction is right, [B]."""
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
        class_logits, sampled_correct = self._classify(
            batch, sampled, learn=self.finetune_resnet
        )
        sampled_reward = pg.reward(sampled_correct, sampled, rules.gamma)
        greedy_reward = pg.reward(greedy_correct, greedy, rules.gamma)
        log_probs = pg.log_prob(sampled, sampling_prob, self.learnt)
        policy_loss = pg.policy_gradient_loss(log_probs, sampled_reward - greedy_reward)
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

    def validate(self, split: Split) -> Metrics:
        """The greedy policy: accuracy, reward, and how much it differs from image to image."""
        logits = predict_policy(
            self.policy_net, split, normalisation=self.normalisation, precision=self.precision
        )
        actions = restrict(pg.greedy_actions(torch.sigmoid(logits)), self.learnt)
        found: Predictions = predict(
            self.resnet, split, actions, normalisation=self.normalisation, precision=self.precision
        )
        rewards = pg.reward(found.correct, actions, self.rules.gamma)
        entropy = pg.entropy(logits, self.learnt).mean() / self.learnt.sum()
        return {
            "accuracy": found.accuracy,
            "reward": float(rewards.mean()),
            "entropy": float(entropy),
            "learnt_blocks": float(self.learnt.sum()),
            **policy_statistics(actions),
        }
