"""For Python users: a checkpoint folder and one image of any kind to a prediction (docs/python.md).

Apart from the predictor, because a served model needs nothing that reads image files.

Shapes: H and W pixels, S the side of the networks' images.
"""

from os import PathLike
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.image_io import BILINEAR
from pipeline.device import choose_device
from pipeline.models import checkpoint
from pipeline.serving.predictor import Prediction, PredictionError, Predictor
from pipeline.sources.image_folder import read_image


class ImageClassifier(Predictor):
    """A predictor that opens checkpoints, and scales images to the networks' size itself."""

    @classmethod
    def load(cls, folder: str | PathLike[str], *, device: torch.device | None = None) -> Self:
        """The predictor of a checkpoint folder: `pretrained/finetune`, `models/finetune`.

        Args:
            device: None: a CUDA device if there is one (BLOCKDROP_DEVICE), else the CPU.

        Raises:
            CheckpointError: the folder holds no checkpoint, a damaged one, or none with a ResNet.
        """
        return cls(checkpoint.load(Path(folder)), device=device or choose_device())

    def classify(
        self,
        image: str | PathLike[str] | Image.Image | NDArray[np.uint8],
        *,
        gamma: float | None = None,
        budget: float | None = None,
    ) -> Prediction:
        """The prediction for one image, of any size: its middle square is scaled to the networks' size.

        Args:
            image: a file, a PIL image, or an array [H, W, 3] or [H, W] of uint8.
            gamma, budget: as of `gamma_of`.

        Raises:
            DataError: the file can't be read as an image.
            PredictionError: the image is of a type that is refused, or there is no such gamma or budget.
        """
        gamma = self.gamma_of(gamma=gamma, budget=budget)
        (prediction,) = self(self._scaled(image)[None], gamma=gamma)
        return prediction

    def _scaled(self, image: str | PathLike[str] | Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An image as an array [S, S, 3], cropped and scaled as the source `imagefolder` does it."""
        if isinstance(image, str | PathLike):
            return read_image(Path(image), self.image_size)
        if not isinstance(image, Image.Image):
            pixels = np.asarray(image)
            if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.shape[2:] == (3,)):
                raise PredictionError(
                    f"the image is {pixels.dtype} {pixels.shape}, expected a file, a PIL image, or an "
                    "array [H, W, 3] or [H, W] of uint8, colours 0 to 255; call the predictor itself "
                    "for a batch"
                )
            image = Image.fromarray(pixels)
        if image.mode not in ("1", "L", "RGB"):  # alpha, floats, 16 bits: PIL would drop, clip or wrap
            raise PredictionError(
                f"the PIL image's mode is {image.mode}; give image.convert('RGB'), or the file's path"
            )
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (self.image_size,) * 2, BILINEAR))
