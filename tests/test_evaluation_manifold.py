from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from evaluation_helpers import normal

from maskdm.errors import UserError
from maskdm.evaluation import manifold
from maskdm.evaluation.intervals import difference_of_shares, share


def test_precision_recall_density_coverage_as_defined() -> None:
    real, fake = normal(120, 3, 11), torch.cat([normal(60, 3, 12), normal(40, 3, 13) + 30])
    k = 3

    def radii(centres: np.ndarray) -> np.ndarray:
        return np.sort(np.linalg.norm(centres[:, None] - centres, axis=2), axis=1)[:, k]

    x, y = real.double().numpy(), fake.double().numpy()
    apart = np.linalg.norm(y[:, None] - x, axis=2)
    in_real = apart <= radii(x)
    found = manifold(real, fake, k)
    assert found.precision.value == pytest.approx(in_real.any(axis=1).mean())
    assert found.recall.value == pytest.approx((apart <= radii(y)[:, None]).any(axis=0).mean())
    assert found.density.value == pytest.approx(in_real.sum() / (k * len(y)))
    assert found.coverage.value == pytest.approx(in_real.any(axis=0).mean())
    assert found.precision.value < 0.65
    for each in found:
        assert each.low < each.value < each.high


def test_in_blocks_it_is_the_same() -> None:
    real, fake = normal(150, 4, 1), normal(130, 4, 2)
    assert manifold(real, fake, block=32) == manifold(real, fake)


def test_precision_and_recall_are_not_exchanged() -> None:
    real = normal(300, 2, 14)
    collapsed = manifold(real, real[:20] * 0.05)
    assert collapsed.precision.value > 0.9
    assert collapsed.recall.value < 0.3
    assert collapsed.coverage.value < 0.3
    with pytest.raises(UserError, match="more than 5 images"):
        manifold(real, real[:5])


def test_same_distribution_has_density_near_one() -> None:
    found = manifold(normal(1500, 4, 15), normal(1500, 4, 16))
    assert 0.9 < found.density.value < 1.1
    assert found.coverage.value > 0.9


@pytest.mark.parametrize("count", [70, 9])
def test_the_intervals_of_recall_and_coverage_are_those_of_leaving_out_a_tenth_of_the_samples(count: int) -> None:
    real, fake = normal(300, 4, 1), normal(count, 4, 2)
    found = manifold(real, fake, k=3)
    groups = np.array_split(np.random.default_rng(0).permutation(count), min(10, count))
    without = [manifold(real, fake[np.setdiff1d(np.arange(count), group)], k=3) for group in groups]
    quantile = {10: 2.26216, 9: 2.30600}[len(groups)]  # Student's
    for name in ("recall", "coverage"):
        estimate, values = getattr(found, name), [getattr(each, name).value for each in without]
        half = quantile * math.sqrt((len(groups) - 1) * np.var(values))
        wilson = share(round(300 * estimate.value), 300)
        assert estimate.value - estimate.low == pytest.approx(math.hypot(half, wilson.value - wilson.low), rel=1e-4)
        assert estimate.high == pytest.approx(min(1, estimate.value + math.hypot(half, wilson.high - wilson.value)), rel=1e-4)


def test_intervals_hold_the_mean_over_other_draws_and_equal_sets_do_not_differ() -> None:
    draws = [[normal(count, 12, 3 * i + j) for j, count in enumerate((400, 30, 30))] for i in range(100)]
    found = [(manifold(real, fake), manifold(real, other)) for real, fake, other in draws]
    for name in ("recall", "coverage"):
        pairs = [(getattr(ours, name), getattr(theirs, name)) for ours, theirs in found]
        values = np.array([[each.value for each in pair] for pair in pairs])
        assert np.mean([each.low <= values.mean() <= each.high for each, _ in pairs]) > 0.92
        assert np.mean([each.high - each.low for each, _ in pairs]) < 2 * 1.96 * 1.7 * values.std()
        differences = [difference_of_shares(*pair) for pair in pairs]
        assert np.mean([each.low <= 0 <= each.high for each in differences]) > 0.92
