"""Timing candidates fairly, and what may be claimed from it.

Shapes: B images of a batch, K blocks.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.device import seconds_of
from pipeline.results import Speedup, Timing

MIN_ROUNDS = 5  # below, no interval means anything
WIDEST_INTERVAL = 0.2  # of the speed-up itself: beyond, no number is claimed
RESAMPLES = 1000
SLACK = 1.2  # how much longer than predicted a part may take before more of it is dropped
TOO_SLOW = "too slow for benchmark.seconds"
CALLS = 2  # of a candidate in a round: one that is not measured, and one that is

Call = Callable[[int], object]  # takes the number of the round
Times = NDArray[np.float64]  # seconds of each round


class TimeBudget:
    """How much of the time for all of the benchmark is spent, and what of the rest a part gets."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)

    def share(self, predicted: float, predicted_of_all: float) -> float:
        """Seconds for the next part, by what it and all that comes, itself included, are to take."""
        return self.left * predicted / predicted_of_all if predicted_of_all else 0.0


def too_slow(predicted: Mapping[str, float], seconds: float, stays: Collection[str]) -> list[str]:
    """Who has to go so that the others' predicted seconds fit: the slowest first, nobody of `stays`."""
    total, dropped = sum(predicted.values()), []
    for name in sorted(predicted, key=lambda name: -predicted[name]):
        if total <= seconds:
            break
        if name not in stays:
            dropped.append(name)
            total -= predicted[name]
    return dropped


def reason(error: Exception) -> str:
    """Why a candidate can't run, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Measures candidates and leaves out those that can't be measured."""

    device: torch.device
    # gets the name of a candidate that fails or is dropped, and why
    leave_out: Callable[[str, str], None]
    tick: Callable[[], None] = lambda: None  # called whenever some time has passed

    def warm_up(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Seconds of a call of each, after one that compiles and allocates; without who fails."""
        seconds = {}
        for name, call in calls.items():
            try:
                call(0)
                seconds[name] = seconds_of(partial(call, 1), self.device)
            except Exception as error:
                self.leave_out(name, reason(error))
            self.tick()
        return seconds

    def interleaved_timing(
        self,
        calls: Mapping[str, Call],
        *,
        predicted: Mapping[str, float],
        rounds: int,
        seconds: float,
        stays: Collection[str],
        repeats: int = 1,
    ) -> dict[str, Times]:
        """Seconds of each call in each round, all under the same conditions; of calls that do their
        work `repeats` times, the seconds of one.

        Each measured call follows an unmeasured one of the same candidate, which leaves caches warm
        and other candidates' waiting threads asleep. The order rotates, so nobody always comes after
        the same candidate. A round begins only if it is predicted to fit into `seconds`. If MIN_ROUNDS
        do not fit, the slowest are dropped, but nobody of `stays`: these have MIN_ROUNDS in any case.

        Args:
            predicted: seconds of each call, by `warm_up`; later, what was measured counts.
        """
        names = [name for name in calls if name in predicted]
        times: dict[str, list[float]] = {name: [] for name in names}
        started = time.monotonic()
        for number in range(rounds):
            limit = SLACK * seconds if 0 < number < MIN_ROUNDS else seconds
            left = limit - (time.monotonic() - started)
            round_seconds = {n: CALLS * float(np.median(times[n] or predicted[n])) for n in times}
            if number >= MIN_ROUNDS and sum(round_seconds.values()) > left:
                break
            needed = max(1, MIN_ROUNDS - number)
            for name in too_slow({n: needed * s for n, s in round_seconds.items()}, left, stays):
                self.leave_out(name, TOO_SLOW)
                del times[name]
            first = number % len(names) if names else 0
            for name in (name for name in names[first:] + names[:first] if name in times):
                try:
                    calls[name](number)
                    times[name].append(seconds_of(partial(calls[name], number), self.device))
                except Exception as error:
                    self.leave_out(name, reason(error))
                    del times[name]
                self.tick()
        return {name: np.array(measured) / repeats for name, measured in times.items()}


def random_policies(
    batch: int, num_blocks: int, *, num_kept: int, distinct: int | None, draw: torch.Generator
) -> Tensor:
    """Random policies [B, K] bool, each of `num_kept` blocks; None: each image has its own."""
    count = distinct or batch
    order = torch.rand(count, num_blocks, generator=draw).argsort(dim=1).argsort(dim=1)
    return (order < num_kept)[torch.arange(batch) % count]


def statistics(times: Times, batch: int) -> Timing:
    """Median and quartiles in milliseconds, and images per second, for batches of `batch`."""
    quarter, median, three_quarters = np.percentile(times, [25, 50, 75])
    return Timing(
        milliseconds=float(median * 1000),
        milliseconds_25=float(quarter * 1000),
        milliseconds_75=float(three_quarters * 1000),
        images_per_second=float(batch / median),
        rounds=len(times),
    )


def speedup(baseline: Times, candidate: Times, *, seed: int = 0) -> Speedup:
    """How many times as fast the candidate is, with a 95 % bootstrap interval over the rounds."""
    rng = np.random.default_rng(seed)
    count = len(candidate)
    rows = rng.integers(0, count, (RESAMPLES, count))  # the same rounds of both: they are pairs
    ratios = np.median(baseline[rows], axis=1) / np.median(candidate[rows], axis=1)  # [RESAMPLES]
    low, high = np.percentile(ratios, [2.5, 97.5])
    ratio = float(np.median(baseline) / np.median(candidate))
    return Speedup(
        ratio=ratio,
        low=float(low),
        high=float(high),
        reliable=bool(count >= MIN_ROUNDS and high - low <= WIDEST_INTERVAL * ratio),
    )


def break_even(keep_ratios: Sequence[float], seconds: Sequence[float], baseline: float) -> float | None:
    """Keep ratio at which a line through (keep_ratios, seconds) meets the baseline's seconds.

    Below it BlockDrop is faster. 1 where it is always faster, 0 where it never is; None where more
    blocks take no more time, or all ratios are one, so that a line says nothing.
    """
    if len(set(keep_ratios)) < 2:
        return None
    slope, start = np.polyfit(keep_ratios, seconds, 1)
    if slope < 0.01 * np.mean(seconds):  # all blocks cost less than 1 % more than none
        return None
    return float(np.clip((baseline - start) / slope, 0, 1))
