"""What happens to images on their way from a split into a network: augmentation, then normalisation.

Shapes: B images of a batch, H and W pixels. Images are [B, H, W, 3] uint8 until normalised, and then
[B, 3, H, W] float (channels_last), as networks take them.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """(pixel / 255 - mean) / std for each channel; mean and std are fractions of full brightness."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def scale_and_shift(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Scale [3] and shift [3]: a normalised pixel is pixel * scale + shift.

        The same tensors at every call: a copy to the device would make every step wait, and is not
        allowed while a CUDA graph is captured.
        """
        if torch.compiler.is_compiling():  # a tensor made in a trace can't be cached
            return _scale_and_shift.__wrapped__(self, device)
        return _scale_and_shift(self, device or torch.device("cpu"))

    def __call__(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 to [B, 3, H, W] float32 in channels_last memory."""
        return scaled(images, *self.scale_and_shift(images.device))


@cache  # never emptied: CUDA graphs read these addresses
def _scale_and_shift(normalisation: Normalisation, device: torch.device | None) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(normalisation.mean, device=device)
    std = torch.tensor(normalisation.std, device=device)
    return 1 / (255 * std), -mean / std


def scaled(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float32 in channels_last memory, by [3] and [3]."""
    return (images.float() * scale + shift).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop after padding with black, and random horizontal flip, as the authors use for CIFAR."""

    crop_padding: int  # pixels added on each side before a crop of the old size
    flip: bool  # whether half of the images are mirrored left to right

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The augmentation state of `count` images [count, 3] int64: crop row, crop column, mirrored."""
        offsets = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=generator)
        mirrored = torch.randint(2, (count, 1), generator=generator) * int(self.flip)
        return torch.cat([offsets, mirrored], dim=1)

    def __call__(self, images: Tensor, state: Tensor) -> Tensor:
        """Augment [B, H, W, 3] uint8 by a state [B, 3]; same shape and type out."""
        if not self.crop_padding and not self.flip:
            return images
        batch, height, width, _ = images.shape
        pad = self.crop_padding
        padded = F.pad(images, (0, 0, pad, pad, pad, pad))  # [B, H + 2 pad, W + 2 pad, 3]
        # crop and flip in one gather: the source row and column of each pixel of the result
        ys = state[:, 0:1] + torch.arange(height, device=images.device)  # [B, H]
        xs = torch.arange(width, device=images.device).expand(batch, width)  # [B, W]
        xs = state[:, 1:2] + torch.where(state[:, 2:3].bool(), width - 1 - xs, xs)  # [B, W]
        image = torch.arange(batch, device=images.device)[:, None, None]  # [B, 1, 1]
        return padded[image, ys[:, :, None], xs[:, None, :]]  # [B, H, W, 3]


@dataclass(frozen=True, kw_only=True)
class SeededCrop:
    """A crop of random area, position and aspect ratio, resized to the image size, as for ImageNet.

    streaming.py applies it, by torchvision's RandomResizedCrop, when it decodes an image.
    """

    flip: bool  # whether half of the images are mirrored left to right

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The augmentation state of `count` images: [count, 1] int64, a seed for each."""
        return torch.randint(2**62, (count, 1), generator=generator)


AnyAugmentation = Augmentation | SeededCrop
