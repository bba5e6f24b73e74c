"""Shards: written by `pack`, or by others, and read back."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import photo, settings, write_digits
from shard_helpers import faulty_server, files_of, write_tars

from maskdm.cli import run_command
from maskdm.data import Dataset, Source, inspect, open_source, pack, packing, prepare, shards
from maskdm.data.elsewhere import expand
from maskdm.data.remote import Remote
from maskdm.errors import UserError

SETTINGS = settings(channels=1, conditional=True)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "REMOTE", Remote(timeout=2.0, tries=20, pause=0.001))
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = write_digits(tmp_path_factory.mktemp("digits"), 60, classes=3)
    (folder / "c1" / "broken.png").write_text("no image")
    return open_source(str(folder))


@pytest.fixture(scope="module")
def data(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(source, SETTINGS, tmp_path_factory.mktemp("cache"))


def test_packed_images_have_the_same_pixels_and_classes(source: Source, data: Dataset, tmp_path: Path) -> None:
    index = pack(source, SETTINGS, tmp_path / "out", 25)
    assert [shard.images for shard in index.shards] == [25, 25, 10]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000000.tar",
        "000001.tar",
        "000002.tar",
        "index.json",
        "index.npy",
    ]
    names: list[str] = []
    for shard in index.shards:
        path = tmp_path / "out" / shard.name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
        with tarfile.open(path) as tar:
            names += [json.loads((tar.extractfile(each) or io.BytesIO()).read())["name"] for each in tar if each.name.endswith(".json")]
    assert names == list(data.names)
    opened = open_source(str(tmp_path / "out"))
    there = prepare(opened, SETTINGS, tmp_path / "cache")
    assert there.class_names == data.class_names and there.labels is not None
    assert np.array_equal(there.labels, data.labels)
    assert np.array_equal(there.images[np.arange(60)], data.images[np.arange(60)])
    assert np.array_equal(there.images[3:5], data.images[3:5])
    assert there.name_of(26) == "000001.tar#1" and len(there) == len(opened) == 60
    found = inspect(opened)
    assert (found.count, found.median_height, found.gray, found.class_counts) == (60, 8, True, (20, 20, 20))
    assert prepare(opened, settings((4, 4)), tmp_path).images[np.array([5])].shape == (1, 4, 4, 3)


def test_packing_goes_on_and_refuses_other_data(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, written, put = tmp_path / "out", list[str](), packing.put

    def stopped(path: Path, body: bytes) -> None:
        if path.name == "000002.tar":
            raise KeyboardInterrupt
        put(path, body)

    with monkeypatch.context() as patched:
        patched.setattr(packing, "put", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(source, SETTINGS, out, 25)
    with pytest.raises(UserError, match="other images or settings"):
        pack(source, SETTINGS, out, 20)
    (out / "000001.tar").write_bytes(b"cut off")
    monkeypatch.setattr(packing, "put", lambda path, body: (written.append(path.name), put(path, body))[0])
    index = pack(source, SETTINGS, out, 25)
    assert [name for name in written if name.endswith(".tar")] == ["000001.tar", "000002.tar"]
    assert index.key == pack(source, SETTINGS, tmp_path / "again", 25).key == pack(source, SETTINGS, out, 25).key
    with pytest.raises(UserError, match="other images or settings"):
        pack(source, settings(), out, 25)
    (out / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001.tar is missing"):
        pack(source, SETTINGS, out, 25)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UserError, match="holds other files"):
        pack(source, SETTINGS, tmp_path / "full", 25)
    with pytest.raises(UserError, match="--shard-images is 0"):
        pack(source, SETTINGS, tmp_path / "new", 0)


def test_too_many_broken_images_are_refused_and_the_command_packs(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"1 of 61 images .* cannot be read"):
        pack(source, settings(max_broken=0.0), tmp_path / "none", 25)
    assert not (tmp_path / "none" / "index.json").exists()
    assert run_command(["pack", source.name, "--out", str(tmp_path / "out"), "--shard-images", "50", "--image-size", "8"]) == 0
    assert "60 images in 2 shards" in (said := capsys.readouterr().out) and "1 that cannot be read left out" in said
    assert run_command(["data", str(tmp_path / "out")]) == 0
    assert "2 shards, 3 classes" in capsys.readouterr().out
    assert run_command(["pack", source.name, "--out", str(tmp_path / "out"), "--channels", "3"]) == 2
    assert "other images or settings" in capsys.readouterr().err


def test_shards_behind_a_faulty_server(source: Source, data: Dataset, tmp_path: Path) -> None:
    pack(source, SETTINGS, tmp_path / "out", 25)
    with faulty_server(files_of(tmp_path / "out", "/s"), stall=0.3) as (address, _):
        there = prepare(open_source(f"{address}/s/"), SETTINGS, tmp_path)
        assert np.array_equal(there.images[np.arange(60)], data.images[np.arange(60)])
        assert there.fingerprint == open_source(str(tmp_path / "out")).fingerprint()
        with pytest.raises(UserError, match=r"/t/index.json: 404"):
            open_source(f"{address}/t")


def test_a_damaged_index_is_refused(source: Source, tmp_path: Path) -> None:
    pack(source, SETTINGS, tmp_path / "out", 25)
    index = tmp_path / "out" / "index.json"
    whole = index.read_text()
    for text in (whole[:100], whole.replace("shards 1", "shards 9"), whole.replace('"images"', '"pictures"')):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index|maskdm pack"):
            open_source(str(tmp_path / "out"))
    index.write_text(whole)
    (tmp_path / "out" / "index.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"index.npy has another size"):
        open_source(str(tmp_path / "out"))


# --- shards of others ---


def test_tars_of_others_are_read_through_once(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tars(tmp_path / "tars", data, 3)
    for location in (str(tmp_path / "tars"), str(tmp_path / "tars" / "train-{000..002}.tar"), str(tmp_path / "tars" / "*.tar")):
        source = open_source(location)
        there = prepare(source, SETTINGS, tmp_path)
        assert np.array_equal(there.images[np.arange(60)], data.images[np.arange(60)])
        assert there.labels is not None and np.array_equal(there.labels, data.labels)
        assert inspect(source).gray and source.class_names == ("0", "1", "2")
    monkeypatch.setattr("maskdm.data.tars._scan", None)  # nothing is read again
    assert open_source(str(tmp_path / "tars")).fingerprint() == open_source(str(tmp_path / "tars")).fingerprint()


def test_tars_behind_a_faulty_server_with_one_missing(data: Dataset, tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", data, 3)
    files = files_of(tmp_path / "tars", "/t")
    with faulty_server(files, stall=0.3) as (address, _):
        source = open_source(f"{address}/t/train-{{000..003}}.tar")
        assert len(source) == 60 and "train-003.tar cannot be read" in source.notes[0]
        with pytest.raises(UserError, match=r"train-003.tar: .*404.*--max-broken 0.25"):
            prepare(source, SETTINGS, tmp_path)
        there = prepare(source, settings(channels=1, max_broken=0.25), tmp_path)
        assert np.array_equal(there.images[np.array([7, 3])], data.images[np.array([7, 3])])
        with pytest.raises(UserError, match="does not list"):
            open_source(f"{address}/t/*.tar")


def test_odd_tars_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all")
    with pytest.raises(UserError, match=r"no shard with images .*a.tar is no tar file"):
        open_source(str(tmp_path / "a.tar"))
    png = io.BytesIO()
    photo().resize((9, 7)).save(png, "PNG")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in ("x.png", "x.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png.getvalue())
            tar.addfile(member, io.BytesIO(png.getvalue()))
    with pytest.raises(UserError, match="several images of one name, such as x"):
        open_source(str(tmp_path / "b.tar"))
    with pytest.raises(UserError, match="no file that is there"):
        open_source(str(tmp_path / "*.parquet"))


def test_patterns() -> None:
    assert expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("{x,y}-{1..2}") == ["x-1", "x-2", "y-1", "y-2"]
    with pytest.raises(UserError, match="smaller number first"):
        expand("{5..1}")


def test_parquet_behind_a_url_is_packed(data: Dataset, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = []
    for row in range(20):
        png = io.BytesIO()
        photo(row % 2).resize((8, 8)).save(png, "PNG")
        rows.append({"image": {"bytes": png.getvalue(), "path": f"{row}.png"}, "label": row % 2})
    for part in (0, 1):
        parquet.write_table(arrow.Table.from_pylist(rows[part * 10 : part * 10 + 10]), tmp_path / f"train-{part}.parquet", row_group_size=4)
    local = prepare(open_source(str(tmp_path)), settings(), tmp_path / "cache")
    with faulty_server(files_of(tmp_path, "/p"), stall=0.3) as (address, _):
        there = open_source(f"{address}/p/train-{{0..1}}.parquet")
        index = pack(there, settings(), tmp_path / "out", 8)
    found = prepare(open_source(str(tmp_path / "out")), settings(), tmp_path)
    assert len(index) == 20 and np.array_equal(found.images[np.arange(20)], local.images[np.arange(20)])


def test_any_fsspec_url(source: Source, data: Dataset, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    pack(source, SETTINGS, tmp_path / "out", 25)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "out").iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    there = prepare(open_source("memory://bucket"), SETTINGS, tmp_path)
    assert np.array_equal(there.images[np.arange(60)], data.images[np.arange(60)])
    memory.rm_file("/bucket/index.json")
    assert np.array_equal(prepare(open_source("memory://bucket"), SETTINGS, tmp_path).labels, data.labels)
    with pytest.raises(UserError, match="holds no shards"):
        open_source("memory://empty")
    with pytest.raises(UserError, match="nothing-like-it"):
        open_source("nothing-like-it://a/b")
