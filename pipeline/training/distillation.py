"""The one training loop, and pretraining as the simplest thing that it can train. No I/O here.

Everything random in an epoch is drawn when the epoch starts, as one table with a row for each image,
from (seed, stage, epoch) alone. So what happens to an image depends neither on the batch it is in nor
on the device, and a run that is resumed after any step goes on exactly as it would have.

Shapes: B images of a batch, M images of a split, K blocks, N classes.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.transforms import Normalisation
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Networks
from pipeline.models.resnet import ResNet
from pipeline.training.loop import Batch


def soft_targets(labels: Tensor, teacher_logits: Tensor, share: float) -> Tensor:
    """Distillation targets: `share` of the teacher's class probabilities, the rest on the label.

    Hinton et al. 2015 (arXiv 1503.02531) at temperature 1. [B] and [B, N] to [B, N].
    """
    one_hot = F.one_hot(labels, teacher_logits.shape[1]).float()
    return torch.lerp(one_hot, torch.softmax(teacher_logits.float(), dim=1), share)


class Distillation:
    """The classification loss, with a share of a teacher's class probabilities in the targets.

    Args:
        teacher: the network to learn from, as it is now: later changes of its weights are not seen,
            so it may be the very network that is about to be finetuned. Every block of it runs.
        share: of the teacher in the targets; 0: labels alone, and no teacher is kept.
    """

    def __init__(
        self, teacher: ResNet, *, share: float, normalisation: Normalisation, precision: str
    ) -> None:
        networks = Networks(resnet=copy.deepcopy(teacher), policy_net=None, normalisation=normalisation)
        self.share = share
        self.teacher = make_executor(networks, precision=precision) if share else None
        self.num_blocks = teacher.num_blocks

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Each image's loss [B]: the divergence KL(targets, softmax(logits)), 0 at best.

        With labels alone that is the cross-entropy.
        """
        if self.teacher is None:
            return F.cross_entropy(logits, batch.labels, reduction="none")
        every = torch.ones(len(logits), self.num_blocks, dtype=torch.bool, device=logits.device)
        targets = soft_targets(batch.labels, self.teacher.classify(batch.images, every), self.share)
        return F.kl_div(F.log_softmax(logits, dim=1), targets, reduction="none").sum(dim=1)
