"""What is timed is what is said, and nothing is claimed that the rounds do not bear."""

import time

import numpy as np
import pytest
import torch

from pipeline.benchmark.timing import (
    MIN_ROUNDS,
    Stopwatch,
    TimeBudget,
    break_even,
    random_policies,
    speedup,
    statistics,
    too_slow,
)
from pipeline.device import seconds_of
from pipeline.results import Agreement, Speedup, TimingRow

CPU = torch.device("cpu")


def test_seconds_of_a_call():
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02), CPU) < 0.2


def interleaved(calls, *, rounds, seconds, predicted=None, **options):
    left_out = {}
    watch = Stopwatch(device=CPU, leave_out=left_out.__setitem__)
    options = {"predicted": predicted or dict.fromkeys(calls, 0.0), "stays": ()} | options
    times = watch.interleaved_timing(calls, rounds=rounds, seconds=seconds, **options)
    return times, left_out


def test_turns_interleave_and_rotate():
    seen = []
    calls = {name: (lambda number, name=name: seen.append((name, number))) for name in "abc"}
    times, _ = interleaved(calls, rounds=6, seconds=60)
    assert {name: len(found) for name, found in times.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [seen[6 * r : 6 + 6 * r] for r in range(6)]
    for number, part in enumerate(rounds):
        order = "abc"[number % 3 :] + "abc"[: number % 3]
        # everybody once unmeasured, then measured, on the images of this round
        assert part == [(name, number) for name in order for _ in range(2)]


def test_warm_up_compiles_unmeasured_and_names_who_fails():
    seen, left_out = [], {}

    def fails(_):
        raise RuntimeError("first line\nsecond line")

    watch = Stopwatch(device=CPU, leave_out=left_out.__setitem__)
    assert watch.warm_up({"a": seen.append, "b": fails}).keys() == {"a"}
    assert seen == [0, 1]
    assert left_out == {"b": "RuntimeError: first line"}


class Clock:
    """Time that passes only in contestants."""

    now = 0.0

    def call(self, seconds: float, later: float | None = None, after: int = 0):
        def run(number: int) -> None:
            self.now += seconds if later is None or number < after else later

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize(("seconds", "rounds"), [(0, MIN_ROUNDS), (15, 7), (16, 8), (1000, 50)])
def test_a_round_begins_only_if_it_fits_or_there_are_too_few(clock, seconds, rounds):
    times, left_out = interleaved(
        {"a": clock.call(1)}, rounds=50, seconds=seconds, predicted={"a": 1.0}, stays={"a"}
    )
    assert len(times["a"]) == rounds
    assert clock.now == 2 * rounds
    assert left_out == {}


def test_the_slowest_are_dropped_until_the_rest_fits(clock):
    costs = {"best": 1.0, "slow": 4.0, "slower": 5.0, "own": 6.0}
    calls = {name: clock.call(seconds) for name, seconds in costs.items()}
    times, left_out = interleaved(
        calls, rounds=50, seconds=110, predicted=costs, stays={"best", "own"}
    )  # 5 rounds of two calls: 160 s for all, 110 without the second slowest
    assert times.keys() == {"best", "slow", "own"}
    assert left_out == {"slower": "too slow for benchmark.seconds"}
    assert clock.now == 110


def test_who_turns_slow_is_dropped_in_the_middle(clock):
    calls = {"steady": clock.call(1), "turning": clock.call(1, later=20, after=1)}
    predicted = {"steady": 1.0, "turning": 1.0}
    times, left_out = interleaved(calls, rounds=9, seconds=30, predicted=predicted, stays={"steady"})
    assert left_out.keys() == {"turning"}
    assert times.keys() == {"steady"}
    assert len(times["steady"]) >= MIN_ROUNDS


def test_who_fails_in_a_round_is_left_out(clock):
    def fails(number):
        if number == 3:
            raise ValueError("no more")

    times, left_out = interleaved({"a": clock.call(1), "b": fails}, rounds=6, seconds=100)
    assert times.keys() == {"a"}
    assert len(times["a"]) == 6
    assert left_out == {"b": "ValueError: no more"}


def test_too_slow_takes_the_slowest_first():
    predicted = {"a": 1, "b": 2, "c": 3, "d": 4}
    assert too_slow(predicted, 10, ()) == []
    assert too_slow(predicted, 9, ()) == ["d"]
    assert too_slow(predicted, 9, {"d"}) == ["c"]
    assert too_slow(predicted, 0, {"a"}) == ["d", "c", "b"]


def test_repeats_divide(clock):
    times, _ = interleaved({"thrice": clock.call(3)}, rounds=5, seconds=60, repeats=3)
    assert np.median(times["thrice"]) == 1


@pytest.mark.parametrize(
    ("low", "high", "reliable", "claim", "words"),
    [
        (1.3, 2.6, False, "faster", "faster, by between 1.30 and 2.60 times"),
        (0.5, 0.8, False, "slower", "slower, by between 1.25 and 2.00 times"),
        (0.9, 1.6, False, "", "too noisy to compare"),
        (1.45, 1.55, True, "number", "1.50 times as fast (95 % interval 1.45 to 1.55)"),
    ],
)
def test_speedup_claims_what_its_interval_allows(low, high, reliable, claim, words):
    claimed = Speedup(ratio=1.5, low=low, high=high, reliable=reliable)
    assert (claimed.claim, str(claimed)) == (claim, words)


@pytest.mark.parametrize(("agrees", "claim"), [(True, "faster"), (False, "")])
def test_timing_row_claims_nothing_for_other_results(agrees, claim):
    row = TimingRow(
        candidate="gather",
        kind="blockdrop",
        precision="fp32",
        batch=1,
        time=statistics(np.ones(5), 1),
        speedup=Speedup(ratio=1.5, low=1.3, high=2.6, reliable=False),
        agreement=Agreement(decisions=1.0, classes=1.0, agrees=agrees),
    )
    assert row.claim == claim


def test_speedup_is_a_ratio_of_medians_with_an_interval():
    rng = np.random.default_rng(0)
    candidate, baseline = 1 + 0.01 * rng.normal(size=20), 2 + 0.02 * rng.normal(size=20)
    measured = speedup(baseline, candidate)
    assert measured.ratio == pytest.approx(np.median(baseline) / np.median(candidate))
    assert measured.low < 2 < measured.high
    assert measured.reliable


def test_speedup_of_noise_or_of_few_rounds_is_not_reliable():
    rng = np.random.default_rng(0)
    assert not speedup(rng.uniform(0.5, 2, 9), rng.uniform(0.5, 2, 9)).reliable
    same = np.ones(MIN_ROUNDS - 1)
    assert not speedup(same, same).reliable


def test_speedup_pairs_rounds_so_that_load_on_both_cancels():
    load = np.where(np.arange(20) % 2 == 0, 1.0, 3.0)
    measured = speedup(2 * load, load)
    assert (measured.low, measured.high) == pytest.approx((2, 2))


@pytest.mark.parametrize(
    ("times", "baseline", "expected"),
    [
        ([2, 4, 6], 5, 0.8),
        ([2, 4, 6], 100, 1),
        ([2, 4, 6], 0.5, 0),
        ([5, 5, 5], 5, None),
        ([3], 5, None),
    ],
)
def test_break_even(times, baseline, expected):
    keep_ratios = [0.2, 0.6, 1.0][: len(times)]
    assert break_even(keep_ratios, times, baseline) == pytest.approx(expected)


@pytest.mark.parametrize(("distinct", "expected"), [(None, 40), (4, 4)])
def test_random_policies_keep_so_many_blocks(distinct, expected):
    draw = torch.Generator().manual_seed(0)
    policies = random_policies(40, 54, num_kept=17, distinct=distinct, draw=draw)
    assert policies.shape == (40, 54)
    assert policies.dtype == torch.bool
    assert (policies.sum(dim=1) == 17).all()
    assert len(torch.unique(policies, dim=0)) == expected


def test_statistics():
    timing = statistics(np.array([0.01, 0.02, 0.03, 0.04, 0.05]), 60)
    assert timing.milliseconds == pytest.approx(30)
    assert (timing.milliseconds_25, timing.milliseconds_75) == pytest.approx((20, 40))
    assert timing.images_per_second == pytest.approx(2000)
    assert timing.rounds == 5


def test_time_budget_shares_what_is_left(clock):
    budget = TimeBudget(10)
    assert budget.share(1, 2) == 5
    clock.now = 2.0
    assert budget.share(1, 1) == 8  # what the first part left goes to the second
    clock.now = 20.0
    assert (budget.share(1, 1), budget.left, budget.spent) == (0, 0, 20)
    assert budget.share(0, 0) == 0
