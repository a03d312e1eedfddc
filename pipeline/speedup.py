"""Timing contestants fairly, and what may be claimed from it.

Shapes: B images of a batch, K blocks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_ROUNDS = 5  # below, no interval means anything
WIDEST_INTERVAL = 0.2  # of the speed-up itself: beyond, no number is claimed
RESAMPLES = 1000
Times = NDArray[np.float64]  # seconds of each round
Row = dict[str, Any]


def speedup(rival: Times, own: Times, *, seed: int = 0) -> Row:
    """How many times as fast `own` is, as a ratio of medians with a 95 % interval over rounds.

    `reliable` is false when the rounds are too few or the interval too wide to claim the number.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(own), (RESAMPLES, len(own)))  # the same rounds of both: they are pairs
    ratios = np.median(rival[rows], axis=1) / np.median(own[rows], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    ratio = float(np.median(rival) / np.median(own))
    return {
        "speedup": ratio,
        "speedup_low": float(low),
        "speedup_high": float(high),
        "reliable": bool(len(own) >= MIN_ROUNDS and high - low <= WIDEST_INTERVAL * ratio),
    }


def claim(row: Mapping[str, Any]) -> str:
    """What may be said of a speed-up: `number`, only `faster` or `slower`, or, of noise, nothing."""
    if row["reliable"]:
        return "number"
    if not row.get("agrees", True):
        return ""
    return "faster" if row["speedup_low"] > 1 else "slower" if row["speedup_high"] < 1 else ""


def in_words(row: Mapping[str, Any]) -> str:
    """The same as a phrase: `1.65 times as fast (95 % interval ...)`, or what a wide interval allows."""
    low, high = row["speedup_low"], row["speedup_high"]
    return {
        "number": f"{row['speedup']:.2f} times as fast (95 % interval {low:.2f} to {high:.2f})",
        "faster": f"faster, by between {low:.2f} and {high:.2f} times",
        "slower": f"slower, by between {1 / high:.2f} and {1 / low:.2f} times",
        "": "too noisy to compare",
    }[claim(row)]
