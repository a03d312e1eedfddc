"""scikit-learn's digits: small real images that need no download."""

import numpy as np
from PIL import Image

from pipeline.data.dataset import Arrays, Dataset, split_by_seed
from pipeline.data.image_io import BILINEAR
from pipeline.data.metadata import SplitName


def digits(*, image_size: int, shares: dict[SplitName, float], seed: int) -> Dataset:
    """scikit-learn's 1,797 real 8x8 scans of digits, enlarged to `image_size`, grey as RGB."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    scans = np.rint(loaded.images * (255 / 16)).astype(np.uint8)  # [M, 8, 8], from 17 levels of grey
    size = (image_size, image_size)
    grey = np.stack([np.asarray(Image.fromarray(scan).resize(size, BILINEAR)) for scan in scans])
    images = np.repeat(grey[..., None], 3, axis=3)  # [M, H, W, 3]
    arrays = Arrays(images=images, labels=loaded.target.astype(np.int64))
    return Dataset(
        source="digits",
        classes=tuple(str(digit) for digit in loaded.target_names),
        splits=split_by_seed(arrays, shares=shares, seed=seed),
    )
