from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from shard_helpers import faulty_server

from maskdm.data import remote
from maskdm.data.lanes import Lanes
from maskdm.data.remote import LostShard, RangeFile, Remote
from maskdm.errors import UserError

FAST = Remote(timeout=0.1, tries=4, pause=0.001)
COUNTS = np.array([7, 9, 4, 16], dtype=np.int64)
SIZE = 8
"""Bytes of a record: here it is the number of its image."""


@pytest.mark.parametrize("ranges", [True, False])
def test_bytes_are_right_through_drops_and_stalls(ranges: bool) -> None:
    body = np.random.default_rng(0).bytes(300_000)
    with faulty_server({"/a": body}, stall=0.3, ranges=ranges) as (address, requests):
        for start, length in ((0, 300_000), (1234, 200_000), (299_999, 1)):
            assert FAST.read(f"{address}/a", start, length) == body[start : start + length]
    assert len(requests) > 3


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_record_comes_once_over_a_faulty_server_with_two_kills(ranks: int) -> None:
    firsts = np.concatenate([[0], np.cumsum(COUNTS)])
    files = {f"/{n}": np.arange(firsts[n], firsts[n + 1], dtype="<i8").tobytes() for n in range(len(COUNTS))}
    seen: list[int] = []
    with faulty_server(files, stall=0.3) as (address, _):
        for first, last in ((0, 1), (1, 4), (4, 6)):  # each part by fresh readers, which know their position alone
            for rank in range(ranks):
                lanes = Lanes(COUNTS, 6, 0, 0, 4, 3)
                for step in range(first, last):
                    for image in lanes.indices_at(step * 6 + rank * 6 // ranks, 6 // ranks):
                        shard = int(np.searchsorted(firsts, image, side="right")) - 1
                        start = int(image - firsts[shard]) * SIZE
                        seen.append(int(np.frombuffer(FAST.read(f"{address}/{shard}", start, SIZE), "<i8")[0]))
    assert sorted(seen) == list(range(36))


def test_a_server_that_trickles_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SLOWEST", 10**9)
    with faulty_server({"/a": bytes(1 << 20)}, stall=0.05) as (address, _):
        slow = Remote(timeout=1.0, tries=1000, pause=0.1, patience=0.1)
        began = time.monotonic()
        with pytest.raises(LostShard, match="not read within 0 s"):
            slow.read(f"{address}/a", 0, 1 << 20)
        assert time.monotonic() - began < 5


def test_sizes_names_and_files_in_pieces(tmp_path: Path) -> None:
    body = np.random.default_rng(0).bytes(100_000)
    with faulty_server({"/a": body}, stall=0.2) as (address, _):
        assert FAST.size(f"{address}/a") == 100_000 and FAST.read_all(f"{address}/a") == body
        with io.BufferedReader(RangeFile(FAST, f"{address}/a", 100_000), 4096) as file:
            assert file.seek(-10, io.SEEK_END) == 99_990 and file.read() == body[-10:]
            file.seek(5000)
            assert file.read(20) == body[5000:5020] and file.tell() == 5020
        with pytest.raises(LostShard, match="404"):
            FAST.size(f"{address}/b")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_bytes(b"12345")
    assert FAST.names(str(tmp_path)) == FAST.names("file://" + str(tmp_path)) == ["x/a"]
    assert FAST.size("file://" + str(tmp_path / "x" / "a")) == FAST.size(str(tmp_path / "x" / "a")) == 5
    with pytest.raises(UserError, match="no-such-thing"):
        FAST.size("no-such-thing://a")


def test_a_missing_or_damaged_shard_is_named(tmp_path: Path) -> None:
    with faulty_server({"/short": b"1234"}, stall=0.3) as (address, requests):
        with pytest.raises(LostShard, match="/none: 404"):
            FAST.read(f"{address}/none", 0, 4)
        assert len(requests) == 1
        with pytest.raises(LostShard, match="/short"):
            FAST.read(f"{address}/short", 0, 8)
    (tmp_path / "short").write_bytes(b"1234")
    assert FAST.read(str(tmp_path / "short"), 1, 2) == b"23"
    with pytest.raises(LostShard, match="short: ends before byte 8"):
        FAST.read(str(tmp_path / "short"), 0, 8)
    with pytest.raises(LostShard, match="none: No such file"):
        FAST.read(str(tmp_path / "none"), 0, 8)
    assert FAST.read("file://" + str(tmp_path / "short"), 0, 4) == b"1234"
