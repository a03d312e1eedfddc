"""How important each inner channel of each block is; the least important ones are pruned.

Shapes: C inner channels of a convolution, I input channels, M images, B images of a batch.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.split import ImageSplit, batches
from pipeline.data.transforms import Normalisation
from pipeline.models.resnet import ResNet

Criterion = Literal["l1", "taylor"]
# [C] of each inner convolution of each block: K times one, or for a bottleneck two tensors
Importances = Sequence[Sequence[Tensor]]

BATCH = 128  # images, for each gradient
MOST_IMAGES = 5120  # training images that the gradients come from


def importances(
    criterion: Criterion,
    resnet: ResNet,
    images: ImageSplit,
    normalisation: Normalisation,
    draw: torch.Generator,
) -> Importances:
    """By the named criterion.

    Args:
        images: training images, which `l1` does not look at.
        draw: which of them `taylor` looks at.
    """
    if criterion == "l1":
        return l1_norms(resnet)
    order = torch.randperm(len(images), generator=draw)[:MOST_IMAGES]
    return taylor(resnet, images, batches(order, BATCH), normalisation)


@torch.no_grad()
def l1_norms(resnet: ResNet) -> Importances:
    """The sum of a filter's absolute weights (Li et al. 2017, "Pruning filters", section 3.1)."""
    return _of_each(resnet, lambda conv, bn: conv.weight.detach().abs().sum(dim=(1, 2, 3)))


def taylor(
    resnet: ResNet, images: ImageSplit, parts: Sequence[Tensor], normalisation: Normalisation
) -> Importances:
    """How much the loss would change without a channel, to first order, squared.

    Molchanov et al. 2019, "Importance estimation for neural network pruning", Eq. 8, with a gate of 1 on
    the output y = weight x + bias of the channel's batch norm: the loss's gradient by the gate is
    sum(y dL/dy) = weight dL/dweight + bias dL/dbias. L is the mean
    cross-entropy of a batch; the squares are summed over batches, as channels are compared with each
    other alone. Batch norm uses its running statistics and nothing of the network changes.

    Args:
        parts: row numbers [B] of each batch.
    """
    was_training = resnet.training
    resnet.eval()
    totals = [[torch.zeros_like(score) for score in block] for block in l1_norms(resnet)]
    for rows, batch in zip(parts, images.batches(parts), strict=True):
        loss = F.cross_entropy(resnet(normalisation(batch)), images.labels[rows.to(images.device)])
        resnet.zero_grad()
        loss.backward()
        gates = _of_each(resnet, lambda conv, bn: _gradient_of_a_gate(bn))
        for block, gradients in zip(totals, gates, strict=True):
            for total, gradient in zip(block, gradients, strict=True):
                total += gradient.detach().square()
    resnet.zero_grad()
    resnet.train(was_training)
    return totals


def _gradient_of_a_gate(bn: nn.BatchNorm2d) -> Tensor:
    """[C], after a backward pass."""
    assert bn.weight.grad is not None
    assert bn.bias.grad is not None
    return bn.weight * bn.weight.grad + bn.bias * bn.bias.grad


def _of_each(resnet: ResNet, score: Callable[[nn.Conv2d, nn.BatchNorm2d], Tensor]) -> list[list[Tensor]]:
    """A score [C] for each inner convolution and its batch norm."""
    return [
        [score(conv, bn) for conv, bn in block.convolutions()[:-1]] for block in resnet.flat_blocks()
    ]
