"""Learning-rate schedules, optimisers, and a step of one, by one process or several.

A schedule takes the progress of the training, [0, 1), to a factor of the learning rates, [0, 1].
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline import distributed
from pipeline.training.loop import Batch


def constant(progress: float) -> float:
    return 1.0


def cosine(progress: float, *, warmup: float = 0.0) -> float:
    """Linear warm-up over the first fraction `warmup`, then half a cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def step_down(progress: float, *, at: float, factor: float = 0.1) -> float:
    """The authors' finetuning: times 0.1 from the fraction `at` of the training on."""
    return factor if progress >= at else 1.0


def warmed_up(progress: float, *, warmup: float, schedule: Callable[[float], float]) -> float:
    """A schedule whose first fraction `warmup` rises linearly from 0."""
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
    """Leave the gradients of a loss that is a mean over this process's part of the batch.

    They are weighted: summed over all processes they are those of the mean over the whole batch.
    """
    # a factor of the gradient, not of the loss, which over no images is NaN: 0 NaN is NaN
    loss.backward(torch.full_like(loss, batch.weight))


def optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """One step down the gradients that all processes have left."""
    distributed.all_reduce_gradients(p for group in optimizer.param_groups for p in group["params"])
    optimizer.step()


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimisers as one: what one network needs may not suit the other."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' states under their numbers."""
        return {str(number): part.state_dict() for number, part in enumerate(self.parts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for number, part in enumerate(self.parts):
            part.load_state_dict(state_dict[str(number)])
