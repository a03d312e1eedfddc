"""The average of two classifiers' answers, calibrated on validation images.

Shapes: B images, M validation images, V networks or policies, N classes.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARES = torch.arange(21) / 20  # of the policy network
TEMPERATURES = (0.1, 10.0)


class AveragedAnswers(nn.Module):
    """A weighted mean of log probabilities: of the policy network's answer and of the ResNet's.

    Each classifier has a temperature, by which its logits are divided first (Guo et al. 2017, "On
    calibration of modern neural networks").

    Attributes:
        temperature, resnet_temperature: of the policy network and of the ResNet.
        own_share: weight of the policy network's answer, 0 to 1.
    """

    temperature: Tensor
    resnet_temperature: Tensor
    own_share: Tensor

    def __init__(self) -> None:
        super().__init__()
        # buffers: they are fitted, so no optimiser moves them
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("resnet_temperature", torch.ones(()))
        self.register_buffer("own_share", torch.zeros(()))

    def log_probs(self, class_logits: Tensor) -> Tensor:
        """The policy network's log probabilities, [B, N] to the same."""
        return torch.log_softmax(class_logits.float() / self.temperature, dim=1)

    def forward(self, class_logits: Tensor, resnet_logits: Tensor) -> Tensor:
        """Logits of the common answer, of both networks' logits, [B, N] twice to [B, N]."""
        own = self.own_share * self.log_probs(class_logits)
        scaled = resnet_logits.float() / self.resnet_temperature
        return own + (1 - self.own_share) * torch.log_softmax(scaled, dim=1)

    def fit(self, class_logits: Tensor, resnet_logits: Tensor, labels: Tensor) -> None:
        """Take the temperatures, then the share, of the least cross-entropy on validation images.

        Args:
            class_logits: [M, N].
            resnet_logits: [V, M, N], of one network or more, all of which get one temperature and share.
            labels: [M].
        """
        every = labels.repeat(len(resnet_logits))
        self.temperature.fill_(_temperature(class_logits, labels))
        self.resnet_temperature.fill_(_temperature(resnet_logits.flatten(0, 1), every))
        losses = [self._loss(share, class_logits, resnet_logits, labels) for share in SHARES]
        self.own_share.copy_(SHARES[int(torch.tensor(losses).argmin())])

    def _loss(
        self, share: Tensor, class_logits: Tensor, resnet_logits: Iterable[Tensor], labels: Tensor
    ) -> float:
        self.own_share.copy_(share)
        return sum(
            float(F.cross_entropy(self(class_logits, logits), labels)) for logits in resnet_logits
        )


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """By which logits [M, N] are to be divided so that their cross-entropy is least."""
    from scipy.optimize import minimize_scalar  # importing it takes longer than all else here

    def loss(temperature: float) -> float:
        return float(F.cross_entropy(logits.double() / temperature, labels))

    return float(minimize_scalar(loss, bounds=TEMPERATURES, method="bounded").x)
