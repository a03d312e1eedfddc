"""Running the networks on a split: class predictions under given actions, and the policy itself.

Shapes: M images of a split, K blocks, N classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.policy_net import PolicyNet
from pipeline.resnet import ResNet
from pipeline.runtime import autocast
from pipeline.tensors import Normalisation, Split

EVALUATION_BATCH = 500  # bounds memory; results do not depend on it


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Per image, on the CPU.

    Attributes:
        classes: [M] int64, the predicted class.
        losses: [M] float32, cross-entropy in nats.
        correct: [M] bool.
    """

    classes: Tensor
    losses: Tensor
    correct: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float(self.correct.double().mean())


@torch.inference_mode()
def predict(
    resnet: ResNet,
    split: Split,
    actions: Tensor | None = None,
    *,
    normalisation: Normalisation,
    precision: str = "fp32",
) -> Predictions:
    """Classify a split in evaluation mode under actions [M, K] (None: every block runs)."""
    resnet.eval()
    device = split.images.device
    logits = []
    for start in range(0, len(split), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        some = None if actions is None else actions[part].to(device)
        with autocast(device, precision):
            logits.append(resnet(normalisation(split.images[part]), some).float())
    all_logits = torch.cat(logits)
    losses = F.cross_entropy(all_logits, split.labels, reduction="none")
    classes = all_logits.argmax(dim=1)
    correct = classes == split.labels
    return Predictions(classes=classes.cpu(), losses=losses.cpu(), correct=correct.cpu())


@torch.inference_mode()
def predict_policy(
    policy_net: PolicyNet, split: Split, *, normalisation: Normalisation, precision: str = "fp32"
) -> Tensor:
    """Logits [M, K] of the keep probabilities, on the CPU."""
    policy_net.eval()
    device = split.images.device
    logits = []
    for start in range(0, len(split), EVALUATION_BATCH):
        images = normalisation(split.images[start : start + EVALUATION_BATCH])
        with autocast(device, precision):
            logits.append(policy_net(images).float())
    return torch.cat(logits).cpu()
