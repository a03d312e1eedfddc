"""The ResNet of joint finetuning: run as it is deployed, or trained beside the policy.

Shapes: B images of a batch, K blocks, N classes.
"""

import torch
from torch import Tensor

from pipeline.device import autocast
from pipeline.models.resnet import ResNet
from pipeline.policy.gates import forward_with_gates
from pipeline.training.distillation import Distillation
from pipeline.training.loop import Batch
from pipeline.training.optim import backward


class TrainedResNet:
    """A ResNet that learns from the classification loss, with weight 1 beside the policy's loss.

    So do the authors in their finetuning. A training pass runs a block on the images that keep it, whose
    batch statistics it takes. With a teacher the losses lack the targets' own entropy (`Distillation`).
    """

    def __init__(self, resnet: ResNet, *, distillation: Distillation, precision: str) -> None:
        self.resnet = resnet
        self.distillation = distillation
        self.precision = precision

    @torch.no_grad()
    def classify(self, images: Tensor, actions: Tensor) -> Tensor:
        """Logits [B, N] of the network as it is deployed; no batch statistic moves."""
        self.resnet.eval()
        with autocast(images.device, self.precision):
            return self.resnet(images, actions).float()

    def learn(self, batch: Batch, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the gradients of the mean loss under the actions; logits [B, N] and losses [B]."""
        self.resnet.train()
        with autocast(batch.images.device, self.precision):
            logits = self.resnet(batch.images, actions)
        return self._backward(logits.float(), batch)

    def learn_with_gates(
        self, batch: Batch, actions: Tensor, *, try_dropped: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `learn`, and from the same backward pass each image's gradient in its gates, [B, K]."""
        self.resnet.train()
        with autocast(batch.images.device, self.precision):
            logits, gates = forward_with_gates(
                self.resnet, batch.images, actions, try_dropped=try_dropped
            )
        logits, losses = self._backward(logits.float(), batch)
        # no gradient at all where no block ran, neither here nor for an image of this process
        gradient = torch.zeros_like(gates) if gates.grad is None else gates.grad
        # what was differentiated is a weighted mean over the batch: back to each image's own loss
        return logits, losses, gradient * (len(losses) / (batch.weight or 1.0))

    def _backward(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = self.distillation(logits, batch)  # [B]
        backward(losses.mean(), batch)
        return logits.detach(), losses.detach()
