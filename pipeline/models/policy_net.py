"""The policy network: one look at the image, one keep probability for every block.

Shapes: B images, K blocks, N classes, H and W pixels.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.architectures import Family
from pipeline.models.build import make_resnet
from pipeline.models.path_values import PathValues


def average_down(images: Tensor, size: int | None) -> Tensor:
    """[B, 3, H, W] to [B, 3, size, size] by averages over areas; None leaves them as they are."""
    if size is None or images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="area")


class PolicyNet(nn.Module):
    """A small ResNet that decides which blocks run.

    In the paper (section 3) its K outputs are the logits of the keep probabilities s. With `path_values`
    it is a classifier: its N outputs are class logits, from which the decisions are computed.

    Args:
        num_blocks: K of the ResNet that it steers.
        depth: 6n+2; the authors' is 8 (one block a stage). For ImageNet theirs is 10 of that family.
        width: channels of its first stage; the authors' is 16, and 64 for ImageNet.
        input_size: side in pixels that images are averaged down to before they are looked at (the
            authors halve ImageNet's 224 so); None takes them as they are.
        family: of the small ResNet, `cifar` or `imagenet`.
        initial_keep_prob: what every keep probability starts near, by the bias of the last layer; of no
            use with `path_values`.
        path_values: how class logits become decisions; None: as in the paper.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        depth: int = 8,
        width: int = 16,
        input_size: int | None = None,
        family: Family = "cifar",
        initial_keep_prob: float = 0.5,
        path_values: PathValues | None = None,
    ) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.input_size = input_size
        self.path_values = path_values
        outputs = num_blocks if path_values is None else path_values.num_classes
        self.features = make_resnet(family=family, depth=depth, width=width, num_classes=outputs)
        if path_values is None:
            odds = initial_keep_prob / (1 - initial_keep_prob)
            nn.init.constant_(self.features.fc.bias, math.log(odds))

    @property
    def answers(self) -> bool:
        """Whether its own class stands for an image of which it keeps no block."""
        return self.path_values is not None and self.path_values.answers

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of the keep probabilities for images [B, 3, H, W]."""
        return self.decide(self.features(average_down(images, self.input_size)))

    def decide(self, outputs: Tensor) -> Tensor:
        """Logits [B, K] of the keep probabilities, from what `features` gives, [B, K] or [B, N]."""
        return outputs if self.path_values is None else self.path_values(outputs)
