"""The training loop of every stage that trains. No I/O here.

Everything random in an epoch is drawn when the epoch starts, as one table with a row for each image,
from (seed, stage, epoch) alone. So what happens to an image depends neither on the batch it is in nor
on the device, and a run that is resumed after any step continues as if it had not been stopped.

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
    """What a step sees. Each of several processes sees its part of the whole batch, maybe no image."""

    images: Tensor  # [B, 3, H, W] float32, augmented and normalised
    labels: Tensor  # [B] int64
    noise: Tensor  # [B, columns] uniform in [0, 1), from which a learner that asks for it draws actions
    weight: float = 1.0  # of this part in means over the whole batch: B over the images of that


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """An epoch's number (from 0), its means over the training images, and its validation.

    `first_nonfinite_step` (from 1) had a NaN or infinite metric; None where all were finite.
    """

    epoch: int
    train: Metrics
    validation: Metrics
    first_nonfinite_step: int | None = None


class NotFiniteError(ArithmeticError):
    """NaN or infinite numbers in a training; the message names where they were first seen."""


@dataclass(kw_only=True)
class Position:
    """Where a training is: `step` steps of `epoch` (from 0) are done. `fit` updates it.

    Attributes:
        totals: sums over the epoch's images so far of each metric, scalars on the training's device.
        finite_steps: how many of the epoch's steps were done before a metric became NaN or infinite; a
            sum never gets finite again. Counted on the device, so that no step waits for it.
    """

    epoch: int = 0
    step: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)
    finite_steps: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))


class Learner(Protocol):
    """Something that learns from batches."""

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    normalisation: Normalisation
    noise_columns: int

    def begin_epoch(self, epoch: int) -> None:
        """Set what changes from epoch to epoch."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step; the batch means of its metrics, as scalars on the device."""

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

    Each step yields None, and the end of each epoch its result. A state that was saved at a yield
    (`position`, modules, optimiser) is complete, whatever happens before the next one.
    Of several processes each calls it with the same arguments and yields the same.

    Args:
        batch_size: of all processes together, so that results do not depend on their number.
        schedule: factor of the learning rates when a fraction of the training is done, [0, 1) to [0, 1].
        key: (seed, stage), from which every random table is drawn.
        position: where to begin; kept up to date.
    """
    base_rates = [group["initial_lr"] for group in learner.optimizer.param_groups]
    device = train.device
    while position.epoch < epochs:
        # the epoch's random tables, a row for each of the M images, drawn on the CPU
        rng = generator(*key, position.epoch)
        order = torch.randperm(len(train), generator=rng)  # [M]
        augmentation_state = augmentation.draw(len(train), rng)
        noise = torch.rand(len(train), learner.noise_columns, generator=rng).to(device)
        learner.begin_epoch(position.epoch)
        _to_device(position, device)
        parts = batches(order.to(device), batch_size)
        todo = parts[position.step :]  # rows of each whole batch
        shards = [distributed.shard_rows(rows) for rows in todo]  # this process's rows of it
        images_of = train.batches(shards, augmentation, augmentation_state)
        for rows, shard, images in zip(todo, shards, images_of, strict=True):
            factor = schedule((position.epoch + position.step / len(parts)) / epochs)
            for group, rate in zip(learner.optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            batch = Batch(
                images=normalisation(images),
                labels=train.labels[shard],
                noise=noise[shard],
                weight=len(shard) / len(rows),
            )
            _count(position, learner.step(batch), len(shard))
            yield None
        means = {name: float(total) / len(train) for name, total in position.totals.items()}
        # One process validates: a small split, and without gradients. So its numbers are exactly those
        # that one process gets, and the distinct policies of a split need no gathering.
        validation_metrics = distributed.broadcast_from_rank0(partial(learner.validate, validation))
        result = EpochResult(
            epoch=position.epoch,
            train=means,
            validation=validation_metrics,
            first_nonfinite_step=_first_nonfinite_step(position),
        )
        position.epoch, position.step, position.totals = position.epoch + 1, 0, {}
        position.finite_steps = torch.zeros_like(position.finite_steps)
        yield result


def _to_device(position: Position, device: torch.device) -> None:
    position.totals = {name: total.to(device) for name, total in position.totals.items()}
    position.finite_steps = position.finite_steps.to(device)


def _count(position: Position, metrics: dict[str, Tensor], images: int) -> None:
    """Add a step's metrics to the totals, on the device, so that no step waits for it.

    Args:
        metrics: means over the images of this process.
        images: how many those are; the mean over none is NaN, its sum 0.
    """
    sums = {n: value * images if images else torch.zeros_like(value) for n, value in metrics.items()}
    for name, value in distributed.all_reduce_sum(sums).items():
        position.totals[name] = position.totals.get(name, torch.zeros_like(value)) + value
    # one NaN or infinite total makes the sum of all of them so, and stays so to the epoch's end
    all_finite = torch.stack(list(position.totals.values())).sum().isfinite()
    position.finite_steps = position.finite_steps + all_finite
    position.step += 1


def _first_nonfinite_step(position: Position) -> int | None:
    finite_steps = int(position.finite_steps)
    return None if finite_steps == position.step else finite_steps + 1


def require_finite(learner: Learner, position: Position, result: EpochResult | None = None) -> None:
    """Check that all metrics so far and all weights are finite. Waits for the device: call it to save.

    Args:
        result: of the epoch that has just ended, if one has.

    Raises:
        NotFiniteError: one is NaN or infinite.
    """
    step = _first_nonfinite_step(position) if result is None else result.first_nonfinite_step
    epoch = position.epoch + 1 if result is None else result.epoch + 1
    if step is not None:
        means = position.totals if result is None else result.train
        names = [name for name, value in means.items() if not math.isfinite(float(value))]
        raise NotFiniteError(f"{names[0]} is not finite from step {step} of epoch {epoch} on")
    when = f"after epoch {epoch}" if result else f"after step {position.step} of epoch {epoch}"
    for name, value in result.validation.items() if result else ():
        if not math.isfinite(value):
            raise NotFiniteError(f"validation {name} is {value} {when}")
    for module in learner.modules.values():
        tensors = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
        all_finite = torch.stack([t.isfinite().all() for t in tensors.values()]).tolist()  # one wait
        for name, is_finite in zip(tensors, all_finite, strict=True):
            if not is_finite:
                raise NotFiniteError(f"weight {name} is not finite {when}")


def steps_per_epoch(images: int, batch_size: int) -> int:
    """How many steps `fit` makes in an epoch of that many training images."""
    return len(batches(torch.arange(images), batch_size))
