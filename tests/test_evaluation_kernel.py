from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_helpers import Pixels, normal
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation import kernel_distance


def test_kernel_distance_is_the_sum_over_all_pairs() -> None:
    a, b = normal(30, 4, 6), normal(25, 4, 7, shift=0.5)

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x.double() @ y.double()) / 4 + 1) ** 3

    aa = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    bb = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    ab = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b).value == pytest.approx(float(aa + bb - 2 * ab), rel=1e-9)


def test_kernel_distance_is_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    generator = torch.Generator().manual_seed(8)
    real = torch.randint(0, 200, (60, 3, 4, 4), dtype=torch.uint8, generator=generator)
    fake = torch.randint(30, 256, (60, 3, 4, 4), dtype=torch.uint8, generator=generator)
    with pytest.warns(UserWarning, match="large memory"):
        oracle = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=60)
    oracle.update(real, real=True)
    oracle.update(fake, real=False)
    expected, _ = oracle.compute()
    assert kernel_distance(real.flatten(1), fake.flatten(1)).value == pytest.approx(float(expected), rel=1e-3)


def test_kernel_distance_is_unbiased_and_knows_its_error() -> None:
    found = [kernel_distance(normal(60, 5, 2 * i), normal(60, 5, 2 * i + 1, shift=0.6)) for i in range(100)]
    values = np.array([each.value for each in found])
    stated = np.sqrt(np.mean([each.standard_error**2 for each in found]))
    assert 0.75 < stated / values.std() < 1.4
    null = np.array([kernel_distance(normal(60, 5, 2 * i), normal(60, 5, 2 * i + 1)).value for i in range(100)])
    assert abs(null.mean()) < 3 * null.std() / 100**0.5
    assert values.mean() > 5 * values.std() / 100**0.5


def test_kernel_distance_of_a_part_is_drawn_by_the_seed() -> None:
    a, b = normal(200, 4, 9), normal(200, 4, 10)
    assert kernel_distance(a, b, limit=50, seed=1) == kernel_distance(a, b, limit=50, seed=1)
    assert kernel_distance(a, b, limit=50, seed=1).value != kernel_distance(a, b, limit=50, seed=2).value
    with pytest.raises(UserError, match="at least 4 images"):
        kernel_distance(a[:3], b)


@pytest.mark.parametrize(("count", "groups", "quantile"), [(60, 20, 2.093), (6, 3, 4.303), (4, 2, 12.706)])
def test_the_interval_is_students(count: int, groups: int, quantile: float) -> None:
    found = kernel_distance(normal(60, 5, 1), normal(count, 5, 2))
    assert found.groups == groups
    assert found.estimate.value == found.value
    assert found.estimate.high - found.estimate.low == pytest.approx(2 * quantile * found.standard_error, rel=1e-3)


def test_it_says_how_many_were_compared() -> None:
    assert kernel_distance(normal(70, 4, 1), normal(20, 4, 2), limit=50).counts == (50, 20)
