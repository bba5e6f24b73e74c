from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskdm.errors import UserError
from maskdm.evaluation import Statistics, frechet_distance, kernel_distance, nearest, precision_recall


def normal(count: int, dimensions: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(dimensions))
    return torch.randn(count, dimensions, generator=generator) @ mixing + shift


def test_statistics_are_numpys_whatever_the_pieces_even_far_from_zero() -> None:
    features = normal(500, 6, 0, shift=1e4)
    pieces, other = Statistics(6), Statistics(6)
    for piece in features[:300].split([1, 0, 99, 200]):
        pieces.update(piece)
    other.update(features[300:])
    pieces.merge(other)
    exact = features.double().numpy()
    assert pieces.count == 500
    np.testing.assert_allclose(pieces.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(pieces.cov, np.cov(exact.T), rtol=1e-9)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(UserError, match="at least 2 images, here 1"):
        _ = Statistics.of(torch.zeros(1, 3)).cov


def test_frechet_closed_form_of_diagonal_gaussians() -> None:
    a, b = Statistics(3), Statistics(3)
    # four points per axis and side: means and variances are known exactly
    for statistics, scales, shift in ((a, (1.0, 2.0, 3.0), 0.0), (b, (2.0, 2.0, 0.5), 1.5)):
        points = torch.cat([torch.diag(torch.tensor(scales)), -torch.diag(torch.tensor(scales))])
        statistics.update(points + shift)
    deviation = (2 / 5) ** 0.5  # of +-s among six points with divisor 5
    expected = 3 * 1.5**2 + deviation**2 * ((1 - 2) ** 2 + 0 + (3 - 0.5) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_is_scipys_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    a, b = Statistics.of(normal(400, 16, 1)), Statistics.of(2 * normal(300, 16, 2, shift=0.3))
    root = sqrtm((a.cov @ b.cov).numpy())
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


class Pixels(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


def test_frechet_is_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(3)
    real = torch.randint(0, 200, (300, 3, 4, 4), dtype=torch.uint8, generator=generator)
    fake = torch.randint(30, 256, (200, 3, 4, 4), dtype=torch.uint8, generator=generator)
    oracle = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 4, 4))
    oracle.set_dtype(torch.float64)
    oracle.update(real, real=True)
    oracle.update(fake, real=False)
    found = frechet_distance(Statistics.of(real.flatten(1)), Statistics.of(fake.flatten(1)))
    assert found == pytest.approx(float(oracle.compute()), rel=1e-6)


def test_frechet_of_fewer_images_than_dimensions_is_real_and_zero_of_itself() -> None:
    few = Statistics.of(normal(10, 40, 4))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5 * float(few.cov.trace()))
    assert frechet_distance(few, Statistics.of(normal(10, 40, 5))) > 0.1 * float(few.cov.trace())


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


def test_precision_recall_as_defined() -> None:
    real, fake = normal(120, 3, 11), torch.cat([normal(60, 3, 12), normal(40, 3, 13) + 30])

    def covered(queries: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=2), axis=1)[:, 3]
        return float((np.linalg.norm(queries[:, None] - centres, axis=2) <= radii).any(axis=1).mean())

    found = precision_recall(real, fake, k=3)
    assert found.precision == pytest.approx(covered(fake.double().numpy(), real.double().numpy()))
    assert found.recall == pytest.approx(covered(real.double().numpy(), fake.double().numpy()))
    assert found.precision < 0.65
    assert found.recall > 0.5


def test_precision_and_recall_are_not_exchanged() -> None:
    real = normal(300, 2, 14)
    collapsed = precision_recall(real, real[:20] * 0.05)
    assert collapsed.precision > 0.9
    assert collapsed.recall < 0.3
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(real, real[:3])


@pytest.mark.parametrize("block", [7, 64, 4096])
def test_nearest_is_brute_force_in_any_block(block: int) -> None:
    queries, references = normal(50, 5, 15), normal(80, 5, 16)
    found = nearest(queries, references, k=3, block=block)
    expected = np.linalg.norm(queries.double().numpy()[:, None] - references.double().numpy(), axis=2)
    np.testing.assert_array_equal(found.indices, np.argsort(expected, axis=1)[:, :3])
    np.testing.assert_allclose(found.distances, np.sort(expected, axis=1)[:, :3], rtol=1e-12)


def test_nearest_finds_a_copy_at_exactly_zero() -> None:
    references = normal(90, 64, 17, shift=100)
    found = nearest(references[[5, 70]], references, block=16)
    assert found.indices.flatten().tolist() == [5, 70]
    assert found.distances.flatten().tolist() == [0, 0]
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = images[[9]].clone()
    changed[0, 0, 0, 0] ^= 1
    assert nearest(changed, images).distances.item() == 1
    with pytest.raises(ValueError, match="k is 91"):
        nearest(references, references, k=91)
