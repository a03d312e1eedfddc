"""What the networks give in fp32, layer by layer, as they were trained: executors must give the same.

Shapes: B images of a batch, C checked images, M test images of H by W pixels, K blocks, N classes.
"""

import torch
from torch import Tensor

from pipeline.inference.auto import make_executor
from pipeline.inference.base import Networks
from pipeline.inference.masked import Masked
from pipeline.inference.predict import evaluation_batch
from pipeline.results import Agreement

# of the decisions, and of the classes: bf16 turns some close ones
AGREEMENT = {"fp32": 0.999, "bf16": 0.97}
CHECKED = 256  # images at most on which results are compared; fewer where they are large


def checked_images(image_size: int, largest_batch: int = 1) -> int:
    """On how many images results are compared."""
    return max(min(CHECKED, evaluation_batch(image_size)), largest_batch)


class Reference:
    """The decisions on all images [M, H, W, 3] uint8, and the classes of some."""

    @torch.no_grad()
    def __init__(self, networks: Networks, images: Tensor, *, checked: int) -> None:
        self.execute = make_executor(networks, name=Masked.name)
        parts = images.split(evaluation_batch(images.shape[1]))
        decided = [self.execute._decide(networks.normalisation(part)) for part in parts]
        self.actions = torch.cat(decided).cpu()  # [M, K]
        rows = torch.arange(checked) % len(images)
        self.images = images[rows.to(images.device)]  # [C, H, W, 3]
        self.checked = self.actions[rows].to(images.device)  # [C, K]
        self.classes = self._classes(self.images, self.checked)  # [C]

    def agreement(self, actions: Tensor, logits: Tensor, precision: str) -> Agreement:
        """Compare decisions [B, K] and logits [B, N] on the first checked images.

        Classes are compared under these decisions, because where a block is a close decision two
        roundings may decide it differently, and the class is then another network's. So an executor
        that asks no policy network shows in the decisions, one that runs other blocks than it says in
        the classes.
        """
        count = min(len(actions), len(self.checked))  # the last batch may go beyond them
        actions, logits = actions[:count], logits[:count]
        same = actions == self.checked[:count]  # [B, K]
        classes = self.classes[:count].clone()  # [B]
        differing = ~same.all(dim=1)
        if differing.any():
            classes[differing] = self._classes(self.images[:count][differing], actions[differing])
        decisions = float(same.double().mean())
        same_classes = float((logits.argmax(dim=1) == classes).double().mean())
        agrees = min(decisions, same_classes) >= AGREEMENT[precision]
        return Agreement(decisions=decisions, classes=same_classes, agrees=agrees)

    def _classes(self, images: Tensor, actions: Tensor) -> Tensor:
        size = evaluation_batch(images.shape[1])
        parts = zip(images.split(size), actions.split(size), strict=True)
        logits = [self.execute(images_part, actions_part).logits for images_part, actions_part in parts]
        return torch.cat(logits).argmax(dim=1)
