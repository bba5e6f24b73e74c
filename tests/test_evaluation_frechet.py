from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import Pixels, normal

from maskdm.errors import UserError
from maskdm.evaluation import Statistics, frechet_distance, frechet_halves, frechet_infinity, frechet_ratio, frechet_standard_error


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


@pytest.fixture(scope="module")
def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Forty draws of two sets from the same two distributions."""
    return [(normal(300, 6, 2 * i), 1.2 * normal(500, 6, 2 * i + 1, shift=0.2)) for i in range(40)]


def test_frechet_standard_error_is_the_deviation_over_draws(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    values, errors = [], []
    for a, b in pairs:
        of_a, of_b = Statistics.of(a), Statistics.of(b)
        values.append(frechet_distance(of_a, of_b))
        errors.append(frechet_standard_error(a, b, of_a, of_b))
    assert 0.75 < np.mean(errors) / np.std(values) < 1.5


def test_frechet_standard_error_is_that_of_a_bootstrap_of_both_sides() -> None:
    a, b = normal(600, 3, 50), normal(400, 3, 51, shift=0.5)
    generator = torch.Generator().manual_seed(0)

    def again(features: torch.Tensor) -> Statistics:
        return Statistics.of(features[torch.randint(len(features), (len(features),), generator=generator)])

    drawn = np.std([frechet_distance(again(a), again(b)) for _ in range(200)])
    assert frechet_standard_error(a, b, Statistics.of(a), Statistics.of(b)) == pytest.approx(drawn, rel=0.2)


def test_frechet_of_endless_images_has_no_bias(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    truth = frechet_distance(Statistics.of(normal(200_000, 6, 90)), Statistics.of(1.2 * normal(200_000, 6, 91, shift=0.2)))
    finite, endless = [], []
    for a, b in pairs:
        of_a, of_b = Statistics.of(a), Statistics.of(b)
        finite.append(frechet_distance(of_a, of_b))
        estimate = frechet_infinity(a, b, frechet_standard_error(a, b, of_a, of_b))
        assert estimate is not None
        endless.append(estimate)
    bias = np.mean([each.value for each in endless]) - truth
    assert np.mean(finite) - truth > 4 * abs(bias)
    assert np.mean([each.low <= truth <= each.high for each in endless]) >= 0.85
    assert frechet_infinity(normal(26, 6, 1), normal(500, 6, 2), 0.1) is None  # below 4.5 images a dimension


def test_frechet_halves_are_disjoint_and_show_the_bias() -> None:
    features = normal(1000, 8, 60)
    few, many = frechet_halves(features, 50), frechet_halves(features, 10_000)
    assert few is not None and many is not None
    assert (few[1], many[1]) == (50, 500)
    assert few[0] > 4 * many[0] > 0
    twice = torch.cat([features[:2], features[:2] + 1])
    assert frechet_halves(twice, 2) is not None
    assert frechet_halves(features[:3], 9) is None


def test_statistics_of_a_large_set_are_read_in_pieces_of_a_mapped_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", normal(9000, 3, 70).numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    np.testing.assert_allclose(Statistics.of(mapped).cov, np.cov(np.load(tmp_path / "x.npy").astype(np.float64).T), rtol=1e-9)


def test_the_ratio_of_pairs_is_covered_and_narrower_than_two_distances() -> None:
    """Of Gaussians 2 and 3 from the real ones' mean in the first of three dimensions: 9 to 4, each pair from one draw."""
    inside, widths, alone = 0, list[float](), list[float]()
    for seed in range(60):
        real, noise, own = (normal(count, 3, 3 * seed + place) for place, count in enumerate((1000, 400, 400)))
        shift = torch.tensor([1.0, 0.0, 0.0])
        a, b = noise + 0.1 * own + 3 * shift, noise + 2 * shift
        ratio = frechet_ratio(a, b, real)
        inside += ratio.low <= 9 / 4 <= ratio.high
        widths.append(ratio.high - ratio.low)
        each = [frechet_standard_error(fake, real, Statistics.of(fake), Statistics.of(real)) / (9 if fake is a else 4) for fake in (a, b)]
        alone.append(2 * 1.96 * float(np.hypot(*each)) * 9 / 4)
    assert inside >= 52
    assert np.median(widths) < 0.5 * np.median(alone)
    same = frechet_ratio(b, b, real)
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
