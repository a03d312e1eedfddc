"""The paper's static rules: which K' of K blocks run, decided without looking at the image.

What BlockDrop must beat at equal cost. A rule is a function of a noise table [B, K] in [0, 1), from
which training draws its actions too, so that an image's blocks depend on its row alone.
Shapes: B images, K blocks.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from pipeline.architectures import CIFAR_STAGES

StaticRule = Callable[[Tensor], Tensor]  # noise [B, K] to actions [B, K] bool


def first(noise: Tensor, *, kept: int, stages: Sequence[int] | None = None) -> Tensor:
    """FirstK: the first K' blocks on every image. The noise gives the shape alone."""
    return (torch.arange(noise.shape[1], device=noise.device) < kept).expand(noise.shape)


def random(noise: Tensor, *, kept: int, stages: Sequence[int] | None = None) -> Tensor:
    """RandomK: K' blocks of its own for each image, those with the smallest noise.

    Uniform noise makes every set of K' blocks equally likely.
    """
    return noise.argsort(dim=1, stable=True).argsort(dim=1) < kept


def distribute(noise: Tensor, *, kept: int, stages: Sequence[int] | None = None) -> Tensor:
    """DistributeK: K' blocks spread evenly over the stages. The noise gives the shape alone.

    The paper says no more. Here a stage runs its first blocks, the one that changes the shape among
    them, and what K' leaves over when divided goes to the earliest stages, one block each. A stage that
    has no more blocks leaves its turn to the others.

    Args:
        stages: blocks in each; None: as many in each of a CIFAR ResNet's three.
    """
    num_blocks = noise.shape[1]
    sizes = (num_blocks // CIFAR_STAGES,) * CIFAR_STAGES if stages is None else tuple(stages)
    return _distributed(sizes, kept, noise.device).expand(noise.shape)


@cache  # a copy to the device in every step would be a wait in every step
def _distributed(sizes: tuple[int, ...], kept: int, device: torch.device) -> Tensor:
    """[K] bool."""
    places = [(index, stage) for stage, size in enumerate(sizes) for index in range(size)]
    order = sorted(range(len(places)), key=places.__getitem__)  # each stage's first, then its second
    runs = torch.zeros(len(places), dtype=torch.bool)
    runs[order[:kept]] = True
    return runs.to(device)


RULES: dict[str, Callable[..., Tensor]] = {
    "first": first,
    "random": random,
    "distribute": distribute,
}


def static_rule(name: str, kept: int, stages: Sequence[int] | None = None) -> StaticRule:
    """The rule of that name that keeps `kept` blocks of a ResNet with so many in each stage.

    Raises:
        ValueError: no rule has that name.
    """
    if name not in RULES:
        raise ValueError(f"no static rule {name!r}; choose one of {', '.join(RULES)}")
    return partial(RULES[name], kept=kept, stages=stages)
