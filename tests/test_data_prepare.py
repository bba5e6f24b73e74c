from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import SHARED, digit, photo, settings, touch_later, write_digits

from maskdm.data import Dataset, decode, duplicates, inspect, open_source, prepare
from maskdm.errors import UserError

MODULE = sys.modules["maskdm.data.prepare"]  # as an attribute of the package, that name is the function


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "images", 20, classes=2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def ready(folder: Path | str, cache: Path, **changes: object) -> Dataset:
    return prepare(open_source(str(folder)), settings(channels=1, **changes), cache)


def refused(folder: Path | str, cache: Path, *words: str, **changes: object) -> None:
    with pytest.raises(UserError) as caught:
        ready(folder, cache, **changes)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_pixels_labels_and_names_are_those_of_the_source(folder: Path, cache: Path) -> None:
    data = ready(folder, cache)
    assert data.images.shape == (20, 8, 8, 1)
    assert data.images.dtype == np.uint8
    assert data.class_names == ("c0", "c1")
    assert data.labels is not None
    assert data.labels.tolist() == [0] * 10 + [1] * 10
    for row in range(20):
        assert np.array_equal(data.images[row, ..., 0], np.asarray(digit(int(Path(data.name_of(row)).stem))))
    assert data.broken == ()
    assert data.fingerprint == open_source(str(folder)).fingerprint()
    with pytest.raises(ValueError, match="read-only"):
        data.images[0] = 0


def test_manifest_tells_of_every_item(folder: Path, cache: Path) -> None:
    (folder / "c0" / "bad.png").write_text("text")
    data = ready(folder, cache, max_broken=1.0)
    lines = [json.loads(line) for line in (data.path / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 21
    bad = next(line for line in lines if line["name"] == "c0/bad.png")
    assert (bad["index"], bad["notes"]) == (None, ["not an image"])
    assert sorted(line["index"] for line in lines if line["index"] is not None) == list(range(20))
    summary = json.loads((data.path / "summary.json").read_text())
    assert summary["settings"]["image_size"] == [8, 8]
    assert (summary["count"], summary["content_hash"]) == (20, data.content_hash)


def test_second_call_decodes_nothing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ready(folder, cache)
    monkeypatch.setattr(MODULE, "_decode_one", lambda *_: pytest.fail("decoded again"))
    second = ready(folder, cache)
    assert (second.path, second.content_hash, second.notes) == (first.path, first.content_hash, first.notes)
    assert ready(folder, cache, conditional=True).path == first.path


@pytest.mark.parametrize("change", [{"size": (8, 12)}, {"fit": "pad"}, {"background": "#000000"}], ids=["size", "fit", "background"])
def test_settings_that_change_pixels_have_their_own_cache(folder: Path, cache: Path, change: dict[str, object]) -> None:
    assert ready(folder, cache).path != ready(folder, cache, **change).path


def test_rebuilt_when_a_file_changes(folder: Path, cache: Path) -> None:
    before = ready(folder, cache)
    digit(99).save(folder / "c0" / "0000.png")
    touch_later(folder / "c0" / "0000.png")
    after = ready(folder, cache)
    assert after.content_hash != before.content_hash
    assert np.array_equal(after.images[0, ..., 0], np.asarray(digit(99)))


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "hashes.npy", "manifest.jsonl", "summary.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_cache_is_rebuilt(folder: Path, cache: Path, name: str, damage: str) -> None:
    good = ready(folder, cache)
    expected = good.images.copy()
    file = good.path / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    again = ready(folder, cache)
    assert np.array_equal(again.images, expected)
    assert again.name_of(19) == "c1/0019.png"
    assert [entry.name for entry in cache.iterdir()] == [good.path.name]


def test_order_does_not_depend_on_threads(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_digits(tmp_path / "many", 150)
    decode_one = MODULE._decode_one

    def slow_at_first(source: object, settings: object, index: int) -> object:
        time.sleep(0.05 if index == 0 else 0)
        return decode_one(source, settings, index)

    monkeypatch.setattr(MODULE, "_decode_one", slow_at_first)
    monkeypatch.setattr(MODULE, "CHUNK_ITEMS", 7)
    seen: list[tuple[int, int]] = []
    data = prepare(open_source(str(folder)), settings(channels=1), cache, lambda done, total: seen.append((done, total)))
    assert [np.array_equal(data.images[i, ..., 0], np.asarray(digit(i))) for i in range(150)] == [True] * 150
    assert seen == sorted(seen)
    assert seen[-1] == (150, 150)


# --- broken images ------------------------------------------------------------------------------------------------


def test_few_broken_files_are_left_out_and_listed(tmp_path: Path, cache: Path) -> None:
    folder = write_digits(tmp_path / "images", 40)
    photo().save(folder / "0003.jpg")
    whole = (folder / "0003.jpg").read_bytes()
    (folder / "0003.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "0007b.png").write_bytes(b"")
    data = ready(folder, cache)
    assert [name for name, _ in data.broken] == ["0003.jpg", "0007b.png"]
    assert "truncated" in data.broken[0][1]
    assert data.broken[1][1] == "empty file"
    assert len(data) == 40
    assert np.array_equal(data.images[39, ..., 0], np.asarray(digit(39)))
    assert data.name_of(4) == "0004.png"
    assert ready(folder, cache).broken == data.broken


def test_too_many_broken_files_are_refused_with_the_way_out(tmp_path: Path, cache: Path) -> None:
    folder = write_digits(tmp_path / "images", 6)
    for index in range(4):
        (folder / f"x{index}.png").write_text("text")
    for _ in range(2):  # the second time from the cache
        refused(folder, cache, "4 of 10", "x0.png: not an image", "--max-broken 0.4")
    assert len(ready(folder, cache, max_broken=0.4).broken) == 4


def test_the_share_that_a_refusal_gives_is_accepted(tmp_path: Path, cache: Path) -> None:
    folder = write_digits(tmp_path / "images", 71)
    for index in range(29):
        (folder / f"x{index}.png").write_text("text")
    refused(folder, cache, "--max-broken 0.29")
    assert len(ready(folder, cache, max_broken=0.29).broken) == 29


def test_a_damaged_table_costs_only_the_rows_that_are_lost(tmp_path: Path, cache: Path) -> None:
    source = open_source("digits")

    def read(index: int) -> object:
        if index == 5:
            raise OSError("Corrupt snappy compressed data.\nand more")
        return source.read(index)

    data = prepare(replace(source, read=read), settings(), cache)
    assert data.broken == (("digit 0005", "cannot be read (Corrupt snappy compressed data.)"),)
    assert len(data) == 1796


def test_no_image_or_one_is_refused(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_text("text")
    refused(folder, cache, "no image", "a.png: not an image", max_broken=1.0)
    assert list(cache.iterdir()) == []
    digit(0).save(folder / "b.png")
    refused(folder, cache, "only one image", max_broken=1.0)


def test_classes_must_exist_to_be_learnt(tmp_path: Path, cache: Path) -> None:
    refused(write_digits(tmp_path / "flat", 4), cache, "no classes", "--conditional", conditional=True)
    np.savez(tmp_path / "a.npz", x=np.stack([np.asarray(digit(i)) for i in range(4)]), y=[0, 1, -1, 0], classes=["a", "b"])
    refused(tmp_path / "a.npz", cache, "1 of 4", "no class", conditional=True)


def test_what_was_done_is_said_once(tmp_path: Path, cache: Path) -> None:
    folder = write_digits(tmp_path / "images", 3)
    for index in range(2):
        clear = photo()
        clear.putalpha(100)
        clear.save(folder / f"clear{index}.png")
    (folder / "notes.txt").write_text("x")
    notes = ready(folder, cache).notes
    assert any(note.startswith("2 images transparent") for note in notes)
    assert any(".txt" in note for note in notes)
    assert ready(folder, cache).notes == notes


# --- killed processes, full disks ---------------------------------------------------------------------------------


def test_killed_process_leaves_nothing_harmful(tmp_path: Path, cache: Path) -> None:
    folder = write_digits(tmp_path / "images", 200)
    script = (
        "import sys, os, signal; from pathlib import Path\n"
        "from maskdm.data import open_source, prepare; from maskdm.config import Data\n"
        f"prepare(open_source({str(folder)!r}), Data(source='x', image_size=(8, 8), channels=1), Path({str(cache)!r}),"
        " lambda done, total: os.kill(os.getpid(), signal.SIGKILL))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=env, check=False, capture_output=True).returncode == -9
    assert [entry.name.startswith(".partial-") for entry in cache.iterdir()] == [True]
    data = ready(folder, cache)
    assert len(data) == 200
    assert [entry.name for entry in cache.iterdir()] == [data.path.name]


def test_only_stale_temporary_folders_are_removed(folder: Path, cache: Path) -> None:
    import socket

    names = {
        f".partial-{socket.gethostname()}-{os.getpid()}-alive": True,
        ".partial-else-where-1-new": True,
        ".partial-elsewhere-1-old": False,
    }
    for name in names:
        (cache / name).mkdir(parents=True)
        if name.endswith("old"):
            os.utime(cache / name, (0, 0))
    ready(folder, cache)
    assert {name: (cache / name).is_dir() for name in names} == names


def test_interrupt_cleans_up(tmp_path: Path, cache: Path) -> None:
    folder = write_digits(tmp_path / "images", 100)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(open_source(str(folder)), settings(channels=1), cache, interrupt)
    assert list(cache.iterdir()) == []


def test_a_writer_that_was_faster_is_welcome(folder: Path, cache: Path) -> None:
    other = cache.with_name("other")
    expected = ready(folder, other)

    def finish_first(done: int, total: int) -> None:
        if not (cache / expected.path.name).exists():
            shutil.copytree(expected.path, cache / expected.path.name)

    data = prepare(open_source(str(folder)), settings(channels=1), cache, finish_first)
    assert data.content_hash == expected.content_hash
    assert [entry.name for entry in cache.iterdir()] == [expected.path.name]


def test_full_disk_is_said(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MODULE, "_write_header", full)
    refused(folder, cache, "full", str(cache), "MASKDM_CACHE")
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(folder, tmp_path / "file" / "cache", "cannot be written", "MASKDM_CACHE")


# --- splits and duplicates ----------------------------------------------------------------------------------------


def fake(hashes: np.ndarray, labels: np.ndarray | None = None) -> Dataset:
    """A data set of given pixel hashes, for splits alone."""
    wide = np.zeros((len(hashes), 32), np.uint8)
    wide[:, :8] = np.asarray(hashes, dtype=np.uint64).view(np.uint8).reshape(-1, 8)
    names = () if labels is None else tuple(map(str, range(int(labels.max()) + 1)))
    data = Dataset(np.zeros((len(hashes), 1, 1, 1), np.uint8), labels, names, "", "", (), (), Path())
    data.__dict__["hashes"] = wide
    return data


@pytest.mark.parametrize(("count", "share", "expected"), [(100, 0.1, 10), (100, 0.001, 1), (2, 0.5, 1), (100, 0.0, 0), (60_000, 0.2, 5000)])
def test_split_sizes(count: int, share: float, expected: int) -> None:
    for labels in (None, np.arange(count, dtype=np.int64) % 2):
        train, heldout = fake(np.arange(count), labels).split(share, seed=1)
        assert len(heldout) == expected
        assert np.array_equal(np.sort(np.concatenate([train, heldout])), np.arange(count))


def test_split_is_a_function_of_the_seed() -> None:
    data = fake(np.arange(500))
    assert np.array_equal(data.split(0.1, 3)[1], data.split(0.1, 3)[1])
    assert not np.array_equal(data.split(0.1, 3)[1], data.split(0.1, 4)[1])


def test_split_is_stratified_and_leaves_every_class_an_image() -> None:
    labels = np.repeat(np.arange(5), [400, 200, 100, 40, 1]).astype(np.int64)
    train, heldout = fake(np.arange(len(labels)), labels).split(0.1, seed=0)
    assert np.abs(np.bincount(labels[heldout], minlength=5) - [40, 20, 10, 4, 0]).max() <= 1
    assert np.bincount(labels[train], minlength=5).min() >= 1
    assert len(heldout) == round(0.1 * len(labels))


def test_duplicates_are_never_split() -> None:
    random = np.random.default_rng(0)
    for labels in (None, random.integers(0, 4, 300)):
        hashes = random.integers(0, 80, 300)
        for seed in range(5):
            train, heldout = fake(hashes, labels).split(0.2, seed)
            assert not set(hashes[train]) & set(hashes[heldout])
            assert 40 <= len(heldout) <= 60


def test_split_of_little_but_duplicates() -> None:
    train, heldout = fake(np.array([7] * 99 + [8])).split(0.05, 0)
    assert (len(train), heldout.tolist()) == (99, [99])
    assert len(fake(np.array([7] * 10)).split(0.5, 0)[1]) == 0
    train, heldout = fake(np.array([7] * 10 + [8] * 9)).split(0.05, 0)
    assert (len(train), len(heldout)) == (10, 9)


def test_split_of_many_is_quick() -> None:
    data = fake(np.arange(60_000), np.arange(60_000, dtype=np.int64) % 100)
    started = time.perf_counter()
    data.split(0.05, 0)
    assert time.perf_counter() - started < 1


def test_duplicates_are_named(tmp_path: Path, cache: Path) -> None:
    folder = write_digits(tmp_path / "images", 10)
    digit(4).save(folder / "again.bmp")
    digit(4).convert("RGB").save(folder / "once more.png")
    data = ready(folder, cache)
    assert duplicates(data) == [["0004.png", "again.bmp", "once more.png"]]
    for seed in range(5):
        _, heldout = data.split(0.3, seed)
        assert sum(data.name_of(int(row)) in duplicates(data)[0] for row in heldout) in (0, 3)


# --- a first look -------------------------------------------------------------------------------------------------


def test_summary_of_a_folder(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "images", 6, classes=2)
    photo().save(folder / "c0" / "photo.png")
    photo().convert("L").convert("RGB").save(folder / "c0" / "gray.jpg")
    photo().convert("RGBA").save(folder / "c1" / "alpha.png")
    (folder / "c1" / "bad.png").write_text("text")
    frames = [photo().resize((8, 8)), photo(1).resize((8, 8))]
    frames[0].save(folder / "c1" / "moves.gif", save_all=True, append_images=frames[1:])
    summary = inspect(open_source(str(folder)))
    assert (summary.count, summary.looked_at, summary.readable) == (11, 11, 10)
    assert summary.sizes == (((8, 8), 7), ((427, 640), 3))
    assert (summary.median_height, summary.median_width) == (8, 8)
    assert summary.gray_share == pytest.approx(0.7)
    assert not summary.gray
    assert summary.alpha_share == pytest.approx(0.1)
    assert summary.animated_share == pytest.approx(0.1)
    assert summary.broken_share == pytest.approx(1 / 11)
    assert (summary.class_names, summary.class_counts) == (("c0", "c1"), (5, 6))


def test_summary_sees_turned_and_gray_images(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(3):
        photo(index % 2).convert("L").convert("RGB").save(tmp_path / f"{index}.jpg", exif=exif)
    summary = inspect(open_source(str(tmp_path)))
    assert (summary.median_height, summary.median_width) == (640, 427)
    assert summary.gray


def test_summary_of_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    summary = inspect(open_source(str(tmp_path)))
    assert (summary.readable, summary.median_height, summary.gray, summary.broken_share) == (0, 0, False, 1.0)


def test_summary_looks_at_all_of_a_long_source() -> None:
    looked: list[int] = []
    source = open_source("digits")
    long = replace(source, names=["x"] * 50_000, labels=None, read=lambda i: looked.append(i) or source.read(i % 1797))
    summary = inspect(long)
    assert (summary.count, summary.looked_at) == (50_000, 2000)
    assert (min(looked), max(looked)) == (0, 49_999)
    assert np.diff(sorted(looked)).max() < 2000


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
def test_real_table_is_ready_quickly_the_second_time(cache: Path) -> None:
    source = open_source(str(SHARED / "flowers102-96.parquet"))
    data = prepare(source, settings((32, 32)), cache)
    assert data.images.shape == (5544, 32, 32, 3)
    assert np.array_equal(data.images[4000], decode(source.load(4000), settings((32, 32)))[0])
    started = time.perf_counter()
    prepare(source, settings((32, 32)), cache)
    assert time.perf_counter() - started < 0.5


def test_a_limit_takes_some_of_those_to_train_on_and_a_smaller_one_some_of_those() -> None:
    data = fake(np.arange(200))
    train, heldout = data.split(0.1, 3)
    many, same = data.split(0.1, 3, 100)
    few, _ = data.split(0.1, 3, 30)
    assert np.array_equal(heldout, same) and len(many) == 100 and len(few) == 30
    assert set(few) < set(many) < set(train) and (np.diff(many) > 0).all()
    assert np.array_equal(data.split(0.1, 3, 10_000)[0], train) and not np.array_equal(data.split(0.0, 3, 30)[0], data.split(0.0, 4, 30)[0])
