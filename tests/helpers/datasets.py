"""What several test modules make: datasets."""

import numpy as np

from pipeline.data.dataset import Arrays, Dataset
from pipeline.data.metadata import SPLITS

REMEDY = "`make repro` makes it anew, and takes a damaged copy out of DVC's cache"


def numbered(count: int) -> Arrays:
    """Images that all differ, with their number as label."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    return Arrays(images=images, labels=np.arange(count))


def dataset() -> Dataset:
    draw = np.random.default_rng(0)
    counts = zip(SPLITS, (6, 3, 4), strict=True)
    return Dataset(
        source="made up",
        classes=("cat", "hält"),
        splits={
            name: Arrays(
                images=draw.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8),
                labels=np.arange(count) % 2,
            )
            for name, count in counts
        },
    )
