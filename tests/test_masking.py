from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from maskdm.config import BlockMask, CropMask, DecodeMask, DeferMask, Mask, NoMask, PatchMask, RouteMask, ViewsMask
from maskdm.masking import draw, draw_route, hidden_rate, num_kept, take


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def masks(drawn: st.DrawFn) -> tuple[Mask, tuple[int, int]]:
    block = drawn(st.sampled_from([1, 2, 4]))
    grid = (block * drawn(st.integers(1, 5)), block * drawn(st.integers(1, 5)))
    ratio = drawn(st.floats(0, 0.99))
    crop = drawn(st.integers(1, min(grid)))
    return drawn(st.sampled_from([PatchMask(ratio), BlockMask(ratio, block), CropMask(crop)])), grid


@given(masks(), st.integers(1, 9), st.integers(0, 2**60))
@settings(max_examples=200, deadline=None)
def test_kept_patches_are_valid_sorted_distinct_and_of_the_stated_number(case: tuple[Mask, tuple[int, int]], batch: int, seed: int) -> None:
    mask, grid = case
    kept = draw(mask, batch, grid, generator(seed))
    if num_kept(mask, grid) == grid[0] * grid[1]:
        assert kept is None
        return
    assert kept is not None
    assert kept.shape == (batch, num_kept(mask, grid))
    assert kept.min() >= 0 and kept.max() < grid[0] * grid[1]
    assert (kept.diff(dim=1) > 0).all()
    assert hidden_rate(mask, grid) == pytest.approx(1 - kept.shape[1] / (grid[0] * grid[1]))


@pytest.mark.parametrize(
    ("mask", "rate"),
    [
        (PatchMask(0.1), 25 / 256),
        (PatchMask(0.9), 230 / 256),
        (BlockMask(0.9, 4), 14 / 16),  # the paper's "90 %" hides 87.5 %
        (BlockMask(0.9, 2), 57 * 4 / 256),
        (BlockMask(0.9, 8), 3 / 4),
        (CropMask(15), 1 - 225 / 256),
        (CropMask(11), 1 - 121 / 256),
        (CropMask(5), 1 - 25 / 256),
        (NoMask(), 0.0),
    ],
)
def test_true_rates_on_the_papers_grid(mask: Mask, rate: float) -> None:
    assert hidden_rate(mask, (16, 16)) == pytest.approx(rate)


@pytest.mark.parametrize("mask", [PatchMask(0.75), BlockMask(0.75, 2)])
def test_every_patch_is_kept_equally_often(mask: Mask) -> None:
    draws, total = 4000, 64
    kept = draw(mask, draws, (8, 8), generator())
    assert kept is not None
    counts = torch.bincount(kept.flatten(), minlength=total).double()
    unit = counts if isinstance(mask, PatchMask) else counts.reshape(4, 2, 4, 2)[:, 0, :, 0].flatten()  # blocks are the free units
    share = kept.shape[1] / total
    # chosen without replacement, a unit's count has variance draws * share * (1 - share), correlated by -1 / (units - 1)
    units = unit.numel()
    statistic = ((unit - draws * share) ** 2).sum() / (draws * share * (1 - share)) * (units - 1) / units
    assert chi2.ppf(0.0001, units - 1) < statistic < chi2.ppf(0.9999, units - 1)


def test_pairs_of_patches_are_kept_together_as_chance_has_it() -> None:
    kept = draw(PatchMask(0.5), 20_000, (3, 3), generator())
    assert kept is not None
    seen = torch.zeros(20_000, 9).scatter_(1, kept, 1.0)
    together = (seen.T @ seen / 20_000)[~torch.eye(9, dtype=torch.bool)]
    expected = 5 / 9 * 4 / 8
    assert (together - expected).abs().max() < 5 * (expected * (1 - expected) / 20_000) ** 0.5


def test_blocks_are_aligned_and_whole() -> None:
    kept = draw(BlockMask(0.6, 4), 50, (16, 8), generator())
    assert kept is not None
    seen = torch.zeros(50, 128).scatter_(1, kept, 1.0).reshape(50, 4, 4, 2, 4)
    per_block = seen.sum(dim=(2, 4))
    assert set(per_block.unique().tolist()) == {0.0, 16.0}


def test_crop_is_one_window_at_every_place_equally_often() -> None:
    kept = draw(CropMask(3), 9000, (5, 5), generator())
    assert kept is not None
    corner = kept[:, 0]
    window = torch.tensor([0, 1, 2, 5, 6, 7, 10, 11, 12])
    assert (kept == corner[:, None] + window).all()
    counts = torch.bincount(corner, minlength=25)[[0, 1, 2, 5, 6, 7, 10, 11, 12]].double()
    assert counts.sum() == 9000
    statistic = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2.ppf(0.0001, 8) < statistic < chi2.ppf(0.9999, 8)


@pytest.mark.parametrize("mask", [PatchMask(0.75), BlockMask(0.5, 2), CropMask(3), ViewsMask(4)])
def test_many_generators_draw_what_each_draws_alone(mask: Mask) -> None:
    together = draw(mask, 24, (8, 8), *(generator(seed) for seed in range(3)))
    alone = [draw(mask, 8, (8, 8), generator(seed)) for seed in range(3)]
    assert together is not None and torch.equal(together, torch.cat([kept for kept in alone if kept is not None]))


@pytest.mark.parametrize("mask", [RouteMask(0.5, 1), RouteMask(0.75, 1, True), DeferMask(0.75), DecodeMask(0.5)])
def test_and_so_do_routes(mask: Mask) -> None:
    together = draw_route(mask, 24, (8, 8), *(generator(seed) for seed in range(3)))
    alone = [draw_route(mask, 8, (8, 8), generator(seed)) for seed in range(3)]
    assert together is not None and together.kept is not None
    assert torch.equal(together.kept, torch.cat([route.kept for route in alone if route is not None and route.kept is not None]))


def test_take_gathers_and_none_keeps_all() -> None:
    patches = torch.arange(24.0).reshape(2, 4, 3)
    assert torch.equal(take(patches, torch.tensor([[0, 2], [1, 3]])), torch.stack([patches[0, [0, 2]], patches[1, [1, 3]]]))
    assert take(patches, None) is patches
    assert draw(NoMask(), 3, (4, 4), generator()) is None
