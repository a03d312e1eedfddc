"""Fits the values of paths on validation images: how likely each path is to be correct.

On training images they would come out too high: the ResNet has seen them, and is correct on nearly all.

Shapes: M validation images, P paths, K blocks, N classes, F statistics.
"""

import numpy as np
import torch
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pipeline.data.split import ImageSplit
from pipeline.data.transforms import Normalisation
from pipeline.flops import Cost
from pipeline.inference.predict import logits_under, policy_outputs
from pipeline.models.path_values import DIAL_POINTS, PathValues, statistics_of
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet

GAMMAS = (1e-3, 1e4)  # between which the dial goes


def fit_values(
    policy_net: PolicyNet,
    resnet: ResNet,
    validation: ImageSplit,
    *,
    normalisation: Normalisation,
    cost: Cost,
    block_shares: tuple[float, ...] | None,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Fit all of `policy_net.path_values` but gamma.

    Args:
        cost: FLOPs of both networks.
        block_shares: what each block counts in Eq. 3; None: equally much.

    Returns:
        The policy network's class logits [M, N], and the logits of each path's answer [P, M, N].
    """
    values = policy_net.path_values
    assert values is not None
    class_logits = policy_outputs(
        policy_net, validation, normalisation=normalisation, precision=precision
    )  # [M, N]
    runs = values.mask.any(dim=1)  # [P], the paths that run blocks
    resnet_logits = logits_under(
        resnet, validation, values.mask[runs], normalisation=normalisation, precision=precision
    )  # [P', M, N]
    labels = validation.labels

    num_blocks = values.mask.shape[1]
    shares = torch.tensor(block_shares or [1 / num_blocks] * num_blocks, device=values.mask.device)
    values.costs.copy_(values.mask.to(shares.dtype) @ shares)
    values.average.fit(class_logits, resnet_logits, labels)

    answers = values.average.log_probs(class_logits).repeat(len(runs), 1, 1)  # [P, M, N]
    for path, logits in zip(runs.nonzero().flatten().tolist(), resnet_logits, strict=True):
        answers[path] = values.average(class_logits, logits)
    statistics = statistics_of(values.average.log_probs(class_logits)).double().cpu().numpy()  # [M, F]
    correct = (answers.argmax(dim=2) == labels).cpu().numpy()  # [P, M]
    for path, of_path in enumerate(correct):
        weight, bias = _logistic(statistics, of_path)
        values.weight[path] = torch.from_numpy(weight)
        values.bias[path] = bias
    values.dial.copy_(_dial(values, class_logits, cost))
    return class_logits, answers


def _logistic(statistics: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, float]:
    """Weight [F] and bias of a logistic regression from statistics [M, F] to correct [M]."""
    if correct.all() or not correct.any():  # nothing to tell apart; half an image for what was not seen
        odds = (correct.sum() + 0.5) / (len(correct) - correct.sum() + 0.5)
        return np.zeros(statistics.shape[1]), float(np.log(odds))
    fitted = LogisticRegression(max_iter=10_000).fit(statistics, correct)
    return fitted.coef_[0], float(fitted.intercept_[0])


def _dial(values: PathValues, class_logits: Tensor, cost: Cost) -> Tensor:
    """Gammas and the mean FLOPs under each, [2, G]: at evenly spaced FLOPs, as far as gamma reaches.

    With gamma the chosen path's cost only rises: of linear functions of gamma with slope q, the largest
    one has an ever larger q, so an ever smaller q (1 - c^2), so an ever larger c.
    """
    before = values.gamma.clone()

    def mean_flops(log_gamma: float) -> float:
        values.gamma.fill_(np.exp(log_gamma))
        return float(cost.of(values(class_logits) >= 0).mean())

    low, high = np.log(GAMMAS)
    ends = mean_flops(low), mean_flops(high)
    log_gammas = [low]
    for target in np.linspace(*ends, DIAL_POINTS)[1:-1]:
        at = log_gammas[-1]
        reached = mean_flops(at) >= target
        log_gammas.append(
            at if reached else brentq(lambda x, to=target: mean_flops(x) - to, at, high, xtol=1e-4)
        )
    log_gammas.append(high)
    means = [mean_flops(log_gamma) for log_gamma in log_gammas]
    values.gamma.copy_(before)
    return torch.from_numpy(np.stack([np.exp(log_gammas), np.maximum.accumulate(means)]))
