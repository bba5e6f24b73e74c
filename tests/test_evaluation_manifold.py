from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_helpers import normal

from maskdm.errors import UserError
from maskdm.evaluation import manifold


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
