from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskdm.data.lanes import Lanes, num_lanes
from maskdm.errors import UserError

COUNTS = np.array([7, 30, 0, 12, 51, 3], dtype=np.int64)


def lanes(seed: int = 1, batch: int = 12, start: int = 0, window: int = 5) -> Lanes:
    return Lanes(COUNTS, batch, seed, start, window, 4)


@given(batch=st.integers(1, 150), window=st.integers(1, 200), start=st.integers(0, 1000), most=st.integers(1, 20))
def test_every_image_comes_once_an_epoch(batch: int, window: int, start: int, most: int) -> None:
    order = Lanes(COUNTS, batch, 3, start, window, most)
    for epoch in range(2):
        assert np.array_equal(np.sort(order.indices_at(start + epoch * 103, 103)), np.arange(103))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_order_is_that_of_one_process_and_goes_on_after_two_kills(ranks: int) -> None:
    whole = lanes().indices_at(0, 20 * 12)
    seen: list[np.ndarray] = []
    for first, last in ((0, 5), (5, 11), (11, 20)):  # fresh objects: a process that was killed knows its position alone
        parts = [lanes() for _ in range(ranks)]
        share = 12 // ranks
        for step in range(first, last):
            seen += [part.indices_at(step * 12 + rank * share, share) for rank, part in enumerate(parts)]
    assert np.array_equal(np.concatenate(seen), whole)


def test_orders_differ_by_epoch_and_seed() -> None:
    assert not np.array_equal(lanes().indices_at(0, 103), lanes().indices_at(103, 103))
    assert not np.array_equal(lanes().indices_at(0, 103), lanes(seed=2).indices_at(0, 103))


def test_a_slice_of_the_batch_reads_few_shards() -> None:
    order = Lanes(np.full(64, 20, dtype=np.int64), 16, 0, 0, 10, 16)
    shards = {int(image) // 20 for step in range(80) for image in order.indices_at(step * 16, 4)}
    assert len(shards) <= 64 // 4 + 1


def test_windows_and_positions_belong_together() -> None:
    order = lanes(start=7)
    positions = np.arange(7, 7 + 3 * 103)
    windows, within = order.windows_at(positions)
    for window in set(windows):
        mine = [i for i, each in enumerate(windows) if each == window]
        assert np.array_equal(order.positions(window), positions[mine]) and within[mine].tolist() == list(range(len(mine)))
        assert np.array_equal(order.images(window), [order.indices_at(int(p), 1)[0] for p in positions[mine]])
    with pytest.raises(ValueError, match="before the stage"):
        order.indices_at(6, 1)


def test_lanes_divide_the_batch() -> None:
    assert [num_lanes(batch, 16) for batch in (1, 12, 17, 24, 64)] == [1, 12, 1, 12, 16]
    with pytest.raises(UserError, match="no images"):
        Lanes(np.zeros(2, dtype=np.int64), 4, 0, 0, 5, 4)
