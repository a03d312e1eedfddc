"""Is an image unlike those of the training? Told by the statistics of the policy network's features.

Of every channel that enters a batch normalisation, an image has a mean and a variance over its pixels.
Usual images show how these spread; one for which they are far off is nothing that the networks know. A
classifier's confidence tells this less well: it may be sure of noise (docs/python.md has numbers).

Shapes: B images, M usual images, L layers, C channels, F = 2 C statistics of a layer, H and W pixels.
"""

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from pipeline.models.policy_net import PolicyNet, average_down

FALSE_ALARMS = 0.01  # the share of usual images that is called unlike them
TINY = 1e-6  # added to variances: channels without any have a logarithm too, and a spread


def batch_norms(policy_net: PolicyNet) -> list[nn.BatchNorm2d]:
    """The L layers that are looked at."""
    return [layer for layer in policy_net.features.modules() if isinstance(layer, nn.BatchNorm2d)]


@torch.no_grad()
def statistics_of(policy_net: PolicyNet, images: Tensor) -> list[Tensor]:
    """The mean and the logarithm of the variance of each channel over an image's pixels, for L layers.

    Args:
        policy_net: on the images' device; in evaluation mode from here on.
        images: [B, 3, H, W], normalised.

    Returns:
        L times [B, F] float64.
    """
    found: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0].double(), (2, 3), correction=0)  # [B, C] each
        found.append(torch.cat([mean, (variance + TINY).log()], dim=1))

    handles = [layer.register_forward_pre_hook(look) for layer in batch_norms(policy_net.eval())]
    try:
        policy_net.features(average_down(images, policy_net.input_size))
    finally:
        for handle in handles:
            handle.remove()
    return found


class UsualImages(nn.Module):
    """How the statistics of usual images spread; no part of a network, but kept beside its weights.

    Args:
        policy_net: whose features are looked at. Nothing is usual yet; `of` finds out what is.

    Attributes:
        means, deviations: of each statistic over the images, all layers' in turn, [sum of F].
        limits: of each layer's mean squared deviation, [L]. An image that passes one is unlike them.
    """

    means: Tensor
    deviations: Tensor
    limits: Tensor

    def __init__(self, policy_net: PolicyNet) -> None:
        super().__init__()
        self.sizes = [2 * layer.num_features for layer in batch_norms(policy_net)]
        self.register_buffer("means", torch.zeros(sum(self.sizes)))
        self.register_buffer("deviations", torch.ones(sum(self.sizes)))
        self.register_buffer("limits", torch.ones(len(self.sizes)))

    @classmethod
    def of(cls, policy_net: PolicyNet, batches: Iterable[Tensor]) -> Self:
        """What is usual for M normalised images, which come in batches of [B, 3, H, W].

        The limits are in proportion to what each layer alone would have. Together they are passed by
        FALSE_ALARMS of the images.
        """
        usual = cls(policy_net)
        by_batch = [statistics_of(policy_net, images) for images in batches]
        statistics = [torch.cat(parts) for parts in zip(*by_batch, strict=True)]  # L times [M, F]
        usual.to(statistics[0].device)
        deviations, means = torch.std_mean(torch.cat(statistics, dim=1), 0, correction=0)
        usual.means.copy_(means)
        usual.deviations.copy_(deviations + TINY)
        distances = usual.distances(statistics)  # [M, L]
        alone = distances.quantile(1 - FALSE_ALARMS, dim=0) + TINY
        usual.limits.copy_(alone * (distances / alone).amax(1).quantile(1 - FALSE_ALARMS))
        return usual

    def distances(self, statistics: list[Tensor]) -> Tensor:
        """The mean squared deviation of each layer's statistics, from L times [B, F]: [B, L] float64."""
        spreads = zip(
            statistics, self.means.split(self.sizes), self.deviations.split(self.sizes), strict=True
        )
        squares = [((of_layer - mean) / deviation) ** 2 for of_layer, mean, deviation in spreads]
        return torch.stack([square.mean(1) for square in squares], dim=1)

    def are_unlike(self, policy_net: PolicyNet, images: Tensor) -> Tensor:
        """Whether each normalised image [B, 3, H, W] is unlike them: [B] bool."""
        return (self.distances(statistics_of(policy_net, images)) > self.limits).any(1)
