"""Arrays computed piece by piece: kept, resumed, shared, and refused before a disk is full."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from maskdm.engine import Ranks
from maskdm.evaluation import fill
from maskdm.evaluation.pieces import PIECE

COUNT = 3 * PIECE + 10


class Maker:
    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.made: list[int] = []

    def __call__(self, rows: slice) -> NDArray[np.float32]:
        if rows.start == self.fails_at:
            raise KeyboardInterrupt
        self.made.append(rows.start)
        return np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] * np.array([1, 2], dtype=np.float32)


EXPECTED = np.arange(COUNT, dtype=np.float32)[:, None] * np.array([1, 2], dtype=np.float32)


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    maker, said = Maker(), []
    found = fill(tmp_path / "x.npy", (COUNT, 2), np.float32, maker, Ranks(), lambda done, total: said.append((done, total)))
    np.testing.assert_array_equal(found, EXPECTED)
    assert said[-1] == (COUNT, COUNT)
    found[0] = -1  # a mapped copy: the file stays as it is
    np.testing.assert_array_equal(fill(tmp_path / "x.npy", (COUNT, 2), np.float32, maker, Ranks()), EXPECTED)
    assert len(maker.made) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_after_a_kill_only_what_is_missing_is_made(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "x.npy", (COUNT, 2), np.float32, Maker(fails_at=2 * PIECE), Ranks())
    assert not (tmp_path / "x.npy").exists()
    again = Maker()
    np.testing.assert_array_equal(fill(tmp_path / "x.npy", (COUNT, 2), np.float32, again, Ranks()), EXPECTED)
    assert again.made == [2 * PIECE, 3 * PIECE]


def test_what_was_left_of_another_shape_is_not_taken_over(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "x.npy", (COUNT + 1, 2), np.float32, Maker(fails_at=PIECE), Ranks())
    again = Maker()
    np.testing.assert_array_equal(fill(tmp_path / "x.npy", (COUNT, 2), np.float32, again, Ranks()), EXPECTED)
    assert len(again.made) == 4


def test_what_is_kept_of_another_shape_or_type_is_made_anew(tmp_path: Path) -> None:
    for kept in (EXPECTED[:-1], EXPECTED.astype(np.float64), EXPECTED[:, :1]):
        np.save(tmp_path / "x.npy", kept)
        found = fill(tmp_path / "x.npy", (COUNT, 2), np.float32, Maker(), Ranks())
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, EXPECTED)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-8])
    np.testing.assert_array_equal(fill(tmp_path / "x.npy", (COUNT, 2), np.float32, Maker(), Ranks()), EXPECTED)


@pytest.mark.parametrize("overtaken_at", [PIECE, 3 * PIECE])
def test_the_slower_of_two_takes_what_the_quicker_made(tmp_path: Path, overtaken_at: int) -> None:
    maker, other = Maker(), Maker()

    def overtaken(rows: slice) -> NDArray[np.float32]:
        if rows.start == overtaken_at:
            fill(tmp_path / "x.npy", (COUNT, 2), np.float32, other, Ranks())
        return maker(rows)

    np.testing.assert_array_equal(fill(tmp_path / "x.npy", (COUNT, 2), np.float32, overtaken, Ranks()), EXPECTED)
    assert other.made[0] == overtaken_at
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_a_file_missing_for_another_reason_is_an_error(tmp_path: Path) -> None:
    def lost(_: slice) -> NDArray[np.float32]:
        raise FileNotFoundError("an image")

    with pytest.raises(FileNotFoundError, match="an image"):
        fill(tmp_path / "x.npy", (COUNT, 2), np.float32, lost, Ranks())


def test_a_full_disk_is_an_error_before_the_first_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    maker = Maker()
    with pytest.raises(OSError, match="No space"):
        fill(tmp_path / "x.npy", (COUNT, 2), np.float32, maker, Ranks())
    assert maker.made == []
    assert not (tmp_path / "x.partial").exists()
