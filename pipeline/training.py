"""The one training loop, and pretraining as the simplest thing that it can train. No I/O here.

Everything random in an epoch is drawn when the epoch starts, as one table with a row for each image,
from (seed, stage, epoch) alone. So what happens to an image depends neither on the batch it is in nor
on the device, and a run that is resumed after any step goes on exactly as it would have.

Shapes: B images of a batch, M images of a split, K blocks, N classes.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import distributed
from pipeline.executors.base import Networks
from pipeline.inference import make_executor, predict
from pipeline.resnet import ResNet
from pipeline.runtime import autocast, generator
from pipeline.tensors import AnyAugmentation, Images, Normalisation, batches

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step sees: of several processes, each sees its share, which may be empty.

    Attributes:
        images: [B, 3, H, W] float32, augmented and normalised.
        labels: [B] int64.
        noise: [B, columns] uniform in [0, 1), from which a learner that asks for it draws actions.
        share: B over the images of the whole batch, by which its means weigh.
    """

    images: Tensor
    labels: Tensor
    noise: Tensor
    share: float = 1.0


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
    noise_columns: int

    def begin_epoch(self, epoch: int) -> None:
        """Set what changes from epoch to epoch."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step (`descend`); the batch means of its metrics, as scalars on the device."""

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
    Of several processes each calls it with the same arguments and yields the same.

    Args:
        batch_size: of all processes together, so that results do not depend on their number.
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
        noise = torch.rand(len(train), learner.noise_columns, generator=draw).to(device)
        learner.begin_epoch(position.epoch)
        _to_device(position, device)
        parts = batches(order.to(device), batch_size)
        left = parts[position.step :]
        mine = [distributed.own_rows(rows) for rows in left]
        every = zip(left, mine, train.batches(mine, augmentation, crops), strict=True)
        for rows, own, seen in every:
            factor = schedule((position.epoch + position.step / len(parts)) / epochs)
            for group, rate in zip(learner.optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            share = len(own) / len(rows)
            images, labels = normalisation(seen), train.labels[own]
            batch = Batch(images=images, labels=labels, noise=noise[own], share=share)
            _count(position, learner.step(batch), len(own))
            yield None
        means = {name: float(total) / len(train) for name, total in position.totals.items()}
        # One process validates: a small split, and without gradients. So its numbers are exactly those
        # that one process gets, and the distinct policies of a split need no gathering.
        validation_metrics = distributed.from_main(partial(learner.validate, validation))
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
    """One more step, summed on the device: no wait for it in a step.

    Args:
        images: of this process; the mean over none of them is no number, its sum is 0.
    """
    sums = {n: value * images if images else torch.zeros_like(value) for n, value in metrics.items()}
    for name, value in distributed.add_up(sums).items():
        before = position.totals.get(name, torch.zeros((), device=value.device))
        position.totals[name] = before + value
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


def warmed_up(progress: float, *, warmup: float, schedule: Callable[[float], float]) -> float:
    """A schedule whose first share `warmup` rises from 0 in a straight line."""
    return schedule(progress) * (progress / warmup if progress < warmup else 1.0)


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


def backward(loss: Tensor, batch: Batch) -> None:
    """Leave the gradients of a loss that is a mean over the batch, as a part of the whole batch's."""
    loss.backward(torch.full_like(loss, batch.share))  # over no images the loss is no number, this is 0


def update(optimizer: torch.optim.Optimizer) -> None:
    """One step down the gradients that all processes have left."""
    distributed.add_gradients(p for group in optimizer.param_groups for p in group["params"])
    optimizer.step()


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, batch: Batch) -> None:
    """One step down the gradient of a loss that is a mean over the batch, that of all processes."""
    optimizer.zero_grad()
    backward(loss, batch)
    update(optimizer)


class Together(torch.optim.Optimizer):
    """Several optimisers as one: what one network needs may not suit the other."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all parts, in order."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parts."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' states under their numbers."""
        return {str(number): part.state_dict() for number, part in enumerate(self.parts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        for number, part in enumerate(self.parts):
            part.load_state_dict(state_dict[str(number)])


def softened(labels: Tensor, teacher_logits: Tensor, share: float) -> Tensor:
    """Distillation targets: `share` of the teacher's class probabilities, the rest on the label.

    Hinton et al. 2015 (arXiv 1503.02531) at temperature 1. [B] and [B, N] to [B, N].
    """
    one_hot = F.one_hot(labels, teacher_logits.shape[1]).float()
    return torch.lerp(one_hot, torch.softmax(teacher_logits.float(), dim=1), share)


class Distillation:
    """The classification loss, with a share of a teacher's class probabilities in the targets.

    Args:
        teacher: the network to learn from, as it is now: later changes of its weights are not seen,
            so it may be the very network that is about to be finetuned. Every block of it runs.
        share: of the teacher in the targets; 0: labels alone, and no teacher is kept.
    """

    def __init__(
        self, teacher: ResNet, *, share: float, normalisation: Normalisation, precision: str
    ) -> None:
        networks = Networks(resnet=copy.deepcopy(teacher), policy_net=None, normalisation=normalisation)
        self.share = share
        self.teacher = make_executor(networks, precision=precision) if share else None
        self.num_blocks = teacher.num_blocks

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Each image's loss [B]: the divergence KL(targets, softmax(logits)), 0 at best.

        With labels alone that is the cross-entropy.
        """
        if self.teacher is None:
            return F.cross_entropy(logits, batch.labels, reduction="none")
        every = torch.ones(len(logits), self.num_blocks, dtype=torch.bool, device=logits.device)
        targets = softened(batch.labels, self.teacher.classify(batch.images, every), self.share)
        return F.kl_div(F.log_softmax(logits, dim=1), targets, reduction="none").sum(dim=1)


class Classification:
    """Cross-entropy training of a ResNet that runs every block, or those that a fixed rule keeps.

    Under a rule a block learns, weights and batch statistics alike, from the images that run it; a
    block that no image of a batch runs is left as it is, weight decay included.

    Args:
        rule: noise [B, K] in [0, 1) to actions [B, K] bool; None: every block runs (pretraining).
        distillation: the loss in place of the cross-entropy, if any.
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
        distillation: Distillation | None = None,
    ) -> None:
        self.modules: dict[str, nn.Module] = {"resnet": resnet}
        self.distillation = distillation
        self.resnet = resnet
        self.optimizer = optimizer
        self.normalisation = normalisation
        self.precision = precision
        self.label_smoothing = label_smoothing
        self.rule = rule
        self.noise_columns = 0 if rule is None else resnet.num_blocks

    def begin_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step on the mean cross-entropy of the batch."""
        self.resnet.train()
        with autocast(batch.images.device, self.precision):
            logits = self.resnet(batch.images, self._actions(batch.noise))
        logits = logits.float()
        if self.distillation is None:
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        else:
            loss = self.distillation(logits, batch).mean()
        descend(self.optimizer, loss, batch)
        correct = logits.argmax(dim=1) == batch.labels
        return {"loss": loss.detach(), "accuracy": correct.float().mean()}

    def validate(self, split: Images) -> Metrics:
        """Loss and accuracy with the blocks that run; what a rule draws is the same at every call."""
        noise = torch.rand(len(split), self.noise_columns, generator=generator("validation"))
        actions = self._actions(noise)
        found = predict(
            self.resnet, split, actions, normalisation=self.normalisation, precision=self.precision
        )
        return {"loss": float(found.losses.mean()), "accuracy": found.accuracy}

    def _actions(self, noise: Tensor) -> Tensor | None:
        return None if self.rule is None else self.rule(noise)
