from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_helpers import SHARED, digit, settings, touch_later, write_digits
from PIL import Image

from maskdm.data import BrokenImage, Source, decode, inspect, open_source
from maskdm.data.emoji import _find_font
from maskdm.errors import UserError


def pixels(source: Source, index: int, channels: int = 1) -> np.ndarray:
    return decode(source.load(index), settings(channels=channels))[0]


def refused(location: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source(str(location))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# --- folders ------------------------------------------------------------------------------------------------------


def test_flat_folder_is_sorted_and_without_classes(tmp_path: Path) -> None:
    source = open_source(str(write_digits(tmp_path, 12)))
    assert len(source) == 12
    assert [source.item_name(i) for i in (0, 11)] == ["0000.png", "0011.png"]
    assert (source.class_names, source.label(3), source.notes) == ((), -1, ())
    assert np.array_equal(pixels(source, 5)[..., 0], np.asarray(digit(5)))


def test_sub_folders_are_classes_whatever_their_names(tmp_path: Path) -> None:
    for name in ("Zebra", "a b c", "\u00e9t\u00e9", "\u732b"):
        write_digits(tmp_path / name, 2)
    write_digits(tmp_path / "a b c" / "deeper" / "still", 1, first=5)
    source = open_source(str(tmp_path))
    assert source.class_names == ("Zebra", "a b c", "\u00e9t\u00e9", "\u732b")
    of = {source.item_name(i): source.class_names[source.label(i)] for i in range(len(source))}
    assert of["a b c/deeper/still/0005.png"] == "a b c"
    assert of["\u732b/0001.png"] == "\u732b"
    assert len(of) == 9


def test_a_single_sub_folder_is_no_class(tmp_path: Path) -> None:
    write_digits(tmp_path / "images", 3)
    assert open_source(str(tmp_path)).class_names == ()


def test_mixed_folder_is_without_classes_and_says_so(tmp_path: Path) -> None:
    write_digits(tmp_path, 4, classes=2)
    write_digits(tmp_path, 2, first=10)
    source = open_source(str(tmp_path))
    assert source.class_names == ()
    assert any("without classes" in note for note in source.notes)


def test_split_folders_are_pointed_out(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_digits(tmp_path / split, 2)
    assert any("train" in note and "alone" in note for note in open_source(str(tmp_path)).notes)


def test_other_and_hidden_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    write_digits(tmp_path, 2)
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "Makefile").write_text("x")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    write_digits(tmp_path / ".git", 1)
    (tmp_path / "SHOUTING.PNG").write_bytes((tmp_path / "0000.png").read_bytes())
    source = open_source(str(tmp_path))
    assert len(source) == 3
    assert "2 files" in source.notes[0]
    assert ".txt" in source.notes[0]
    assert source.notes[1].startswith("2 hidden")


def test_links_are_followed_and_loops_survived(tmp_path: Path) -> None:
    write_digits(tmp_path / "real", 3)
    root = tmp_path / "root"
    write_digits(root / "a", 2)
    (root / "b").symlink_to(tmp_path / "real")
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(str(root))
    names = [source.item_name(i) for i in range(len(source))]
    assert names == ["a/0000.png", "a/0001.png", "a/gone.png", "b/0000.png", "b/0001.png", "b/0002.png"]
    assert source.class_names == ("a", "b")
    with pytest.raises(BrokenImage, match="nowhere"):
        pixels(source, 2)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    write_digits(tmp_path, 2)
    os.mkfifo(tmp_path / "pipe.png")
    assert len(open_source(str(tmp_path))) == 2


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    write_digits(tmp_path, 1)
    odd = tmp_path / "caf\udce9.png"
    try:
        digit(1).save(tmp_path / "x.png")
        (tmp_path / "x.png").rename(odd)
    except (OSError, UnicodeError):
        pytest.skip("this file system takes only UTF-8 names")
    source = open_source(str(tmp_path))
    source.item_name(1).encode()
    assert source.fingerprint()
    assert np.array_equal(pixels(source, 1)[..., 0], np.asarray(digit(1)))


def test_fingerprint_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_digits(tmp_path / "images", 5)
    first = open_source(str(folder)).fingerprint()
    monkeypatch.chdir(tmp_path)
    for spelling in ("images", "images/", "./images", "../" + tmp_path.name + "/images"):
        assert open_source(spelling).fingerprint() == first
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)  # keeps the times
    assert open_source(str(moved)).fingerprint() == first
    (folder / "notes.txt").write_text("no image")
    assert open_source(str(folder)).fingerprint() == first
    touch_later(folder / "0002.png")
    changed = open_source(str(folder)).fingerprint()
    assert changed != first
    (folder / "0002.png").rename(folder / "0009.png")
    assert open_source(str(folder)).fingerprint() != changed


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty", str(tmp_path / "empty"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    refused(tmp_path / "text", "no images", "1 .txt")
    refused("digit", "'digit'", "did you mean digits?")
    refused("/no/such/place", "/no/such/place", "digits, emoji")
    monkeypatch.chdir(tmp_path)
    refused("emptty", "did you mean empty?")
    digit(0).save(tmp_path / "one.png")
    refused(tmp_path / "one.png", "single image", str(tmp_path))
    (tmp_path / "photos.zip").write_bytes(b"PK")
    refused(tmp_path / "photos.zip", "unpack")
    (tmp_path / "a.csv").write_text("x")
    refused(tmp_path / "a.csv", ".csv", ".parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    refused(tmp_path / "bad.parquet", "bad.parquet", "parquet")


# --- arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 8, 1), (5, 1, 8, 8), (5, 8, 8, 3), (5, 3, 8, 8)])
def test_array_layouts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    gray = np.stack([np.asarray(digit(i)) for i in range(5)])
    channel = shape.index(3) if 3 in shape else shape.index(1) if 1 in shape else None
    array = gray if channel is None else np.expand_dims(gray, channel).repeat(shape[channel], channel)
    assert array.shape == shape
    np.save(tmp_path / "a.npy", array)
    source = open_source(str(tmp_path / "a.npy"))
    assert len(source) == 5
    assert np.array_equal(pixels(source, 3)[..., 0], gray[3])


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "float64", "float16", "int64"])
def test_array_types(tmp_path: Path, kind: str) -> None:
    gray = np.stack([np.asarray(digit(i)) for i in range(5)])
    scale = {"uint16": 257, "float32": 1 / 255, "float64": 1 / 255, "float16": 1 / 255}.get(kind, 1)
    np.save(tmp_path / "a.npy", (gray.astype(np.float64) * scale).astype(kind))
    assert np.abs(pixels(open_source(str(tmp_path / "a.npy")), 4)[..., 0].astype(int) - gray[4]).max() <= (kind == "float16")


def test_npz_with_labels_and_names(tmp_path: Path) -> None:
    images = np.stack([np.asarray(digit(i)) for i in range(6)])
    np.savez(tmp_path / "a.npz", x=images, y=[[3], [3], [7], [7], [3], [7]])
    source = open_source(str(tmp_path / "a.npz"))
    assert source.class_names == ("3", "7")
    assert [source.label(i) for i in range(6)] == [0, 0, 1, 1, 0, 1]
    np.savez(tmp_path / "b.npz", images=images, labels=np.array([0, 1, 2] * 2), classes=np.array(["a", "b", "c"]))
    assert open_source(str(tmp_path / "b.npz")).class_names == ("a", "b", "c")
    np.savez(tmp_path / "c.npz", train=images)
    assert len(open_source(str(tmp_path / "c.npz"))) == 6


def test_arrays_refused(tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8), np.uint8)
    for name, array, words in [
        ("range", np.linspace(-1, 1, 256).reshape(4, 8, 8), "from -1"),
        ("floats", images.astype(float) + 200.0, "from 200"),
        ("int", images.astype(int) + 300, "from 300"),
        ("flat", np.zeros((4, 64), np.uint8), "(4, 64)"),
        ("single", np.zeros((8, 8, 3), np.uint8), "(8, 8, 3)"),
        ("complex", images.astype(complex), "complex128"),
        ("empty", images[:0], "no images"),
    ]:
        np.save(tmp_path / f"{name}.npy", array)
        refused(tmp_path / f"{name}.npy", f"{name}.npy", words)
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    refused(tmp_path / "objects.npy", "objects.npy")
    np.savez(tmp_path / "two.npz", train=images, test=images)
    refused(tmp_path / "two.npz", "train, test", "images")
    np.savez(tmp_path / "labels.npz", x=images, y=[1, 2, 3])
    refused(tmp_path / "labels.npz", "(3,)", "4 images")
    for name in ("broken.npz", "broken.npy"):
        (tmp_path / name).write_bytes(b"nothing")
        refused(tmp_path / name, name)


# --- tables -------------------------------------------------------------------------------------------------------


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    digit(index).save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_of_several_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": png(i), "path": f"p{i % 20}.png"} for i in range(25)]
    table = pa.table({"image": cells, "label": pa.array([i % 3 for i in range(25)], pa.int32())})
    parquet.write_table(table.replace_schema_metadata({"classes": "x,y,z"}), tmp_path / "t.parquet", row_group_size=4)
    source = open_source(str(tmp_path / "t.parquet"))
    assert (len(source), source.class_names, source.label(5)) == (25, ("x", "y", "z"), 2)
    assert [source.item_name(i) for i in (7, 21)] == ["p7.png", "p1.png (row 21)"]
    monkeypatch.setattr("maskdm.data.tables.KEPT", 6)
    for index in (24, 0, 13, 12, 3, 20, 24, 8, 0):
        assert np.array_equal(pixels(source, index)[..., 0], np.asarray(digit(index)))


def test_parquet_of_binaries_and_words(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"picture": [png(0), None, b""], "label": ["dog", "cat", None], "id": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    assert source.class_names == ("cat", "dog")
    assert [source.label(i) for i in range(3)] == [1, 0, -1]
    for index in (1, 2):
        with pytest.raises(BrokenImage, match="empty"):
            pixels(source, index)
    parquet.write_table(pa.table({"id": [1, 2]}), tmp_path / "no.parquet")
    refused(tmp_path / "no.parquet", "columns id", "image")


def test_parquet_folder_takes_one_split(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, rows in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test-00000-of-00001", 4)):
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(pa.table({"image": [png(i) for i in range(rows)]}), tmp_path / "data" / f"{name}.parquet")
    source = open_source(str(tmp_path))
    assert len(source) == 5
    assert "split train" in source.notes[0]
    assert np.array_equal(pixels(source, 4)[..., 0], np.asarray(digit(1)))


def test_saved_hugging_face_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    rows = {"img": [{"bytes": png(i), "path": None} for i in range(7)], "label": [i % 2 for i in range(7)]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "dict")
    data.to_parquet(tmp_path / "t.parquet")
    for name in ("one", "dict", "t.parquet"):
        source = open_source(str(tmp_path / name))
        assert (len(source), source.class_names, source.label(3)) == (7, ("even", "odd"), 1)
        assert np.array_equal(pixels(source, 6)[..., 0], np.asarray(digit(6)))
        assert source.fingerprint() == open_source(str(tmp_path / name)).fingerprint()
    (tmp_path / "one" / "state.json").write_text("{}")
    refused(tmp_path / "one", str(tmp_path / "one"))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
@pytest.mark.parametrize(
    ("name", "count", "classes", "gray"),
    [("cifar10-test", 10_000, 10, False), ("flowers102-96", 5544, 102, False), ("noto-emoji-128", 3583, 0, False)],
)
def test_real_tables(name: str, count: int, classes: int, gray: bool) -> None:
    source = open_source(str(SHARED / f"{name}.parquet"))
    summary = inspect(source)
    assert (len(source), len(source.class_names), summary.gray) == (count, classes, gray)
    assert sum(summary.class_counts) == (count if classes else 0)
    assert summary.readable == summary.looked_at == 2000


# --- built-in -----------------------------------------------------------------------------------------------------


def test_digits() -> None:
    source = open_source("digits")
    assert (len(source), source.class_names) == (1797, tuple("0123456789"))
    assert max(pixels(source, index).max() for index in range(10)) == 255
    assert np.array_equal(pixels(source, 17)[..., 0], np.asarray(digit(17)))
    assert [source.label(i) for i in range(10)] == list(range(10))
    assert source.fingerprint() == open_source("digits").fingerprint()


def test_emoji() -> None:
    if _find_font() is None:
        pytest.skip("no colour emoji font here")
    source = open_source("emoji")
    assert len(source) > 1000
    assert source.class_names == ()
    names = [source.item_name(i) for i in range(len(source))]
    assert "grinning face" in names
    assert not any("emoji modifier" in name or "regional indicator" in name for name in names)
    image = source.load(names.index("grinning face"))
    assert isinstance(image, Image.Image)
    assert image.getchannel("A").getextrema() == (0, 255)
    some = range(0, len(source), 20)
    assert len({decode(source.load(i), settings((32, 32)))[0].tobytes() for i in some}) == len(some)


def test_emoji_without_a_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskdm.data.emoji.shutil.which", lambda _: None)
    monkeypatch.setattr("maskdm.data.emoji.PLACES", ())
    refused("emoji", "apt-get install fonts-noto-color-emoji")
