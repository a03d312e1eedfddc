"""Paired differences: their sign, their centre, and the width that statistics predicts."""

import numpy as np
import pytest

from pipeline.bootstrap import paired_difference


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    one = [True] * both + [True] * first + [False] * second + [False] * neither
    other = [True] * both + [False] * first + [True] * second + [False] * neither
    return np.array(one), np.array(other)


def test_equal_outcomes_differ_by_nothing_at_all():
    one, _ = outcomes(90, 0, 0, 10)
    assert paired_difference(one, one, resamples=1000, seed=0) == (0, 0, 0)


def test_interval_has_the_width_of_the_normal_approximation():
    one, other = outcomes(8800, 300, 200, 700)
    difference, low, high = paired_difference(one, other, resamples=20_000, seed=0)
    deviation = np.sqrt((0.05 - 0.01**2) / 10_000)  # of a mean of 10,000 draws from {1, -1, 0}
    assert difference == pytest.approx(0.01)
    assert low == pytest.approx(0.01 - 1.96 * deviation, abs=2e-4)
    assert high == pytest.approx(0.01 + 1.96 * deviation, abs=2e-4)


def test_what_both_get_wrong_alike_does_not_widen_it():
    few = paired_difference(*outcomes(9970, 20, 10, 0), resamples=5000, seed=0)
    many = paired_difference(*outcomes(4970, 20, 10, 5000), resamples=5000, seed=0)
    assert few == many


def test_order_turns_the_sign_and_seed_decides_the_draws():
    one, other = outcomes(50, 30, 10, 10)
    difference, low, high = paired_difference(one, other, resamples=4000, seed=0)
    turned = paired_difference(other, one, resamples=4000, seed=0)
    assert difference == -turned[0] == pytest.approx(0.2)
    assert low == pytest.approx(-turned[2], abs=0.02)
    assert paired_difference(one, other, resamples=4000, seed=0) == (difference, low, high)


def test_outcomes_of_other_images_are_refused():
    with pytest.raises(ValueError, match="100 and 90"):
        paired_difference(outcomes(90, 5, 5, 0)[0], outcomes(90, 0, 0, 0)[0], resamples=10, seed=0)
