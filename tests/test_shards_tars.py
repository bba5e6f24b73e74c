from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import settings
from shard_helpers import faulty_server

from maskdm.data import Dataset, open_source, prepare
from maskdm.data.remote import LostShard, Remote
from maskdm.data.tars import pack, read_image, read_index
from maskdm.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(open_source("digits"), settings(), tmp_path_factory.mktemp("cache"))


def test_packed_images_have_the_same_pixels_and_classes(data: Dataset, tmp_path: Path) -> None:
    index = pack(data, tmp_path / "out", 500)
    assert read_index(tmp_path / "out" / "index.json") == index
    assert index.counts.tolist() == [500, 500, 500, 297]
    row = 0
    for shard in index.shards:
        assert hashlib.sha256((tmp_path / "out" / shard.name).read_bytes()).hexdigest() == shard.sha256
        with tarfile.open(tmp_path / "out" / shard.name) as tar:
            for each in range(len(shard.images)):
                assert np.array_equal(read_image(Remote(), str(tmp_path / "out"), shard, each), data.images[row])
                label = tar.extractfile(f"{row:09d}.cls")
                assert label is not None and data.labels is not None and int(label.read()) == data.labels[row]
                row += 1
    assert row == len(data)


def test_packing_goes_on_and_refuses_other_data(data: Dataset, tmp_path: Path) -> None:
    whole = pack(data, tmp_path, 900)
    (tmp_path / "index.json").rename(tmp_path / "index.partial.json")
    (tmp_path / "000001.tar").write_bytes(b"cut off")
    before = (tmp_path / "000000.tar").stat().st_mtime_ns
    assert pack(data, tmp_path, 900) == whole
    assert (tmp_path / "000000.tar").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another size"):
        pack(data, tmp_path, 800)
    with pytest.raises(UserError, match="too few"):
        pack(data, tmp_path, 0)


def test_images_come_from_a_faulty_server_and_damage_is_named(data: Dataset, tmp_path: Path) -> None:
    shard = pack(data, tmp_path, 2000).shards[0]
    body = (tmp_path / shard.name).read_bytes()
    with faulty_server({f"/{shard.name}": body}, stall=0.3) as (address, _):
        remote = Remote(timeout=0.1, tries=4, pause=0.001)
        assert np.array_equal(read_image(remote, address, shard, 77), data.images[77])
    start = shard.images[3][0]
    (tmp_path / shard.name).write_bytes(body[:start] + b"x" * 20 + body[start + 20 :])
    with pytest.raises(LostShard, match="image 3 is damaged"):
        read_image(Remote(), str(tmp_path), shard, 3)
