"""The classification loss with the full network's class probabilities in the targets.

Shapes: B images of a batch, K blocks, N classes.
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


def soft_targets(labels: Tensor, teacher_logits: Tensor, teacher_weight: float) -> Tensor:
    """Targets: the teacher's class probabilities by `teacher_weight`, the rest on the label.

    Hinton et al. 2015 (arXiv 1503.02531) at temperature 1. [B] and [B, N] to [B, N].
    """
    one_hot = F.one_hot(labels, teacher_logits.shape[1]).float()
    return torch.lerp(one_hot, torch.softmax(teacher_logits.float(), dim=1), teacher_weight)


class Distillation:
    """The classification loss, with a teacher's class probabilities in the targets.

    Args:
        teacher: the network to learn from, as it is now: later changes of its weights are not seen,
            so it may be the very network that is about to be finetuned. Every block of it runs.
        teacher_weight: of the teacher in the targets; 0: labels alone, and no teacher is kept.
    """

    def __init__(
        self, teacher: ResNet, *, teacher_weight: float, normalisation: Normalisation, precision: str
    ) -> None:
        networks = Networks(resnet=copy.deepcopy(teacher), policy_net=None, normalisation=normalisation)
        self.teacher_weight = teacher_weight
        self.teacher = make_executor(networks, precision=precision) if teacher_weight else None
        self.num_blocks = teacher.num_blocks

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Each image's loss [B]: the divergence KL(targets, softmax(logits)), 0 at best.

        With labels alone that is the cross-entropy.
        """
        if self.teacher is None:
            return F.cross_entropy(logits, batch.labels, reduction="none")
        all_blocks = torch.ones(len(logits), self.num_blocks, dtype=torch.bool, device=logits.device)
        teacher_logits = self.teacher.classify(batch.images, all_blocks)  # [B, N]
        targets = soft_targets(batch.labels, teacher_logits, self.teacher_weight)  # [B, N]
        return F.kl_div(F.log_softmax(logits, dim=1), targets, reduction="none").sum(dim=1)
