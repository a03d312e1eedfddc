"""Intervals for differences that are measured on the same images. Shape: M images."""

import numpy as np
from numpy.typing import NDArray


def paired_difference(
    first: NDArray[np.bool_], second: NDArray[np.bool_], *, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean of `first` minus mean of `second`, with a 95 % bootstrap interval.

    Images are drawn with both of their outcomes, so what two networks get wrong alike cancels out. Only
    how often the outcomes differ matters, so the counts are drawn and not the images themselves.

    Args:
        first: [M], whether one network is right on each image.
        second: [M], whether the other one is.

    Raises:
        ValueError: they are not of the same images.
    """
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} images can't be paired")
    count = len(first)
    differences = first.astype(np.int64) - second.astype(np.int64)
    shares = [(differences == value).mean() for value in (1, -1, 0)]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / count, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)
