"""The paper's static rules: which K' of K blocks run, decided without looking at the image.

What BlockDrop must beat at equal cost. A rule is a function of a noise table [B, K] in [0, 1), from
which training draws its actions too, so that an image's blocks depend on its row alone.
Shapes: B images, K blocks.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.resnet import STAGES

StaticRule = Callable[[Tensor], Tensor]  # noise [B, K] to actions [B, K] bool


def first(noise: Tensor, *, kept: int) -> Tensor:
    """FirstK: the first K' blocks on every image. The noise gives the shape alone."""
    return (torch.arange(noise.shape[1], device=noise.device) < kept).expand(noise.shape)


def random(noise: Tensor, *, kept: int) -> Tensor:
    """RandomK: K' blocks of its own for each image, those with the smallest noise.

    Uniform noise makes every set of K' blocks equally likely.
    """
    return noise.argsort(dim=1, stable=True).argsort(dim=1) < kept


def distribute(noise: Tensor, *, kept: int) -> Tensor:
    """DistributeK: K' blocks spread evenly over the stages. The noise gives the shape alone.

    The paper says no more. Here a stage runs its first blocks, the one that changes the shape among
    them, and what K' leaves over when divided goes to the earliest stages, one block each.
    """
    num_blocks = noise.shape[1]
    per_stage = num_blocks // STAGES
    index = torch.arange(num_blocks, device=noise.device)
    turn = index % per_stage * STAGES + index // per_stage  # each stage's first block, then its second
    return (turn < kept).expand(noise.shape)


RULES: dict[str, Callable[..., Tensor]] = {
    "first": first,
    "random": random,
    "distribute": distribute,
}


def static_rule(name: str, kept: int) -> StaticRule:
    """The rule of that name that keeps `kept` blocks.

    Raises:
        ValueError: no rule has that name.
    """
    if name not in RULES:
        raise ValueError(f"no static rule {name!r}; choose one of {', '.join(RULES)}")
    return partial(RULES[name], kept=kept)
