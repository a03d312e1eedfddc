"""The front of one model: what a policy between paths is worth at other gammas, without any training.

Shapes: M images of a split, P paths, N classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.split import ImageSplit
from pipeline.data.transforms import Normalisation
from pipeline.flops import Cost
from pipeline.inference.predict import logits_under, policy_outputs
from pipeline.infra.errors import UserError
from pipeline.models.path_values import PathValues
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet

POINTS = 9  # budgets, evenly spaced from the least to the largest that gamma reaches


@dataclass(frozen=True, kw_only=True)
class DialPoint:
    """One gamma: the FLOPs promised by the validation images, and what a split's images took."""

    gamma: float
    budget: float
    flops: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class PathOutcomes:
    """A split's images on every path."""

    class_logits: Tensor  # [M, N], of the policy network
    correct: Tensor  # [P, M] bool, whether the path's answer is right


def outcomes_of_paths(
    policy_net: PolicyNet, resnet: ResNet, split: ImageSplit, *, normalisation: Normalisation
) -> PathOutcomes:
    """Run every image on each path, P passes in all."""
    values = policy_net.path_values
    assert values is not None
    class_logits = policy_outputs(policy_net, split, normalisation=normalisation)  # [M, N]
    own_correct = class_logits.argmax(dim=1) == split.labels  # [M]
    correct = own_correct.repeat(len(values.mask), 1)  # [P, M]
    runs = values.mask.any(dim=1)  # [P], the paths that run blocks
    resnet_logits = logits_under(resnet, split, values.mask[runs], normalisation=normalisation)
    for path, logits in zip(runs.nonzero().flatten().tolist(), resnet_logits, strict=True):
        correct[path] = values.average(class_logits, logits).argmax(dim=1) == split.labels
    return PathOutcomes(class_logits=class_logits, correct=correct)


def at_budget(
    values: PathValues, outcomes: PathOutcomes, *, budget: float, cost: Cost
) -> tuple[Tensor, DialPoint]:
    """The model at one budget, in FLOPs: whether each image is classified correctly, [M] bool, and the
    means. It leaves `values` at the budget's gamma.

    Raises:
        UserError: no gamma takes this budget.
    """
    low, high = values.dial[1, [0, -1]].tolist()
    if not low <= budget <= high:
        raise UserError(f"a budget of {budget:.3g} FLOPs is none from {low:.3g} to {high:.3g}")
    values.gamma.fill_(values.gamma_of(budget))
    chosen = values.rewards(outcomes.class_logits).argmax(dim=1)  # [M]
    correct = outcomes.correct[chosen, torch.arange(len(chosen), device=chosen.device)]
    point = DialPoint(
        gamma=float(values.gamma),
        budget=budget,
        flops=float(cost.of(values.mask[chosen]).mean()),
        accuracy=float(correct.double().mean()),
    )
    return correct, point


def dial_points(
    policy_net: PolicyNet, resnet: ResNet, split: ImageSplit, *, normalisation: Normalisation, cost: Cost
) -> list[DialPoint]:
    """The model at POINTS budgets; none for a policy that decides block by block.

    Every path is run once, so all points together take P passes.
    """
    values = policy_net.path_values
    if values is None:
        return []
    outcomes = outcomes_of_paths(policy_net, resnet, split, normalisation=normalisation)
    trained_for = values.gamma.clone()
    low, high = values.dial[1, [0, -1]].tolist()
    budgets = np.linspace(low, high, POINTS).clip(low, high).tolist()
    points = [at_budget(values, outcomes, budget=budget, cost=cost)[1] for budget in budgets]
    values.gamma.copy_(trained_for)
    return points
