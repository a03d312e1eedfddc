"""What is timed is what is said, and nothing is claimed that the rounds do not bear."""

import time

import numpy as np
import pytest
import torch

from pipeline.benchmark.timing import (
    Stopwatch,
    TimeBudget,
    break_even,
    random_policies,
    statistics,
    too_slow,
)
from pipeline.device import seconds_of
from pipeline.speedup import MIN_ROUNDS, claim, in_words, speedup

CPU = torch.device("cpu")


def test_seconds_of_a_call():
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02), CPU) < 0.2


def take_turns(calls, *, rounds, seconds, predicted=None, stays=(), repeats=1):
    left_out = {}
    watch = Stopwatch(device=CPU, leave_out=left_out.__setitem__)
    predicted = dict.fromkeys(calls, 0.0) if predicted is None else predicted
    times = watch.take_turns(
        calls, predicted=predicted, rounds=rounds, seconds=seconds, stays=stays, repeats=repeats
    )
    return times, left_out


def test_turns_interleave_and_rotate():
    seen = []
    calls = {name: (lambda number, name=name: seen.append((name, number))) for name in "abc"}
    times, _ = take_turns(calls, rounds=6, seconds=60)
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


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in contestants."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(seconds: float, later: float | None = None, after: int = 0):
        def run(number: int) -> None:
            now[0] += seconds if later is None or number < after else later

        return run

    return now, call


def test_time_that_is_up_ends_the_rounds_but_not_before_there_are_enough(clock):
    _, call = clock
    times, left_out = take_turns({"slow": call(1)}, rounds=50, seconds=0, stays={"slow"})
    assert len(times["slow"]) == MIN_ROUNDS
    assert left_out == {}


def test_a_round_begins_only_if_it_fits(clock):
    now, call = clock
    times, _ = take_turns({"a": call(1)}, rounds=50, seconds=15, predicted={"a": 1.0})
    assert len(times["a"]) == 7
    assert now[0] == 14


def test_the_slowest_are_dropped_until_the_rest_fits(clock):
    now, call = clock
    costs = {"best": 1.0, "slow": 4.0, "slower": 5.0, "own": 6.0}
    calls = {name: call(seconds) for name, seconds in costs.items()}
    times, left_out = take_turns(
        calls, rounds=50, seconds=110, predicted=costs, stays={"best", "own"}
    )  # 5 rounds of two calls: 160 s for all, 110 without the second slowest
    assert times.keys() == {"best", "slow", "own"}
    assert left_out == {"slower": "too slow for benchmark.seconds"}
    assert now[0] == 110


def test_who_turns_slow_is_dropped_in_the_middle(clock):
    _, call = clock
    calls = {"steady": call(1), "turning": call(1, later=20, after=1)}
    predicted = {"steady": 1.0, "turning": 1.0}
    times, left_out = take_turns(calls, rounds=9, seconds=30, predicted=predicted, stays={"steady"})
    assert left_out.keys() == {"turning"}
    assert times.keys() == {"steady"}
    assert len(times["steady"]) >= MIN_ROUNDS


def test_who_fails_in_a_round_is_left_out(clock):
    def fails(number):
        if number == 3:
            raise ValueError("no more")

    _, call = clock
    times, left_out = take_turns({"a": call(1), "b": fails}, rounds=6, seconds=100)
    assert times.keys() == {"a"}
    assert len(times["a"]) == 6
    assert left_out == {"b": "ValueError: no more"}


def test_too_slow_takes_the_slowest_first_and_no_more_than_needed():
    predicted = {"a": 1, "b": 2, "c": 3, "d": 4}
    assert too_slow(predicted, 10, ()) == []
    assert too_slow(predicted, 9, ()) == ["d"]
    assert too_slow(predicted, 9, {"d"}) == ["c"]
    assert too_slow(predicted, 0, {"a"}) == ["d", "c", "b"]


def test_repeats_divide(clock):
    _, call = clock
    times, _ = take_turns({"thrice": call(3)}, rounds=5, seconds=0, repeats=3, stays={"thrice"})
    assert np.median(times["thrice"]) == 1


@pytest.mark.parametrize(
    ("low", "high", "reliable", "what", "words"),
    [
        (1.3, 2.6, False, "faster", "faster, by between 1.30 and 2.60 times"),
        (0.5, 0.8, False, "slower", "slower, by between 1.25 and 2.00 times"),
        (0.9, 1.6, False, "", "too noisy to compare"),
        (1.45, 1.55, True, "number", "1.50 times as fast (95 % interval 1.45 to 1.55)"),
    ],
)
def test_what_an_interval_allows_to_say(low, high, reliable, what, words):
    row = {"speedup": 1.5, "speedup_low": low, "speedup_high": high, "reliable": reliable}
    assert (claim(row), in_words(row)) == (what, words)
    assert claim(row | {"agrees": False, "reliable": False}) == ""


def test_speedup_is_a_ratio_of_medians_with_an_interval():
    rng = np.random.default_rng(0)
    own, rival = 1 + 0.01 * rng.normal(size=20), 2 + 0.02 * rng.normal(size=20)
    found = speedup(rival, own)
    assert found["speedup"] == pytest.approx(np.median(rival) / np.median(own))
    assert found["speedup_low"] < 2 < found["speedup_high"]
    assert found["reliable"]


def test_noise_is_not_reliable():
    rng = np.random.default_rng(0)
    own, rival = rng.uniform(0.5, 2, 9), rng.uniform(0.5, 2, 9)
    assert not speedup(rival, own)["reliable"]


def test_few_rounds_are_not_reliable():
    same = np.ones(MIN_ROUNDS - 1)
    assert not speedup(same, same)["reliable"]


def test_a_slow_machine_slows_both_so_pairs_keep_the_ratio():
    """Load that comes and goes hits whole rounds: resampling rounds keeps pairs together."""
    load = np.where(np.arange(20) % 2 == 0, 1.0, 3.0)
    together = speedup(2 * load, load)
    assert (together["speedup_low"], together["speedup_high"]) == pytest.approx((2, 2))


def test_break_even():
    shares = [0.2, 0.6, 1.0]
    assert break_even(shares, [2, 4, 6], 5) == pytest.approx(0.8)
    assert break_even(shares, [2, 4, 6], 100) == 1
    assert break_even(shares, [2, 4, 6], 0.5) == 0
    assert break_even(shares, [5, 5, 5], 5) is None
    assert break_even([0.5], [3], 5) is None


@pytest.mark.parametrize(("distinct", "expected"), [(None, 40), (4, 4)])
def test_policies_of_a_share(distinct, expected):
    draw = torch.Generator().manual_seed(0)
    found = random_policies(40, 54, kept=17, distinct=distinct, draw=draw)
    assert found.shape == (40, 54)
    assert found.dtype == torch.bool
    assert (found.sum(dim=1) == 17).all()
    assert len(torch.unique(found, dim=0)) == expected


def test_statistics():
    found = statistics(np.array([0.01, 0.02, 0.03, 0.04, 0.05]), 60)
    assert found["milliseconds"] == pytest.approx(30)
    assert (found["milliseconds_25"], found["milliseconds_75"]) == pytest.approx((20, 40))
    assert found["images_per_second"] == pytest.approx(2000)
    assert found["rounds"] == 5


def test_clock_shares_what_is_left(clock):
    now, _ = clock
    own = TimeBudget(10)
    assert own.share(1, 2) == 5
    now[0] = 2.0
    assert own.share(1, 1) == 8  # what the first part left goes to the second
    now[0] = 20.0
    assert (own.share(1, 1), own.left, own.spent) == (0, 0, 20)
    assert own.share(0, 0) == 0
