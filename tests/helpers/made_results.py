"""What the benchmark of a made-up experiment found, and outcomes on its test images."""

import numpy as np
from numpy.typing import NDArray

from pipeline.results import Answer, BesideSole, Speedup, Timing, TimingRow, Winner

MACHINE = {"device": "CPU, 2 threads, torch 2.14.0", "processor": "Some CPU", "threads": 2}
FASTER = Speedup(ratio=1.65, low=1.5, high=1.7, reliable=True)
BESIDE_20 = Speedup(ratio=1.25, low=1.2, high=1.3, reliable=True)
BESIDE_14 = Speedup(ratio=0.75, low=0.7, high=0.8, reliable=True)
WINNER = Winner(
    executor="native", milliseconds=2.0, full_milliseconds=3.3, speedup=FASTER, ideal=1.8,
    share_of_ideal=0.9, faster_than="ResNet-20", break_even_many=0.8,
    sole={
        "ResNet-20": BesideSole(milliseconds=2.5, speedup=BESIDE_20),
        "ResNet-14": BesideSole(milliseconds=1.5, speedup=BESIDE_14),
    },
)  # fmt: skip
ANSWER = Answer(batch=32, precision="fp32", full_form="fused", full_precision="fp32", winner=WINNER)
TIMING = Timing(milliseconds=2, milliseconds_25=2, milliseconds_75=2, images_per_second=16_000, rounds=5)
TIMED = TimingRow(
    candidate="native", kind="blockdrop", precision="fp32", batch=32, time=TIMING, speedup=FASTER
)


def correctness(count_correct: int, count: int = 1000, shift: int = 0) -> NDArray[np.bool_]:
    """Whether a network is correct on each image: on the first ones, moved by `shift`."""
    return np.roll(np.arange(count) < count_correct, shift)
