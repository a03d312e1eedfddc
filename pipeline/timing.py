"""Timing contestants fairly, and what may be claimed from it.

Shapes: B images of a batch, K blocks.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_ROUNDS = 5  # below, no interval means anything
WIDEST_INTERVAL = 0.2  # of the speed-up itself: beyond, nothing is claimed
RESAMPLES = 1000

Call = Callable[[int], object]  # takes the number of the round
Times = NDArray[np.float64]  # seconds of each round
Row = dict[str, Any]


class Clock:
    """Gives every part of the benchmark its share of the time that is left."""

    def __init__(self, seconds: float, parts: int) -> None:
        self.end = time.monotonic() + seconds
        self.parts = parts

    def next_share(self) -> float:
        """Seconds for the next part."""
        share = max(0.0, self.end - time.monotonic()) / max(1, self.parts)
        self.parts -= 1
        return share


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a call; on CUDA between two events, its kernels ended."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def take_turns(
    calls: Mapping[str, Call], *, rounds: int, seconds: float, device: torch.device, repeats: int = 1
) -> dict[str, Times]:
    """Seconds of each call in each round, all under the same conditions; of calls that do their work
    `repeats` times, the seconds of one.

    Each measured call follows an unmeasured one of its own, which leaves caches warm and other
    contestants' waiting threads asleep. The order rotates, so nobody always comes after the same rival.
    """
    names = list(calls)
    for name in names:
        calls[name](0)
        calls[name](1)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.monotonic() + seconds
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            calls[name](number)
            times[name].append(seconds_of(partial(calls[name], number), device))
        if number + 1 >= MIN_ROUNDS and time.monotonic() > end:
            break
    return {name: np.array(found) / repeats for name, found in times.items()}


def speedup(rival: Times, own: Times, *, seed: int = 0) -> Row:
    """How many times as fast `own` is, as a ratio of medians with a 95 % interval over rounds.

    `reliable` is false when the rounds are too few or the interval too wide to claim anything.
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


def some_policies(
    batch: int, num_blocks: int, *, kept_share: float, distinct: int | None, draw: torch.Generator
) -> Tensor:
    """Random policies [B, K] bool, each of round(kept_share K) blocks; None: each image has its own."""
    count = distinct or batch
    order = torch.rand(count, num_blocks, generator=draw).argsort(dim=1).argsort(dim=1)
    policies = order < round(kept_share * num_blocks)
    return policies[torch.arange(batch) % count]


def break_even(shares: Sequence[float], seconds: Sequence[float], rival: float) -> float | None:
    """Kept share at which a line through (shares, seconds) meets the rival's seconds.

    Below it BlockDrop is faster. 1 where it is always faster, 0 where it never is; None where more
    blocks take no more time, so that the line says nothing.
    """
    slope, start = np.polyfit(shares, seconds, 1)
    if slope < 0.01 * np.mean(seconds):  # all blocks cost less than 1 % more than none
        return None
    return float(np.clip((rival - start) / slope, 0, 1))


def millijoules(call: Callable[[], object], batch: int, device: torch.device) -> float | None:
    """Energy of the GPU for each image, by NVML over half a second or more; None where it can't tell."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        # by its name: NVML counts boards that CUDA_VISIBLE_DEVICES hides, too
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        board = pynvml.nvmlDeviceGetHandleByUUID(name)
        torch.cuda.synchronize(device)
        started, before = time.monotonic(), pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
        calls = 0
        while time.monotonic() - started < 0.5:
            call()
            torch.cuda.synchronize(device)
            calls += 1
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(board) - before) / (calls * batch)
    except Exception:  # no library, no right, an old board: then there is no such number
        return None


def statistics(times: Times, batch: int) -> Row:
    """Median and quartiles in milliseconds, and images per second, for batches of `batch`."""
    quarter, median, three_quarters = np.percentile(times, [25, 50, 75])
    return {
        "milliseconds": float(median * 1000),
        "milliseconds_25": float(quarter * 1000),
        "milliseconds_75": float(three_quarters * 1000),
        "images_per_second": float(batch / median),
        "rounds": len(times),
    }
