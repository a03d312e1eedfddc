"""The one training loop, and pretraining as the simplest thing that it can train. No I/O here.

Everything random in an epoch is drawn when the epoch starts, as one table with a row for each image,
from (seed, stage, epoch) alone. So what happens to an image depends neither on the batch it is in nor
on the device, and a run that is resumed after any step goes on exactly as it would have.

Shapes: B images of a batch, M images of a split, K blocks, N classes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.data.split import ImageSplit, batches
from pipeline.data.transforms import AnyAugmentation, Normalisation
from pipeline.device import generator

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

    def validate(self, split: ImageSplit) -> Metrics:
        """Metrics on images that are not trained on."""


def fit(
    learner: Learner,
    *,
    train: ImageSplit,
    validation: ImageSplit,
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
        mine = [distributed.shard_rows(rows) for rows in left]
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
        validation_metrics = distributed.broadcast_from_rank0(partial(learner.validate, validation))
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
    for name, value in distributed.all_reduce_sum(sums).items():
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
