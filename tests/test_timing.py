"""What is timed is what is said, and nothing is claimed that the rounds do not bear."""

import time

import numpy as np
import pytest
import torch

from pipeline.timing import (
    MIN_ROUNDS,
    Clock,
    break_even,
    millijoules,
    seconds_of,
    some_policies,
    speedup,
    statistics,
    take_turns,
)

CPU = torch.device("cpu")


def test_seconds_of_a_call():
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02), CPU) < 0.2


def test_turns_interleave_and_rotate():
    seen = []
    calls = {name: (lambda number, name=name: seen.append((name, number))) for name in "abc"}
    times = take_turns(calls, rounds=6, seconds=60, device=CPU)
    assert {name: len(found) for name, found in times.items()} == {"a": 6, "b": 6, "c": 6}
    assert seen[:6] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]  # warm-up
    rounds = [seen[6 + 6 * r : 12 + 6 * r] for r in range(6)]
    for number, part in enumerate(rounds):
        order = "abc"[number % 3 :] + "abc"[: number % 3]
        # everybody once unmeasured, then measured, on the images of this round
        assert part == [(name, number) for name in order for _ in range(2)]


def test_time_that_is_up_ends_the_rounds_but_not_before_there_are_enough():
    calls = {"slow": lambda _: time.sleep(0.005)}
    assert len(take_turns(calls, rounds=50, seconds=0, device=CPU)["slow"]) == MIN_ROUNDS


def test_repeats_divide():
    calls = {"thrice": lambda _: time.sleep(0.03)}
    found = take_turns(calls, rounds=5, seconds=0, device=CPU, repeats=3)["thrice"]
    assert 0.01 <= np.median(found) < 0.02


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


@pytest.mark.parametrize(("distinct", "expected"), [(None, 40), (4, 4)])
def test_policies_of_a_share(distinct, expected):
    draw = torch.Generator().manual_seed(0)
    found = some_policies(40, 54, kept_share=0.31, distinct=distinct, draw=draw)
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


def test_clock_shares_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(10, 2)
    assert clock.next_share() == 5
    now[0] = 2.0
    assert clock.next_share() == 8  # what the first part left goes to the second
    now[0] = 20.0
    assert clock.next_share() == 0


def test_no_energy_on_a_cpu():
    assert millijoules(lambda: None, 1, CPU) is None
