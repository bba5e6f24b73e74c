"""The index of a folder of shards: where each image's bytes lie, its class and its hash."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from maskdm.data.cache import cache_directory, put
from maskdm.data.remote import LostShard, Remote
from maskdm.errors import UserError

INDEX, RECORDS = "index.json", "index.npy"
FORMAT = "maskdm shards 1"

RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4"), ("hash", "<u8")])
"""Of one image: its bytes in the shard, its class or -1, and the first bytes of its bytes' SHA-256."""

PIECE = 8 << 20
HEADER = 4096
"""Bytes that NumPy puts before an array, at most."""

Records = NDArray[Any]
"""[n], of type RECORD."""


@dataclass(frozen=True)
class Shard:
    """A tar file: its name, size in bytes, SHA-256 (where it is known) and number of images."""

    name: str
    size: int
    sha256: str
    images: int


@dataclass(frozen=True)
class Index:
    """Images in shards, numbered through all of them. The records are mapped from a file: 24 bytes an image."""

    base: str
    """The folder or URL of the shards."""
    shards: tuple[Shard, ...]
    records: Records
    class_names: tuple[str, ...]
    height: int
    """In pixels, the median, as is `width`."""
    width: int
    gray: bool
    lost: tuple[tuple[str, str], ...]
    """(name, reason) of what could not be read when the index was made."""
    key: str
    """SHA-256, in hex, over all of this but the place."""
    path: Path
    """Where the records lie."""

    def __len__(self) -> int:
        """The number of images."""
        return len(self.records)

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """[shards + 1], the number of each shard's first image, and of all."""
        return np.concatenate([[0], np.cumsum([shard.images for shard in self.shards])]).astype(np.int64)

    def shard_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers [n] of the shards in which images lie."""
        return np.searchsorted(self.firsts, rows, side="right").astype(np.int64) - 1

    def address(self, shard: int) -> str:
        """The path or URL of a shard."""
        return f"{self.base}/{self.shards[shard].name}"

    def name_of(self, row: int) -> str:
        """An image's name: its shard's, and its number in it."""
        shard = int(self.shard_of(np.array([row]))[0])
        return f"{self.shards[shard].name}#{row - int(self.firsts[shard])}"

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """[n], as in a data set."""
        return self.records["label"].astype(np.int64) if self.class_names else None


def hash_of(body: bytes) -> int:
    """The hash of an image's bytes, as in the records."""
    return int.from_bytes(hashlib.sha256(body).digest()[:8], "little")


@dataclass(frozen=True)
class About:
    """What the index says beside its records."""

    class_names: tuple[str, ...]
    height: int
    width: int
    gray: bool
    lost: tuple[tuple[str, str], ...]
    source: str
    """What the shards were made of: a hash."""


def write_index(folder: Path, shards: Sequence[Shard], records: Records, about: About) -> None:
    """Put the two files of an index into a folder."""
    body = io.BytesIO()
    np.save(body, records, allow_pickle=False)
    put(folder / RECORDS, body.getvalue())
    size, digest = len(body.getvalue()), hashlib.sha256(body.getvalue()).hexdigest()
    found = {"format": FORMAT, **asdict(about), "records": {"size": size, "sha256": digest}, "shards": [asdict(each) for each in shards]}
    put(folder / INDEX, json.dumps(found, indent=0).encode())


def is_index(body: bytes) -> bool:
    """Whether a file begins as an index of ours does: folders of images may hold an index.json of others."""
    return re.match(rb'\{\s*"format":\s*"maskdm shards', body[:200]) is not None


def read_index(folder: str, remote: Remote, base: str | None = None) -> Index:
    """The index in a folder or below a URL, of shards there or at `base`; from afar the records are kept in the cache. Raises UserError."""
    where = f"{folder}/{INDEX}"
    try:
        body = remote.read_all(where)
        found: Any = json.loads(body)
        if not is_index(body) or found["format"] != FORMAT:
            raise UserError(f"{where} is no index of shards that this version reads ({FORMAT}); write them again by `maskdm pack`")
        shards = tuple(Shard(**each) for each in found["shards"])
        _check(shards)
        path = _records(folder, found["records"], sum(shard.images for shard in shards), remote)
        records = np.load(path, mmap_mode="r", allow_pickle=False)
        if records.dtype != RECORD or len(records) != sum(shard.images for shard in shards):
            raise ValueError(f"{RECORDS} does not fit it")
        if len(records) and not -1 <= int(records["label"].min()) <= int(records["label"].max()) < max(1, len(found["class_names"])):
            raise ValueError(f"{RECORDS} has classes that it does not name")
        key, lost = hashlib.sha256(body).hexdigest(), tuple((name, reason) for name, reason in found["lost"])
        size = int(found["height"]), int(found["width"])
        return Index(base or folder, shards, records, tuple(found["class_names"]), *size, found["gray"], lost, key, path.parent)
    except LostShard as error:
        raise UserError(f"no index of shards can be read: {error}; give a folder or URL that `maskdm pack` has written") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} cannot be read as an index of shards ({error}); write them again by `maskdm pack`") from error


def _check(shards: Sequence[Shard]) -> None:
    """Raise ValueError where an entry is none, or names a file elsewhere."""
    for shard in shards:
        place = PurePosixPath(shard.name)
        if place.is_absolute() or ".." in place.parts or "://" in shard.name or "\\" in shard.name:
            raise ValueError(f"it names the file {shard.name}, which lies elsewhere")
        if not 0 <= int(shard.images) <= int(shard.size):
            raise ValueError(f"it says that {shard.name} has {shard.size} bytes and {shard.images} images")


def _records(folder: str, about: dict[str, Any], count: int, remote: Remote) -> Path:
    """The file of so many records on this machine, fetched once where it is elsewhere. Raises ValueError where it is another."""
    size = int(about["size"])
    if not 0 < size - count * RECORD.itemsize <= HEADER:
        raise ValueError(f"{RECORDS} of {size} bytes does not fit its {count} images")
    if "://" not in folder:
        path = Path(folder) / RECORDS
        if path.stat().st_size != size:
            raise ValueError(f"{RECORDS} has another size than it had")
        return path
    path = cache_directory() / f"shards-{about['sha256'][:32]}" / RECORDS
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # the processes of a machine fetch it once
        if not path.is_file():
            _fetch(f"{folder}/{RECORDS}", size, about["sha256"], path, remote)
    return path


def _fetch(address: str, size: int, digest: str, path: Path, remote: Remote) -> None:
    """Copy a file piece by piece: of many images it is larger than memory. Raises ValueError where it is another."""
    partial, found = path.with_suffix(".part"), hashlib.sha256()
    with partial.open("wb") as file:
        for first in range(0, size, PIECE):
            piece = remote.read(address, first, min(PIECE, size - first))
            found.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if found.hexdigest() != digest:
        partial.unlink()
        raise ValueError(f"{RECORDS} is not the file that belongs to it")
    partial.replace(path)
