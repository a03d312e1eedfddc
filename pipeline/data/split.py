"""One split of a data set: its images by batches, and its labels.

`ImageSplit` is what training, prediction and evaluation take. `Split` holds all images in one tensor on
the device; `StreamedSplit` (streaming.py) decodes images that do not fit into the memory.

Shapes: B images of a batch, M images of a split, H and W pixels.
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
    """Images that are read by row number: an array [M, H, W, 3] is one."""

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
        augmentation: AnyAugmentation | None = None,
        augmentation_state: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The images of each part's rows, [B, H, W, 3] uint8.

        Args:
            parts: row numbers [B] of each batch.
            augmentation_state: what `augmentation.draw` gave for the whole split [M, ..].
        """

    def iter_batches(self, size: int) -> Iterator[Tensor]:
        """All images without augmentation, `size` at a time."""

    def subset(self, count: int) -> "Split":
        """Images to time inference on: `count` of them, or all of a split that is in memory."""

    def image_array(self) -> ImageArray:
        """The images for figures."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a data set, on one device."""

    images: Tensor  # [M, H, W, 3] uint8
    labels: Tensor  # [M] int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        return self.images.shape[1]

    @property
    def device(self) -> torch.device:
        return self.images.device

    def batches(
        self,
        parts: Sequence[Tensor],
        augmentation: AnyAugmentation | None = None,
        augmentation_state: Tensor | None = None,
    ) -> Iterator[Tensor]:
        state = None if augmentation_state is None else augmentation_state.to(self.device)
        for rows in parts:
            if augmentation is None:
                yield self.images[rows]
                continue
            assert isinstance(augmentation, Augmentation)
            assert state is not None
            yield augmentation(self.images[rows], state[rows])

    def iter_batches(self, size: int) -> Iterator[Tensor]:
        return iter(self.images.split(size))

    def subset(self, count: int) -> "Split":
        """All of them, as they are in memory."""
        return self

    def image_array(self) -> NDArray[np.uint8]:
        return self.images.cpu().numpy()


def batches(order: Tensor, batch_size: int) -> Sequence[Tensor]:
    """Split indices [M] into ceil(M / batch_size) batches of nearly equal size.

    A short last batch would count as much as a full one in the optimiser and spoil the batch
    statistics; this way sizes differ by one at most.
    """
    return torch.tensor_split(order, max(1, -(-len(order) // batch_size)))
