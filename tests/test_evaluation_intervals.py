from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from maskdm.evaluation.intervals import Estimate, bootstrap_difference, bootstrap_mean, bootstrap_median_ratio, difference_of_shares, share


@pytest.mark.parametrize(("count", "total"), [(0, 40), (1, 40), (17, 40), (40, 40), (300, 1000)])
def test_shares_have_wilsons_interval(count: int, total: int) -> None:
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    found = share(count, total)
    assert found.value == count / total
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_none_found_is_not_certainty() -> None:
    assert share(0, 100).high > 0.03
    assert share(100, 100).low < 0.97


def test_difference_of_shares_is_newcombes() -> None:
    # Newcombe 1998, table II, example (a), method 10: 56/70 - 48/80
    found = difference_of_shares(share(56, 70), share(48, 80))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    held = np.zeros(3)
    for _ in range(200):
        first, second = random.exponential(2.0, 80), random.exponential(1.0, 60)
        mean = bootstrap_mean(first)
        difference = bootstrap_difference(first[:, None], second[:, None])[0]
        ratio = bootstrap_median_ratio(first, second)
        assert ratio is not None
        held += [mean.low <= 2 <= mean.high, difference.low <= 1 <= difference.high, ratio.low <= 2 <= ratio.high]
    assert (held / 200 > 0.88).all()
    assert (held / 200 < 0.99).all()


def test_differences_are_by_column_and_not_exchanged() -> None:
    first, second = np.tile([1.0, 5.0], (20, 1)), np.tile([4.0, 2.0], (10, 1))
    assert bootstrap_difference(first, second) == [Estimate(-3, -3, -3), Estimate(3, 3, 3)]


def test_no_ratio_to_nothing() -> None:
    assert bootstrap_median_ratio(np.ones(5), np.zeros(5)) is None
