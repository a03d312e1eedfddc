"""The one training loop, and pretraining as the simplest thing that it can train. No I/O here.

Everything random in an epoch is drawn when the epoch starts, as one table with a row for each image,
from (seed, stage, epoch) alone. So what happens to an image depends neither on the batch it is in nor
on the device, and a run that is resumed after any step goes on exactly as it would have.

Shapes: B images of a batch, M images of a split, K blocks, N classes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.inference import predict
from pipeline.resnet import ResNet
from pipeline.runtime import autocast, generator
from pipeline.tensors import AnyAugmentation, Images, Normalisation, batches

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
    """An epoch's number (from 0), its means over the training images, and its validation.

    `wrong_step` is its first step (from 1) with a NaN or infinite metric, None where all were finite.
    """

    epoch: int
    train: Metrics
    validation: Metrics
    wrong_step: int | None = None


class NotFiniteError(ArithmeticError):
    """NaN or infinite numbers in a training; the message names where they were first seen."""


@dataclass(kw_only=True)
class Position:
    """Where a training is: `step` steps of `epoch` (from 0) are done. `fit` moves it on.

    Attributes:
        totals: sums over the epoch's images so far of each metric, scalars on the training's device.
        finite: how many of the epoch's steps were done before a metric became NaN or infinite; a
            sum never gets finite again. Counted on the device, so that no step waits for it.
    """

    epoch: int = 0
    step: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)
    finite: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))


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

    def validate(self, split: Images) -> Metrics:
        """Metrics on images that are not trained on."""


def fit(
    learner: Learner,
    *,
    train: Images,
    validation: Images,
    epochs: int,
    batch_size: int,
    schedule: Callable[[float], float],
    augmentation: AnyAugmentation,
    normalisation: Normalisation,
    key: tuple[int | str, ...],
    position: Position,
) -> Iterator[EpochResult | None]:
    """Train, yielding after each step, so that the caller can show, log, save or stop.

    What is yielded is None, and once more at the end of each epoch its result. Whatever happens between
    two yields, a state that was saved at one of them (`position`, modules, optimiser) is a whole one.

    Args:
        schedule: factor of the learning rates at a share of the training done, [0, 1) to [0, 1].
        key: (seed, stage), from which every random table is drawn.
        position: where to begin; kept up to date.
    """
    base_rates = [group["initial_lr"] for group in learner.optimizer.param_groups]
    device = train.device
    while position.epoch < epochs:
        draw = generator(*key, position.epoch)
        order = torch.randperm(len(train), generator=draw)
        crops = augmentation.draw(len(train), draw)
        noise = torch.rand(len(train), learner.num_actions, generator=draw).to(device)
        learner.begin_epoch(position.epoch)
        _to_device(position, device)
        parts = batches(order.to(device), batch_size)
        left = parts[position.step :]
        for rows, seen in zip(left, train.batches(left, augmentation, crops), strict=True):
            factor = schedule((position.epoch + position.step / len(parts)) / epochs)
            for group, rate in zip(learner.optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            metrics = learner.step(
                Batch(images=normalisation(seen), labels=train.labels[rows], noise=noise[rows])
            )
            _count(position, metrics, len(rows))
            yield None
        means = {name: float(total) / len(train) for name, total in position.totals.items()}
        validation_metrics = learner.validate(validation)
        result = EpochResult(
            epoch=position.epoch,
            train=means,
            validation=validation_metrics,
            wrong_step=_wrong_step(position),
        )
        position.epoch, position.step, position.totals = position.epoch + 1, 0, {}
        position.finite = torch.zeros_like(position.finite)
        yield result


def _to_device(position: Position, device: torch.device) -> None:
    position.totals = {name: total.to(device) for name, total in position.totals.items()}
    position.finite = position.finite.to(device)


def _count(position: Position, metrics: dict[str, Tensor], images: int) -> None:
    """One more step, summed on the device: no wait for it in a step."""
    for name, value in metrics.items():
        before = position.totals.get(name, torch.zeros((), device=value.device))
        position.totals[name] = before + value * images
    position.finite = position.finite + sum(position.totals.values()).isfinite()  # type: ignore[union-attr]
    position.step += 1


def _wrong_step(position: Position) -> int | None:
    finite = int(position.finite)
    return None if finite == position.step else finite + 1


def require_finite(learner: Learner, position: Position, result: EpochResult | None = None) -> None:
    """See that all metrics so far and all weights are numbers. Waits for the device: call it to save.

    Args:
        result: of the epoch that has just ended, if one has.

    Raises:
        NotFiniteError: one is NaN or infinite.
    """
    step = _wrong_step(position) if result is None else result.wrong_step
    epoch = position.epoch + 1 if result is None else result.epoch + 1
    if step is not None:
        means = position.totals if result is None else result.train
        names = [name for name, value in means.items() if not math.isfinite(float(value))]
        raise NotFiniteError(f"{names[0]} is not finite from step {step} of epoch {epoch} on")
    place = f"after epoch {epoch}" if result else f"after step {position.step} of epoch {epoch}"
    for name, value in result.validation.items() if result else ():
        if not math.isfinite(value):
            raise NotFiniteError(f"validation {name} is {value} {place}")
    for module in learner.modules.values():
        tensors = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
        finite = torch.stack([t.isfinite().all() for t in tensors.values()]).tolist()  # one wait
        for name, is_finite in zip(tensors, finite, strict=True):
            if not is_finite:
                raise NotFiniteError(f"weight {name} is not finite {place}")


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

    def validate(self, split: Images) -> Metrics:
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
