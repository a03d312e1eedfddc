"""Where images come from: scikit-learn's digits, CIFAR-10 and CIFAR-100, folders of images.

Shapes: M images, H and W pixels.
"""

import numpy as np
from PIL import Image

from pipeline.data.dataset import Arrays, Dataset, split_by_seed
from pipeline.data.metadata import SplitName
from pipeline.sources.cifar import BILINEAR


def digits(*, image_size: int, shares: dict[SplitName, float], seed: int) -> Dataset:
    """scikit-learn's 1,797 real 8x8 scans of digits, enlarged to `image_size`, grey as RGB."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    small = np.rint(loaded.images * (255 / 16)).astype(np.uint8)  # 17 levels of grey
    grey = [np.asarray(Image.fromarray(s).resize((image_size,) * 2, BILINEAR)) for s in small]
    images = np.repeat(np.stack(grey)[..., None], 3, axis=3)
    arrays = Arrays(images=images, labels=loaded.target.astype(np.int64))
    return Dataset(
        source="digits",
        classes=tuple(str(digit) for digit in loaded.target_names),
        splits=split_by_seed(arrays, shares=shares, seed=seed),
    )
