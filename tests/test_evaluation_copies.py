"""Copies are found, also mirrored, shifted or slightly changed; new images are not taken for copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdm.evaluation import ImageSet, Searcher
from maskdm.evaluation.copies import THRESHOLD, aligned, coarse, thumbnails


def pictures(count: int, seed: int, size: int = 32, channels: int = 3) -> Tensor:
    """Smooth random pictures, as photographs are: random low frequencies."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(count, channels, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(rough, size=(size, size), mode="bicubic").clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8)


def features(images: Tensor) -> Tensor:
    """A stand-in for a network: averages of 4 x 4 fields."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def searcher(training: Tensor) -> Searcher:
    images = ImageSet(training.permute(0, 2, 3, 1).numpy(), np.arange(len(training)), "t")
    return Searcher(images, features(training), np.arange(len(training)))


CHANGES = {
    "exact": lambda x: x,
    "mirrored": lambda x: x.flip(-1),
    "shifted": lambda x: torch.cat([x[..., 2:, :], x[..., :2, :]], dim=-2),
    "noisy": lambda x: (x.float() + 4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255).to(torch.uint8),
}


@pytest.mark.parametrize("name", CHANGES)
def test_copies_are_suspected_and_named(name: str) -> None:
    training = pictures(300, 0)
    copies = CHANGES[name](training[20:40])
    found = searcher(training).match(copies, features(copies), features(copies.flip(-1)))
    assert found.suspected.all()
    assert found.pixel_places.tolist() == list(range(20, 40))
    assert [found.place(i) for i in range(20)] == list(range(20, 40))
    assert found.mirrored.all() == (name == "mirrored")
    if name == "shifted":
        assert found.shifts.tolist() == [[2, 0]] * 20
        assert (found.pixel_distances < 1e-3).all()


def test_new_pictures_are_not_suspected() -> None:
    new = pictures(100, 1)
    found = searcher(pictures(300, 0)).match(new, features(new), features(new.flip(-1)))
    assert not found.suspected.any()
    assert (found.ratios > THRESHOLD).all()


def test_a_copy_of_what_is_in_the_data_five_times_is_still_found() -> None:
    training = torch.cat([pictures(300, 0), pictures(1, 7).repeat(5, 1, 1, 1)])
    copy = pictures(1, 7)
    assert searcher(training).match(copy, features(copy), features(copy.flip(-1))).suspected.all()


def test_a_copy_of_what_is_in_the_data_more_often_than_neighbours_are_counted_is_one_too() -> None:
    training = pictures(1, 3).repeat(40, 1, 1, 1)
    both = torch.cat([training[:1], pictures(1, 4)])
    found = searcher(training).match(both, features(both), features(both.flip(-1)))
    assert found.ratios.tolist() == [0, 1]
    assert found.suspected.tolist() == [True, False]


def test_feature_matches_of_a_drawn_reference_are_places_of_the_whole_set() -> None:
    training = pictures(200, 0)
    drawn = np.arange(100, 200)
    images = ImageSet(training.permute(0, 2, 3, 1).numpy(), np.arange(200), "t")
    found = Searcher(images, features(training[100:]), drawn).match(training[150:152], features(training[150:152]), features(training[:2]))
    assert found.feature_places.tolist() == [150, 151]
    assert found.pixel_places.tolist() == [150, 151]


def test_aligned_is_brute_force_over_shifts() -> None:
    images, others = pictures(2, 4, size=16, channels=1), pictures(6, 5, size=16, channels=1).view(2, 3, 1, 16, 16)
    found, shifts = aligned(images, others)
    for i in range(2):
        for j in range(3):
            own, other = images[i, 0].numpy().astype(float), others[i, j, 0].numpy().astype(float)
            best = {}
            for down in (-1, 0, 1):
                for across in (-1, 0, 1):
                    rows, columns = range(max(0, -down), 16 - max(0, down)), range(max(0, -across), 16 - max(0, across))
                    differences = [(own[r, c] - other[r + down, c + across]) ** 2 for r in rows for c in columns]
                    best[down, across] = np.mean(differences) ** 0.5
            assert float(found[i, j]) == pytest.approx(min(best.values()), rel=1e-4)
            assert best[tuple(shifts[i, j].tolist())] == pytest.approx(min(best.values()), rel=1e-4)


def test_large_pictures_are_compared_small() -> None:
    large = pictures(3, 6, size=96)[:, :, :48]
    assert thumbnails(large).shape == (3, 3, 16, 32)
    assert coarse(thumbnails(large)).shape == (3, 3 * 8 * 8)
    assert thumbnails(pictures(1, 0, size=8)).shape == (1, 3, 8, 8)
