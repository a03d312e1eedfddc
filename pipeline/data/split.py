"""Prepared images on the device: one uint8 tensor a split, normalised and augmented there.

Images that do not fit into the memory come as batches of the same kind (`Images`; streaming.py).

Shapes: B images of a batch, M images of a split, H and W pixels. Images are [.., H, W, 3] uint8 at
rest and [.., 3, H, W] float (channels_last) when a network sees them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.transforms import AnyAugmentation, Augmentation


class ImageArray(Protocol):
    """Images by their rows: an array [M, H, W, 3] is one."""

    def __getitem__(self, row: int, /) -> NDArray[np.uint8]:
        """[H, W, 3]."""


class ImageSplit(Protocol):
    """One split of a data set, as training, prediction and evaluation see it."""

    @property
    def labels(self) -> Tensor:
        """[M] int64, on the device."""

    @property
    def image_size(self) -> int:
        """Side of the (square) images in pixels."""

    @property
    def device(self) -> torch.device:
        """Where labels and batches are."""

    def __len__(self) -> int:
        """M."""

    def batches(
        self,
        parts: Sequence[Tensor],
        augmentation: "AnyAugmentation | None" = None,
        drawn: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """For each part, the images of its rows, [B, H, W, 3] uint8.

        Args:
            drawn: what `augmentation` drew, a row for each image of the split.
        """

    def iter_batches(self, size: int) -> Iterator[Tensor]:
        """All images without augmentation, `size` at a time."""

    def subset(self, count: int) -> "Split":
        """Images to measure times with: `count` of them, or all that are at hand anyway."""

    def image_array(self) -> ImageArray:
        """The images for figures."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a data set, on one device.

    Attributes:
        images: [M, H, W, 3] uint8.
        labels: [M] int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """Side of the (square) images in pixels."""
        return self.images.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def batches(
        self,
        parts: Sequence[Tensor],
        augmentation: "AnyAugmentation | None" = None,
        drawn: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """For each part, the images of its rows, [B, H, W, 3] uint8."""
        drawn = None if drawn is None else drawn.to(self.device)
        for rows in parts:
            if augmentation is None:
                yield self.images[rows]
                continue
            assert isinstance(augmentation, Augmentation)
            assert drawn is not None
            yield augmentation(self.images[rows], drawn[rows])

    def iter_batches(self, size: int) -> Iterator[Tensor]:
        """All images, `size` at a time."""
        return iter(self.images.split(size))

    def subset(self, count: int) -> "Split":
        """All of them: they are at hand."""
        return self

    def image_array(self) -> NDArray[np.uint8]:
        """[M, H, W, 3]."""
        return self.images.cpu().numpy()


def batches(order: Tensor, batch_size: int) -> Sequence[Tensor]:
    """Split indices [M] into ceil(M / batch_size) batches of nearly equal size.

    A short last batch would count as much as a full one in the optimiser and spoil the batch
    statistics; this way sizes differ by one at most.
    """
    return torch.tensor_split(order, max(1, -(-len(order) // batch_size)))
