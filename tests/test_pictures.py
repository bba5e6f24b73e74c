from __future__ import annotations

import numpy as np

from maskdm.pictures import HIDDEN, grid, hide, side_by_side


def test_grid_places_images_in_rows_and_enlarges_by_whole_factors() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((5, 1, 8, 8), 50, dtype=np.uint8)
    picture = np.asarray(grid(images, columns=3, tile=16))
    assert picture.shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    for i in range(5):
        assert (picture[2 + i // 3 * 18 : 18 + i // 3 * 18, 2 + i % 3 * 18 : 18 + i % 3 * 18] == 50 * i).all()
    assert (picture[20:, 38:] == 255).all()  # the sixth place is empty
    wide = np.asarray(grid(np.zeros((1, 3, 40, 80), dtype=np.uint8), columns=1, tile=64))
    assert wide.shape == (44, 84, 3)  # larger than a tile already: not shrunk


def test_side_by_side_has_both_grids() -> None:
    left, right = np.zeros((4, 1, 8, 8), dtype=np.uint8), np.full((4, 1, 8, 8), 200, dtype=np.uint8)
    picture = np.asarray(side_by_side(left, right, 2, ("generated", "real"), ["a", "a class with a very long name"], tile=16))
    middle = picture[26:]
    assert (middle == 200).all(axis=2).sum() == (middle == 0).all(axis=2).sum() == 4 * 16 * 16


def test_hidden_patches_are_grey_and_kept_ones_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 100, (3, 4, 6), dtype=np.uint8)
    shown = hide(image, [1, 5], 2)
    assert (shown[:, 0:2, 2:4] == image[:, 0:2, 2:4]).all() and (shown[:, 2:4, 4:6] == image[:, 2:4, 4:6]).all()
    assert (shown[:, 0:2, 0:2] == np.array(HIDDEN)[:, None, None]).all()
