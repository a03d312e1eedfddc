"""The one training loop, and pretraining as the simplest thing that it can train. No I/O here.

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

from pipeline.inference import predict
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
    normalisation: Normalisation
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
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[EpochResult]:
    """Train epoch by epoch, yielding after each, so that the caller can log, save or stop.

    Args:
        schedule: factor of the learning rates at a share of the training done, [0, 1) to [0, 1].
        key: (seed, stage), from which every random table is drawn.
        start_epoch: the first epoch to run; earlier ones are taken as done.
        on_step: called after every step, for a progress bar.
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
            metrics = learner.step(Batch(images=images, labels=train.labels[rows], noise=noise[rows]))
            for name, value in metrics.items():  # summed on the device: no wait for it in a step
                totals[name] = totals.get(name, torch.zeros((), device=device)) + value * len(rows)
            on_step()
        means = {name: float(total) / len(train) for name, total in totals.items()}
        yield EpochResult(epoch=epoch, train=means, validation=learner.validate(validation))


def steps_per_epoch(images: int, batch_size: int) -> int:
    """How many steps `fit` makes in an epoch of that many training images."""
    return len(batches(torch.arange(images), batch_size))


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
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay)


class Classification:
    """Cross-entropy training of a ResNet that runs every block, or those that a fixed rule keeps.

    Under a rule a block learns, weights and batch statistics alike, from the images that run it; a
    block that no image of a batch runs is left as it is, weight decay included.

    Args:
        rule: noise [B, K] in [0, 1) to actions [B, K] bool; None: every block runs (pretraining).
    """

    def __init__(
        self,
        resnet: ResNet,
        *,
        optimizer: torch.optim.Optimizer,
        normalisation: Normalisation,
        precision: str,
        label_smoothing: float = 0.0,
        rule: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.modules: dict[str, nn.Module] = {"resnet": resnet}
        self.resnet = resnet
        self.optimizer = optimizer
        self.normalisation = normalisation
        self.precision = precision
        self.label_smoothing = label_smoothing
        self.rule = rule
        self.num_actions = 0 if rule is None else resnet.num_blocks

    def begin_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step on the mean cross-entropy of the batch."""
        self.resnet.train()
        with autocast(batch.images.device, self.precision):
            logits = self.resnet(batch.images, self._actions(batch.noise))
        logits = logits.float()
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        correct = logits.argmax(dim=1) == batch.labels
        return {"loss": loss.detach(), "accuracy": correct.float().mean()}

    def validate(self, split: Split) -> Metrics:
        """Loss and accuracy with the blocks that run; what a rule draws is the same at every call."""
        noise = torch.rand(len(split), self.num_actions, generator=generator("validation"))
        actions = self._actions(noise)
        found = predict(
            self.resnet, split, actions, normalisation=self.normalisation, precision=self.precision
        )
        return {"loss": float(found.losses.mean()), "accuracy": found.accuracy}

    def _actions(self, noise: Tensor | None) -> Tensor | None:
        if self.rule is None:
            return None
        assert noise is not None  # `fit` draws it for every learner with actions
        return self.rule(noise)
