"""Predictions for a whole split.

Shapes: M images of a split, K blocks, N classes, V policies.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.split import ImageSplit
from pipeline.data.transforms import Normalisation
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Networks
from pipeline.models.policy_net import PolicyNet, average_down
from pipeline.models.resnet import ResNet

EVALUATION_BATCH = 500  # images; bounds memory, results do not depend on it
EVALUATION_PIXELS = 500 * 96**2  # of all images of a batch: larger images come in smaller batches


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The result for each image, on the CPU."""

    classes: Tensor  # [M] int64, the predicted class
    losses: Tensor  # [M] float32, cross-entropy in nats
    correct: Tensor  # [M] bool

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions."""
        return float(self.correct.double().mean())


def predict(
    resnet: ResNet,
    split: ImageSplit,
    actions: Tensor | None = None,
    *,
    normalisation: Normalisation,
    policy_net: PolicyNet | None = None,
    precision: str = "fp32",
) -> Predictions:
    """Classify a split in evaluation mode under actions [M, K].

    Without actions the policy network decides, or every block runs if there is none. Beside actions a
    policy network matters only if it classifies, and so has a part in the answers.
    """
    networks = Networks(resnet=resnet, policy_net=policy_net, normalisation=normalisation)
    execute = make_executor(networks, precision=precision)
    logits = torch.cat(
        [
            execute(images, None if actions is None else actions[part]).logits
            for part, images in _in_parts(split)
        ]
    )
    losses = F.cross_entropy(logits, split.labels, reduction="none")
    classes = logits.argmax(dim=1)
    correct = classes == split.labels
    return Predictions(classes=classes.cpu(), losses=losses.cpu(), correct=correct.cpu())


def correct_under(
    resnet: ResNet,
    split: ImageSplit,
    policies: Tensor,
    *,
    normalisation: Normalisation,
    policy_net: PolicyNet | None = None,
) -> Tensor:
    """Whether each image is classified correctly under V policies [V, M, K]: [V, M] bool, on the CPU.

    `policy_net` is as for `predict`.
    """
    execute = make_executor(Networks(resnet=resnet, policy_net=policy_net, normalisation=normalisation))
    parts = []
    for part, images in _in_parts(split):
        logits = execute(images, policies[:, part]).logits
        parts.append((logits.argmax(dim=2) == split.labels[part]).cpu())
    return torch.cat(parts, dim=1)


def accuracies_of(correct: Tensor) -> list[float]:
    """The accuracy under each of V policies, from [V, M] bool."""
    return [float(row.double().mean()) for row in correct]


@torch.no_grad()
def predict_policy(
    policy_net: PolicyNet, split: ImageSplit, *, normalisation: Normalisation, precision: str = "fp32"
) -> Tensor:
    """Logits [M, K] of the keep probabilities, on the CPU."""
    outputs = policy_outputs(policy_net, split, normalisation=normalisation, precision=precision)
    return policy_net.decide(outputs).cpu()


@torch.no_grad()
def policy_outputs(
    policy_net: PolicyNet, split: ImageSplit, *, normalisation: Normalisation, precision: str = "fp32"
) -> Tensor:
    """What the policy network's ResNet gives: keep logits [M, K], or class logits [M, N]."""
    # a policy network is a ResNet as well, all of whose blocks run
    networks = Networks(resnet=policy_net.features, policy_net=None, normalisation=normalisation)
    execute = make_executor(networks, precision=precision)
    outputs = []
    for _, images in _in_parts(split):
        inputs = average_down(normalisation(images), policy_net.input_size)
        all_kept = torch.ones(len(inputs), networks.num_blocks, dtype=torch.bool, device=inputs.device)
        outputs.append(execute.classify(inputs, all_kept))
    return torch.cat(outputs)


def logits_under(
    resnet: ResNet,
    split: ImageSplit,
    policies: Tensor,
    *,
    normalisation: Normalisation,
    precision: str = "fp32",
) -> Tensor:
    """Logits [V, M, N] of the ResNet alone, with the same blocks [V, K] for all images."""
    networks = Networks(resnet=resnet, policy_net=None, normalisation=normalisation)
    execute = make_executor(networks, precision=precision)
    parts = []
    for _, images in _in_parts(split):
        for_all = policies[:, None].expand(-1, len(images), -1)  # [V, B, K]
        parts.append(execute(images, for_all).logits)
    return torch.cat(parts, dim=1)


def evaluation_batch(image_size: int) -> int:
    return max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // image_size**2))


def _in_parts(split: ImageSplit) -> Iterator[tuple[slice, Tensor]]:
    """All images, a batch at a time, each with its slice of the split."""
    size = evaluation_batch(split.image_size)
    starts = range(0, len(split), size)
    return zip((slice(s, s + size) for s in starts), split.iter_batches(size), strict=True)
