"""Prepared images on the device: one uint8 tensor a split, normalised and augmented there.

Images that do not fit into the memory come as batches of the same kind (`Images`; streaming.py).

Shapes: B images of a batch, M images of a split, H and W pixels. Images are [.., H, W, 3] uint8 at
rest and [.., 3, H, W] float (channels_last) when a network sees them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class Pictures(Protocol):
    """Images by their rows: an array [M, H, W, 3] is one."""

    def __getitem__(self, row: int, /) -> NDArray[np.uint8]:
        """[H, W, 3]."""


class Images(Protocol):
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

    def in_order(self, size: int) -> Iterator[Tensor]:
        """All images without augmentation, `size` at a time."""

    def some(self, count: int) -> "Split":
        """Images to measure times with: `count` of them, or all that are at hand anyway."""

    def pictures(self) -> Pictures:
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

    def in_order(self, size: int) -> Iterator[Tensor]:
        """All images, `size` at a time."""
        return iter(self.images.split(size))

    def some(self, count: int) -> "Split":
        """All of them: they are at hand."""
        return self

    def pictures(self) -> NDArray[np.uint8]:
        """[M, H, W, 3]."""
        return self.images.cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """(pixel / 255 - mean) / std for each channel; mean and std are shares of full brightness."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def scale_and_shift(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Two times [3]: one multiply-add a pixel, pixel * scale + shift, is all of it.

        The same tensors at every call: a copy to the device would be a wait in every step, and is not
        allowed while a CUDA graph is captured.
        """
        if torch.compiler.is_compiling():  # what a trace makes is no tensor to keep
            return _scale_and_shift.__wrapped__(self, device)
        return _scale_and_shift(self, device or torch.device("cpu"))

    def __call__(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 to [B, 3, H, W] float32 in channels_last memory."""
        return scaled(images, *self.scale_and_shift(images.device))


@cache  # and never dropped: CUDA graphs read these addresses
def _scale_and_shift(own: Normalisation, device: torch.device | None) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(own.mean, device=device)
    std = torch.tensor(own.std, device=device)
    return 1 / (255 * std), -mean / std


def scaled(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float32 in channels_last memory, by [3] and [3]."""
    return (images.float() * scale + shift).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop after padding with black, and random mirror, as the authors use for CIFAR.

    Attributes:
        crop_padding: pixels added on each side before a crop of the old size.
        flip: whether half of the images are mirrored left to right.
    """

    crop_padding: int
    flip: bool

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The random part for `count` images: [count, 3] int64, crop row, crop column, mirrored."""
        offsets = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=generator)
        mirrored = torch.randint(2, (count, 1), generator=generator) * int(self.flip)
        return torch.cat([offsets, mirrored], dim=1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Augment [B, H, W, 3] uint8 by `drawn` [B, 3]; same shape and type out."""
        if not self.crop_padding and not self.flip:
            return images
        batch, height, width, _ = images.shape
        pad = self.crop_padding
        padded = F.pad(images, (0, 0, pad, pad, pad, pad))
        ys = drawn[:, 0:1] + torch.arange(height, device=images.device)  # [B, H]
        xs = torch.arange(width, device=images.device).expand(batch, width)
        xs = drawn[:, 1:2] + torch.where(drawn[:, 2:3].bool(), width - 1 - xs, xs)  # [B, W]
        every = torch.arange(batch, device=images.device)[:, None, None]
        return padded[every, ys[:, :, None], xs[:, None, :]]


@dataclass(frozen=True, kw_only=True)
class SeededCrop:
    """A crop of random area, place and proportions, scaled to the image size, as for ImageNet.

    streaming.py applies it by torchvision's RandomResizedCrop to images as they are decoded.

    Attributes:
        flip: whether half of the images are mirrored left to right.
    """

    flip: bool

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The random part for `count` images: [count, 1] int64, a seed for each."""
        return torch.randint(2**62, (count, 1), generator=generator)


AnyAugmentation = Augmentation | SeededCrop


def batches(order: Tensor, batch_size: int) -> Sequence[Tensor]:
    """Split indices [M] into ceil(M / batch_size) batches of nearly equal size.

    A short last batch would count as much as a full one in the optimiser and spoil the batch
    statistics; this way sizes differ by one at most.
    """
    return torch.tensor_split(order, max(1, -(-len(order) // batch_size)))
