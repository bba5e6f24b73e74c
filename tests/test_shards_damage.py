"""What is wrong with shards is named: nothing is passed over, nothing grows without bound, and no stand-in is kept as if it were real."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import digit, settings, write_digits
from shard_helpers import faulty_server

from maskdm.config import Data
from maskdm.data import Dataset, Latents, ShardDataset, make_loader, open_source, pack, prepare, shards, tars
from maskdm.data.remote import Remote
from maskdm.data.stream import ShardLoader
from maskdm.engine import Ranks
from maskdm.engine.ranks import STEP, Pulse
from maskdm.errors import UserError
from maskdm.runs.sets import image_set

SETTINGS = settings(channels=1)
BLOCK = tarfile.BLOCKSIZE


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "REMOTE", Remote(timeout=2.0, tries=3, pause=0.001))
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))


def png(number: int) -> bytes:
    body = io.BytesIO()
    digit(number).save(body, "PNG")
    return body.getvalue()


def write(path: Path, names: list[str], first: int = 0) -> bytes:
    """A tar file of digits by these names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names, first):
            member = tarfile.TarInfo(name)
            member.size = len(png(number))
            tar.addfile(member, io.BytesIO(png(number)))
    return path.read_bytes()


def opened(location: Path | str, data: Data = SETTINGS) -> ShardDataset:
    found = prepare(open_source(str(location)), data, Path("unused"))
    assert isinstance(found, ShardDataset)
    return found


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


NAMES = [f"{number}.png" for number in range(6)]
THIRD = 2 * (BLOCK + BLOCK)
"""Where the third image's header begins: each fits in a block."""

DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut between two images": (lambda body: body[:THIRD], "without a tar file's end"),
    "a damaged header": (lambda body: body[:THIRD] + b"?" * 20 + body[THIRD + 20 :], f"damaged at byte {THIRD}"),
    "two files joined": (lambda body: body + body, "other tar files were appended"),
    "cut within an image": (lambda body: body[: THIRD + BLOCK + 9], "damaged"),
    "a file of a terabyte": (lambda body: body[:THIRD] + header("x.png", 1 << 40) + body[THIRD:], r"a file of 1099512 MB \(x.png\)"),
    "a name of a terabyte": (lambda body: body[:THIRD] + header("x", 1 << 40, tarfile.GNUTYPE_LONGNAME) + body[THIRD:], "damaged"),
    "settings of a terabyte": (lambda body: body[:THIRD] + header("x", 1 << 40, tarfile.XHDTYPE) + body[THIRD:], "damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_shard_is_left_out_by_name_and_not_in_part(what: str, tmp_path: Path) -> None:
    write(tmp_path / "s" / "a.tar", NAMES)
    change, reason = DAMAGE[what]
    (tmp_path / "s" / "b.tar").write_bytes(change(write(tmp_path / "s" / "b.tar", NAMES)))
    source = open_source(str(tmp_path / "s"))
    assert len(source) == 6
    (note,) = source.notes
    assert note.startswith("shard b.tar cannot be read")
    with pytest.raises(UserError, match=rf"1 of 2 shards .*b.tar.*{reason}.*remove .* and run the command again"):
        prepare(source, SETTINGS, tmp_path)
    assert len(opened(tmp_path / "s", settings(channels=1, max_broken=0.5))) == 6


def test_a_file_with_holes_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.tar", NAMES)
    monkeypatch.setattr(tarfile.TarInfo, "issparse", lambda self: self.name == "3.png")
    with pytest.raises(UserError, match=r"a file with holes \(3.png\)"):
        open_source(str(tmp_path / "a.tar"))


def test_images_of_all_kinds_of_names_are_taken(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", ["a/x.image.png", "a/y.JFIF", "b/x.png", "./z.jpe", "a/._x.png", "__MACOSX/z.png", "a/.hidden.png"])
    source = open_source(str(tmp_path / "a.tar"))
    assert len(source) == 4
    dataset = opened(tmp_path / "a.tar")
    assert np.array_equal(dataset.images[np.arange(4)][..., 0], np.stack([np.asarray(digit(number)) for number in range(4)]))
    write(tmp_path / "b.tar", ["x.input.png", "x.target.png"])
    with pytest.raises(UserError, match="several images of one name, such as x"):
        open_source(str(tmp_path / "b.tar"))


def test_a_split_is_not_mixed_with_another(tmp_path: Path) -> None:
    write(tmp_path / "s" / "train" / "0.tar", NAMES)
    write(tmp_path / "s" / "test" / "0.tar", NAMES, 6)
    source = open_source(str(tmp_path / "s"))
    assert len(source) == 6 and "split train taken of train, test" in " ".join(sorted(source.notes)).replace("test, train", "train, test")
    write(tmp_path / "t" / "0.tar", NAMES)
    write(tmp_path / "t" / "old" / "0.tar", NAMES, 6)
    assert len(open_source(f"{tmp_path}/t/*.tar")) == 6


def test_an_index_stands_whatever_can_be_read_later(tmp_path: Path) -> None:
    """A run rests on it: else a shard that comes back, or cannot be reached for a while, would keep the run from going on."""
    for number in range(3):
        write(tmp_path / "s" / f"{number}.tar", NAMES, 6 * number)
    (tmp_path / "s" / "1.tar").rename(tmp_path / "away")
    location = f"{tmp_path}/s/{{0..2}}.tar"
    began = open_source(location)
    assert len(began) == 12
    (tmp_path / "away").rename(tmp_path / "s" / "1.tar")
    (tmp_path / "s" / "2.tar").rename(tmp_path / "away")
    assert open_source(location).fingerprint() == began.fingerprint()
    (tmp_path / "away").rename(tmp_path / "s" / "2.tar")
    write(tmp_path / "s" / "2.tar", NAMES + ["more.png"] * 30)  # and other data is other data
    write(tmp_path / "s" / "2.tar", [*NAMES, *(f"more{number}.png" for number in range(30))])
    assert len(open_source(location)) == 6 + 6 + 36


def test_an_index_that_was_begun_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.tar", NAMES)

    def killed(folder: Path, *rest: object) -> None:
        made(folder, *rest)  # pyright: ignore[reportArgumentType]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        made = tars.write_index
        patched.setattr(tars, "write_index", killed)
        with pytest.raises(KeyboardInterrupt):
            open_source(str(tmp_path / "a.tar"))
    assert len(open_source(str(tmp_path / "a.tar"))) == 6


# --- an index that somebody else has written ---


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(open_source(str(write_digits(tmp_path / "digits", 12, classes=2))), SETTINGS, tmp_path / "out", 5)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "message"),
    [("../secret.tar", "lies elsewhere"), ("/etc/passwd", "lies elsewhere"), ("http://other/a.tar", "lies elsewhere")],
)
def test_an_index_names_no_files_elsewhere(packed: Path, name: str, message: str) -> None:
    index = json.loads((packed / "index.json").read_text())
    index["shards"][1]["name"] = name
    (packed / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        open_source(str(packed))


def test_an_index_is_checked_before_it_is_fetched_or_used(packed: Path) -> None:
    whole = json.loads((packed / "index.json").read_text())
    changes: list[tuple[str, object, str]] = [
        ("records", {"size": 10**15, "sha256": "0"}, "does not fit its 12 images"),
        ("class_names", [whole["class_names"][0]], "classes that it does not name"),
        ("shards", [whole["shards"][0] | {"images": -5}, *whole["shards"][1:]], "images"),
        ("shards", [whole["shards"][0] | {"images": "5"}, *whole["shards"][1:]], "images"),
    ]
    for key, value, message in changes:
        (packed / "index.json").write_text(json.dumps(whole | {key: value}))
        with pytest.raises(UserError, match=message):
            open_source(str(packed))


def test_a_file_too_large_for_an_index_is_not_read(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskdm.data.remote.MOST_AT_ONCE", 100)
    with pytest.raises(UserError, match="too much for an index"):
        open_source(str(packed))


def test_nothing_is_asked_for_no_bytes() -> None:
    """A web server refuses such a request, and the whole shard would be given up."""
    with faulty_server({"/a": b"1234"}, stall=0.1) as (address, requests):
        assert Remote().read(f"{address}/a", 2, 0) == b"" and not requests


def test_damaged_images_are_not_packed_again(packed: Path, tmp_path: Path) -> None:
    source, said = open_source(str(packed)), list[str]()
    shard = packed / "000001.tar"
    shard.write_bytes(bytes(byte ^ (BLOCK < at < BLOCK + 60) for at, byte in enumerate(shard.read_bytes())))
    index = pack(source, settings(channels=1, max_broken=0.5), tmp_path / "again", 5, note=said.append)
    assert len(index) == 11 and said == ["000001.tar#0 is left out: its bytes are not those of the index"]


# --- what stands in for a lost image is not kept ---


@pytest.fixture
def lossy(packed: Path) -> ShardDataset:
    dataset = opened(packed, settings(channels=1, max_broken=0.5))
    (packed / "000001.tar").unlink()
    return dataset


def test_measures_and_latents_rest_on_all_images(lossy: ShardDataset) -> None:
    rows = np.array([0, 6, 2])
    assert np.array_equal(lossy.images[rows], lossy.images[np.array([0, 2, 2])])
    for read in (lambda: lossy.whole[rows], lambda: lossy.whole[0:12], lambda: image_set(lossy, rows).take(slice(0, 3))):
        with pytest.raises(UserError, match=r"images asked for .*000001.tar: .*No such file"):
            read()
    while_training = image_set(lossy, rows, whole=False)
    assert torch.equal(while_training.take(slice(0, 3))[1], while_training.take(slice(0, 3))[2])
    assert while_training.key != image_set(lossy, rows).key
    assert np.array_equal(lossy.whole[np.array([0, 2])], lossy.images[np.array([0, 2])])


def test_latents_of_shards_are_what_is_trained_on(packed: Path) -> None:
    dataset = opened(packed)
    values = np.random.default_rng(0).normal(size=(12, 1, 2, 4, 4)).astype(np.float16)
    encoded: Dataset = ShardDataset(**{**vars_of(dataset), "latents": Latents(values, (0.0, 0.0), (1.0, 1.0))})
    assert isinstance(make_loader(dataset, np.arange(12), 0), ShardLoader)
    batch = make_loader(encoded, np.arange(12), 0).batch(0, 5)
    assert torch.equal(batch.images, torch.from_numpy(values[batch.rows.numpy()].astype(np.float32)))


def vars_of(dataset: Dataset) -> dict[str, object]:
    return {name: getattr(dataset, name) for name in Dataset.__dataclass_fields__}


# --- processes ---


def test_what_takes_long_may_read_images_within() -> None:
    pulse = Pulse.__new__(Pulse)
    pulse._count = 0
    ranks = Ranks(0, 2, pulse=pulse)
    ranks.mark("training")
    with ranks.at("measuring", 5000.0):
        with ranks.at("reading images", 900.0):
            assert pulse.at == ("reading images", 900.0)
        assert pulse.at == ("measuring", 5000.0)
    assert pulse.at == ("training", STEP)
