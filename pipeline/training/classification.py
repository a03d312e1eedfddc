"""Learning to classify without a policy: pretraining, and finetuning under a static rule.

Shapes: B images of a batch, M images of a split, K blocks, N classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.split import ImageSplit
from pipeline.data.transforms import Normalisation
from pipeline.device import autocast, generator
from pipeline.inference.predict import predict
from pipeline.models.resnet import ResNet
from pipeline.training.distillation import Distillation
from pipeline.training.loop import Batch, Metrics
from pipeline.training.optim import backward, optimizer_step


class Classification:
    """Cross-entropy training of a ResNet that runs every block, or those that a fixed rule keeps.

    Under a rule a block learns, weights and batch statistics alike, from the images that run it; a
    block that no image of a batch runs is left as it is, weight decay included.

    Args:
        rule: noise [B, K] in [0, 1) to actions [B, K] bool; None: every block runs (pretraining).
        distillation: the loss in place of the cross-entropy, if any.
    """

    def __init__(
        self,
        resnet: ResNet,
        *,
        optimizer: torch.optim.Optimizer,
        normalisation: Normalisation,
        precision: str,
        label_smoothing: float = 0.0,
        rule: Callable[[Tensor], Tensor] | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        self.modules: dict[str, nn.Module] = {"resnet": resnet}
        self.distillation = distillation
        self.resnet = resnet
        self.optimizer = optimizer
        self.normalisation = normalisation
        self.precision = precision
        self.label_smoothing = label_smoothing
        self.rule = rule
        self.noise_columns = 0 if rule is None else resnet.num_blocks

    def begin_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step on the mean cross-entropy of the batch."""
        self.resnet.train()
        with autocast(batch.images.device, self.precision):
            logits = self.resnet(batch.images, self._actions(batch.noise))
        logits = logits.float()  # [B, N]
        if self.distillation is None:
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        else:
            loss = self.distillation(logits, batch).mean()
        self.optimizer.zero_grad()
        backward(loss, batch)
        optimizer_step(self.optimizer)
        correct = logits.argmax(dim=1) == batch.labels
        return {"loss": loss.detach(), "accuracy": correct.float().mean()}

    def validate(self, split: ImageSplit) -> Metrics:
        """Loss and accuracy with the blocks that run; what a rule draws is the same at every call."""
        noise = torch.rand(len(split), self.noise_columns, generator=generator("validation"))  # [M, K]
        actions = self._actions(noise)
        predictions = predict(
            self.resnet, split, actions, normalisation=self.normalisation, precision=self.precision
        )
        return {"loss": float(predictions.losses.mean()), "accuracy": predictions.accuracy}

    def _actions(self, noise: Tensor) -> Tensor | None:
        return None if self.rule is None else self.rule(noise)
