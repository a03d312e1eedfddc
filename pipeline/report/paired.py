"""Two networks compared on the same images: who is right more often, and how sure that is.

Shape: M images.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

FEW = 10  # pairs that differ: below, the exact test has to agree with the interval
LEVEL = 0.05


class Difference(NamedTuple):
    """Share of images on which the first network is right minus that of the second."""

    mean: float
    low: float  # the ends of a 95 % interval
    high: float
    only_first: int  # images on which it alone is right
    only_second: int

    @property
    def sign(self) -> int:
        """1 where the first is right more often, -1 where the second is, 0 where one can't tell.

        Where fewer than ten images differ, McNemar's test must find the same, in its exact form: were
        both as often right, each of these images would be a fair coin.
        """
        differing = self.only_first + self.only_second
        if 0 < differing < FEW and binomtest(self.only_first, differing).pvalue > LEVEL:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def paired_difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Difference:
    """Compare outcomes [M], whether a network is right on each image, with those of another network.

    The interval is Newcombe's for paired proportions by squaring and adding (1998, Statistics in
    Medicine 17:2635, method 10): the distances of the ends of two Wilson intervals, joined as those of
    correlated errors. It holds where few images differ, or none.

    Raises:
        ValueError: they are not of the same images.
    """
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} images can't be paired")
    count = len(first)
    right, other = int(first.sum()), int(second.sum())
    below, above = _reach(right, count)
    other_below, other_above = _reach(other, count)
    correlation = _correlation(first, second)
    mean = (right - other) / count
    return Difference(
        mean=mean,
        low=mean - _joined(below, other_above, correlation),
        high=mean + _joined(above, other_below, correlation),
        only_first=int((first & ~second).sum()),
        only_second=int((second & ~first).sum()),
    )


def wilson(right: int, count: int) -> tuple[float, float]:
    """The ends of Wilson's 95 % interval of a share: `right` of `count` (1927, JASA 22:209)."""
    interval = binomtest(right, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _reach(right: int, count: int) -> tuple[float, float]:
    """How far Wilson's interval goes below and above a share."""
    low, high = wilson(right, count)
    return right / count - low, high - right / count


def _correlation(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Of the outcomes, drawn towards 0 as Newcombe does it; 0 where one of them never varies."""
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    product = float(both * neither) - int((first & ~second).sum()) * int((second & ~first).sum())
    if product > 0:
        product = max(product - len(first) / 2, 0)
    margins = [int(part.sum()) for part in (first, ~first, second, ~second)]
    return product / float(np.sqrt(np.prod(margins, dtype=float))) if min(margins) else 0.0


def _joined(one: float, other: float, correlation: float) -> float:
    return float(np.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2)))
