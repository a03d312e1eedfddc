"""What keep ratio BlockDrop needs to be faster, and where its time goes.

Shapes: K blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from pipeline.benchmark.candidates import Candidate, Run, Settings
from pipeline.benchmark.rounds import Rounds
from pipeline.benchmark.timing import (
    MIN_ROUNDS,
    Call,
    Stopwatch,
    TimeBudget,
    Times,
    break_even,
    speedup,
    statistics,
)
from pipeline.device import generator
from pipeline.inference.base import Networks
from pipeline.models.row_ops import kept_rows
from pipeline.results import Parts, SweepPoint, Variant, Winner

VARIANTS: tuple[Variant, ...] = ("few", "many")
FULL = "full"  # the fastest full-ResNet form, in a sweep


def synthetic_policies(settings: Settings, num_blocks: int, batch: int) -> list[tuple[Variant, int]]:
    """Variants and numbers of blocks, to which the keep ratios are rounded."""
    num_kept = dict.fromkeys(round(ratio * num_blocks) for ratio in settings.keep_ratios)
    variants = VARIANTS if batch > settings.distinct_policies else VARIANTS[1:]
    return list(product(variants, num_kept))


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The winner of one precision at one batch size, beside the fastest full-ResNet form."""

    winner: Candidate
    full: Candidate
    policy: Run  # the policy network alone
    networks: Networks
    settings: Settings
    batch: int
    rounds: Rounds
    stopwatch: Stopwatch
    clock: TimeBudget

    def points(self, seconds: float) -> list[SweepPoint]:
        """Times under synthetic policies of each keep ratio.

        Raises:
            RuntimeError: a call failed.
        """
        draw = generator("benchmark", self.batch)
        num_blocks = self.networks.num_blocks
        calls = {FULL: self.rounds.on(self.full.run)}
        policies_of = {
            f"{variant} {num_kept}": (variant, num_kept)
            for variant, num_kept in synthetic_policies(self.settings, num_blocks, self.batch)
        }
        for name, (variant, num_kept) in policies_of.items():
            distinct = self.settings.distinct_policies if variant == "few" else None
            policies = self.rounds.policies(num_blocks, num_kept=num_kept, distinct=distinct, draw=draw)
            calls[name] = self.rounds.forced(self.winner.run, self.policy, policies)
        times = self._time_all(calls, self.settings.rounds, seconds)
        return [
            SweepPoint(
                precision=self.winner.precision,
                batch=self.batch,
                executor=self.winner.name,
                variant=variant,
                keep_ratio=num_kept / num_blocks,
                full_milliseconds=float(np.median(times[FULL]) * 1000),
                time=statistics(times[name], self.batch),
                speedup=speedup(times[FULL], times[name]),
            )
            for name, (variant, num_kept) in policies_of.items()
        ]

    def parts(self) -> Parts:
        """What every BlockDrop time includes, each measured alone.

        Raises:
            RuntimeError: a call failed.
        """
        actions = self.winner.run(self.rounds.batches[0][0]).actions  # [B, K]
        calls: dict[str, Call] = {
            "normalisation": self.rounds.on(self.networks.normalisation),
            "policy_network": self.rounds.on(self.policy),
            "index": self.rounds.on(lambda _: kept_rows(actions)),
        }
        times = self._time_all(calls, MIN_ROUNDS, 0)
        return Parts(
            precision=self.winner.precision,
            batch=self.batch,
            executor=self.winner.name,
            **{f"{name}_ms": float(np.median(seconds) * 1000) for name, seconds in times.items()},
        )

    def _time_all(self, calls: Mapping[str, Call], rounds: int, seconds: float) -> dict[str, Times]:
        """Seconds of each call of each round; a RuntimeError where one fails."""
        failures: list[str] = []
        watch = replace(self.stopwatch, leave_out=lambda name, why: failures.append(f"{name}: {why}"))
        started = self.clock.spent
        predicted = watch.warm_up(calls)
        left = seconds - (self.clock.spent - started)
        times = watch.interleaved_timing(
            calls,
            predicted=predicted,
            rounds=rounds,
            seconds=left,
            stays=calls,
            repeats=self.rounds.repeats,
        )
        if failures:
            raise RuntimeError("; ".join(failures))
        return times


def with_break_evens(winner: Winner, points: Sequence[SweepPoint]) -> Winner:
    """The winner with the keep ratios up to which it is faster, from the points that are not noise."""

    def of(variant: Variant) -> float | None:
        reliable = [p for p in points if p.variant == variant and p.speedup.reliable]
        if not reliable:
            return None
        ratios = [point.keep_ratio for point in reliable]
        times = [point.time.milliseconds for point in reliable]
        return break_even(ratios, times, reliable[0].full_milliseconds)

    return replace(winner, break_even_few=of("few"), break_even_many=of("many"))
