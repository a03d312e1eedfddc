"""Paired differences: an interval that holds for few images that differ, and who is ahead."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.report.paired import paired_difference, wilson


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    one = [True] * both + [True] * first + [False] * second + [False] * neither
    other = [True] * both + [False] * first + [True] * second + [False] * neither
    return np.array(one), np.array(other)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland, Lydersen and Laake 2014, Stat Med 33:2850
        ((59, 6, 16, 80), -0.1186, -0.0046),  # of the R package contingencytables by the same authors
    ],
)
def test_interval_is_the_published_one(table, low, high):
    found = paired_difference(*outcomes(*table))
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


def test_networks_that_never_differ_may_differ_on_other_images():
    one, _ = outcomes(440, 0, 0, 10)
    found = paired_difference(one, one)
    assert found.mean == 0
    assert found.low == -found.high < -0.005
    assert found.sign == 0
    every = np.ones(450, bool)  # nor does one that is always right
    assert paired_difference(every, every).high > 0.005


def test_four_to_none_of_450_is_no_lead():
    found = paired_difference(*outcomes(444, 4, 0, 2))
    assert found.low < 0 < found.high
    assert (found.only_first, found.only_second, found.sign) == (4, 0, 0)


def test_lead_on_few_images_is_one_by_the_exact_test_too():
    for first, second in itertools.product(range(12), range(4)):
        found = paired_difference(*outcomes(400, first, second, 50))
        p = binomtest(first, first + second).pvalue if first + second else 1
        if first + second < 10:
            assert (found.sign != 0) == (p < 0.05), (first, second)
        assert found.sign in (0, int(first > second) - int(first < second)), (first, second)
        assert (found.sign == 0) or found.low * found.high > 0, (first, second)


def test_exact_test_holds_back_a_lead_of_the_interval():
    found = paired_difference(*outcomes(1, 1, 7, 12))
    assert found.high < 0
    assert binomtest(1, 8).pvalue > 0.05
    assert found.sign == 0


@pytest.mark.parametrize("shares", [(0.98, 0.004, 0.004), (0.985, 0.009, 0.002), (0.9, 0.01, 0.002)])
def test_interval_covers_the_truth_in_95_of_100_test_sets(shares):
    """Of 450 images, of which two to six differ; the bootstrap's covered down to 80 of 100."""
    both, first, second = shares
    rng = np.random.default_rng(0)
    tables = rng.multinomial(450, [both, first, second, 1 - sum(shares)], size=1000)
    covered = 0
    for table in tables:
        found = paired_difference(*outcomes(*table))
        covered += found.low <= first - second <= found.high
    assert covered >= 950


def test_with_many_images_it_is_the_normal_approximation():
    found = paired_difference(*outcomes(8800, 300, 200, 700))
    deviation = np.sqrt((0.05 - 0.01**2) / 10_000)  # of a mean of 10,000 draws from {1, -1, 0}
    assert found.mean == pytest.approx(0.01)
    assert found.low == pytest.approx(0.01 - 1.96 * deviation, abs=2e-4)
    assert found.high == pytest.approx(0.01 + 1.96 * deviation, abs=2e-4)
    assert found.sign == 1


def test_order_turns_the_sign():
    one, other = outcomes(50, 30, 10, 10)
    found, turned = paired_difference(one, other), paired_difference(other, one)
    assert (found.mean, found.low, found.high) == pytest.approx((-turned[0], -turned[2], -turned[1]))
    assert (found.sign, turned.sign) == (1, -1)


def test_outcomes_of_other_images_are_refused():
    with pytest.raises(ValueError, match="100 and 90"):
        paired_difference(outcomes(90, 5, 5, 0)[0], outcomes(90, 0, 0, 0)[0])


def test_wilson_interval_by_hand():
    z = 1.959964
    for right, count in ((9, 10), (0, 5), (5, 5)):
        centre, half = right + z**2 / 2, z * (right * (count - right) / count + z**2 / 4) ** 0.5
        ends = (centre - half) / (count + z**2), (centre + half) / (count + z**2)
        assert wilson(right, count) == pytest.approx(ends, abs=1e-6)
