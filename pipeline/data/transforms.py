"""Prepared images on the device: one uint8 tensor a split, normalised and augmented there.

Images that do not fit into the memory come as batches of the same kind (`Images`; streaming.py).

Shapes: B images of a batch, M images of a split, H and W pixels. Images are [.., H, W, 3] uint8 at
rest and [.., 3, H, W] float (channels_last) when a network sees them.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


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
