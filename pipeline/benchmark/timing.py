"""Timing contestants fairly, and what may be claimed from it.

Shapes: B images of a batch, K blocks.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.device import seconds_of
from pipeline.speedup import MIN_ROUNDS, Row, Times

SLACK = 1.2  # how much longer than predicted a part may take before more of it is dropped
TOO_SLOW = "too slow for benchmark.seconds"
CALLS = 2  # of a contestant in a round: one that is not measured, and one that is

Call = Callable[[int], object]  # takes the number of the round


class TimeBudget:
    """How much of the time for all of the benchmark is spent, and what of the rest a part gets."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the benchmark began."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds; never less than none."""
        return max(0.0, self.seconds - self.spent)

    def share(self, own: float, all_that_comes: float) -> float:
        """Seconds for a part, by what it and all that comes, itself included, are predicted to take."""
        return self.left * own / all_that_comes if all_that_comes else 0.0


def too_slow(predicted: Mapping[str, float], seconds: float, stays: Collection[str]) -> list[str]:
    """Who has to go so that the others' predicted seconds fit: the slowest first, nobody of `stays`."""
    total, going = sum(predicted.values()), []
    for name in sorted(predicted, key=lambda name: -predicted[name]):
        if total <= seconds:
            break
        if name not in stays:
            going.append(name)
            total -= predicted[name]
    return going


def reason(error: Exception) -> str:
    """Why a contestant can't run, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Measures contestants and leaves out who can't be measured.

    Attributes:
        leave_out: told the name of a contestant that fails or is dropped, and why.
        tick: called whenever some time has passed.
    """

    device: torch.device
    leave_out: Callable[[str, str], None]
    tick: Callable[[], None] = lambda: None

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

    def take_turns(
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

        Each measured call follows an unmeasured one of its own, which leaves caches warm and other
        contestants' waiting threads asleep. The order rotates, so nobody always comes after the same
        rival. A round begins only if it is predicted to fit into `seconds`. If MIN_ROUNDS do not fit,
        the slowest are dropped, but nobody of `stays`; these have MIN_ROUNDS in any case.

        Args:
            predicted: seconds of each call, by `warm_up`; later, what was measured counts.
        """
        names = [name for name in calls if name in predicted]
        times: dict[str, list[float]] = {name: [] for name in names}
        started = time.monotonic()
        for number in range(rounds):
            limit = SLACK * seconds if 0 < number < MIN_ROUNDS else seconds
            left = limit - (time.monotonic() - started)
            each = {n: CALLS * float(np.median(times[n] or predicted[n])) for n in times}
            if number >= MIN_ROUNDS and sum(each.values()) > left:
                break
            needed = max(1, MIN_ROUNDS - number)
            for name in too_slow({n: needed * each[n] for n in each}, left, stays):
                self.leave_out(name, TOO_SLOW)
                del times[name]
            first = number % len(names) if names else 0
            for name in names[first:] + names[:first]:
                if name in times and not self._measure(calls[name], number, name, times[name]):
                    del times[name]
        return {name: np.array(found) / repeats for name, found in times.items()}

    def _measure(self, call: Call, number: int, name: str, times: list[float]) -> bool:
        """Add the seconds of a call, or leave the contestant out; whether that worked."""
        try:
            call(number)
            times.append(seconds_of(partial(call, number), self.device))
        except Exception as error:
            self.leave_out(name, reason(error))
            return False
        finally:
            self.tick()
        return True


def random_policies(
    batch: int, num_blocks: int, *, kept: int, distinct: int | None, draw: torch.Generator
) -> Tensor:
    """Random policies [B, K] bool, each of `kept` blocks; None: each image has its own."""
    count = distinct or batch
    order = torch.rand(count, num_blocks, generator=draw).argsort(dim=1).argsort(dim=1)
    return (order < kept)[torch.arange(batch) % count]


def break_even(shares: Sequence[float], seconds: Sequence[float], rival: float) -> float | None:
    """Kept share at which a line through (shares, seconds) meets the rival's seconds.

    Below it BlockDrop is faster. 1 where it is always faster, 0 where it never is; None where more
    blocks take no more time, or all shares are one, so that a line says nothing.
    """
    if len(set(shares)) < 2:
        return None
    slope, start = np.polyfit(shares, seconds, 1)
    if slope < 0.01 * np.mean(seconds):  # all blocks cost less than 1 % more than none
        return None
    return float(np.clip((rival - start) / slope, 0, 1))


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
