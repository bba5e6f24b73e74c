"""Tar shards that others wrote, in the layout of WebDataset: read through once, for an index."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

from maskdm.config import Data
from maskdm.data.cache import cache_directory, put
from maskdm.data.decode import BrokenImage, decode, open_image, orientation_swaps
from maskdm.data.folder import EXTENSIONS
from maskdm.data.index import INDEX, RECORD, About, Index, Records, Shard, hash_of, read_index, write_index
from maskdm.data.remote import LostShard, RangeFile, Remote
from maskdm.data.source import class_labels
from maskdm.data.threads import readers
from maskdm.errors import UserError

MOST_OF_IMAGE = 1 << 28
"""Bytes of one file in a shard; more is taken for damage."""

BUFFER = 4 << 20
LOOKED_AT = 16
"""Images of a shard whose size and colour are looked at."""


@dataclass(frozen=True)
class Scanned:
    """What is known of a shard: its record, its images', their classes in words, and of some of them (height, width, gray)."""

    shard: Shard
    records: Records
    classes: list[str | None]
    looks: list[tuple[int, int, bool]]


def index_of(base: str, names: Sequence[str], remote: Remote) -> Index:
    """The index of tar files below a folder or URL, made by reading all of them through, once, and kept in the cache.

    Reading goes on where it was stopped. A shard that cannot be read is left out and named in `lost`, and stays so: runs rest on what an
    index holds, whatever can be read later. It is made anew where a shard in it has another size. Raises UserError where none can be read.
    """
    key = hashlib.sha256(json.dumps([base, list(names)]).encode()).hexdigest()[:32]
    folder = cache_directory() / f"tars-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        sizes = _sizes(base, names, remote)
        if (folder / INDEX).is_file():
            index = read_index(str(folder), remote, base)
            if all(sizes[shard.name] in (shard.size, None) for shard in index.shards):
                return index
            (folder / INDEX).unlink()  # the shards have changed since
        _scan_all(folder, base, names, sizes, remote)
    return read_index(str(folder), remote, base)


def _sizes(base: str, names: Sequence[str], remote: Remote) -> dict[str, int | None]:
    """The size of each shard; None where it cannot be told now."""

    def size(name: str) -> int | None:
        try:
            return remote.size(f"{base}/{name}")
        except LostShard:
            return None

    futures = [readers().submit(partial(size, name)) for name in names]
    return {name: future.result() for name, future in zip(names, futures, strict=True)}


def _scan_all(folder: Path, base: str, names: Sequence[str], sizes: dict[str, int | None], remote: Remote) -> None:
    def scan(number: int, name: str) -> Scanned | str:
        size, part = sizes[name], folder / f"{number:06d}"
        kept = None if size is None else _kept(part, name, size)
        if kept is not None:
            return kept
        try:
            found = _scan(base, name, remote.size(f"{base}/{name}") if size is None else size, remote)
        except LostShard as error:
            return str(error)
        body = io.BytesIO()
        np.save(body, found.records, allow_pickle=False)
        put(part.with_suffix(".npy"), body.getvalue())
        about = {"shard": asdict(found.shard), "classes": found.classes, "looks": found.looks}
        put(part.with_suffix(".json"), json.dumps(about).encode())
        return found

    futures = [readers().submit(partial(scan, number, name)) for number, name in enumerate(names)]
    good: list[Scanned] = []
    lost: list[tuple[str, str]] = []
    for name, future in zip(names, futures, strict=True):
        found = future.result()
        if isinstance(found, str):
            lost.append((name, found))
        elif found.shard.images:
            good.append(found)
    if not good:
        why = f"{lost[0][0]}: {lost[0][1]}" if lost else f"files such as {names[0]} have none of {', '.join(sorted(EXTENSIONS))}"
        raise UserError(f"{base} has no shard with images ({why}); give a folder, a pattern or a URL of tar files in WebDataset's layout")
    labels, class_names = class_labels([_number(each) for one in good for each in one.classes])
    records = np.concatenate([one.records for one in good])
    records["label"] = -1 if labels is None else labels
    looks = [each for one in good for each in one.looks] or [(64, 64, False)]
    height, width = (int(np.median([each[i] for each in looks])) for i in (0, 1))
    about = About(class_names, height, width, all(each[2] for each in looks), tuple(lost), hashlib.sha256(base.encode()).hexdigest())
    write_index(folder, [one.shard for one in good], records, about)
    for part in folder.glob("[0-9]*.*"):
        part.unlink()


def _number(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 10 else text


def _kept(part: Path, name: str, size: int) -> Scanned | None:
    """What an earlier call, which was stopped, has found of a shard."""
    try:
        known: Any = json.loads(part.with_suffix(".json").read_bytes())
        shard = Shard(**known["shard"])
        records, looks = np.load(part.with_suffix(".npy")), [(a, b, c) for a, b, c in known["looks"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Scanned(shard, records, known["classes"], looks) if (shard.name, shard.size) == (name, size) else None


class _Bytes(io.BufferedReader):
    """A shard's bytes. Who reads by the lengths that a damaged header gives gets what there is, and room for no more is made."""

    def __init__(self, raw: RangeFile) -> None:
        super().__init__(raw, BUFFER)
        self._size = raw.length

    def read(self, size: int | None = -1, /) -> bytes:
        """At most so many bytes."""
        left = max(0, self._size - self.tell())
        return super().read(min(left, MOST_OF_IMAGE, left if size is None or size < 0 else size))


def _scan(base: str, name: str, size: int, remote: Remote) -> Scanned:
    """Read a shard through. Raises LostShard where it cannot be read, is damaged, or ends before its end."""
    found: list[tuple[int, int, int, int]] = []
    keys: list[str] = []
    classes: dict[str, str] = {}
    looks: list[tuple[int, int, bool]] = []
    file = _Bytes(RangeFile(remote, f"{base}/{name}", size))
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore - kept for those who ask by name: gigabytes of a shard with a million images
                key, extension = _place(member.name)
                if not member.isreg() or key is None:
                    continue
                if extension in EXTENSIONS:
                    body = _read(tar, member, name)
                    found.append((member.offset_data, len(body), -1, hash_of(body)))
                    keys.append(key)
                    looks += _look(body) if len(looks) < LOOKED_AT else []
                elif extension == ".cls":
                    classes[key] = _read(tar, member, name)[:100].decode("utf-8", "replace").strip()
            _check_end(file, tar.offset, size, name)
    except LostShard:
        raise
    except Exception as error:  # tarfile raises whatever a damaged file leads it to
        raise LostShard(f"{name} is no tar file, or damaged ({str(error) or type(error).__name__})") from error
    repeated = [key for key, times in Counter(keys).items() if times > 1]
    if repeated:
        raise LostShard(f"{name} has several images of one name, such as {repeated[0].lstrip('/')}: which is meant is not known")
    return Scanned(Shard(name, size, "", len(found)), np.array(found, dtype=RECORD), [classes.get(key) for key in keys], looks)


def _place(path: str) -> tuple[str | None, str]:
    """What a file's name shares with those that belong to it, which is what stands before its first dot, and its extension.

    None for hidden files, as other programs leave them.
    """
    folder, _, last = path.rpartition("/")
    hidden = last.startswith(".") or "__MACOSX" in folder.split("/")
    return None if hidden else f"{folder}/{last.partition('.')[0]}", f".{last.rpartition('.')[2].lower()}"


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> bytes:
    """A file's bytes, which lie in the shard as they are. Raises LostShard."""
    if member.issparse() or member.size > MOST_OF_IMAGE:
        what = "with holes" if member.issparse() else f"of {member.size / 1e6:.0f} MB"
        raise LostShard(f"{name} has a file {what} ({member.name}), which is no image")
    content = tar.extractfile(member)
    body = b"" if content is None else content.read()
    if len(body) < member.size:
        raise LostShard(f"{name} ends within an image; it is damaged")
    return body


def _check_end(file: _Bytes, end: int, size: int, name: str) -> None:
    """Raise LostShard where a shard does not end with its end: tarfile takes a damaged header, or none, for the end, and says nothing."""
    file.seek(end)
    first = file.read(tarfile.BLOCKSIZE)
    if len(first) < tarfile.BLOCKSIZE:
        raise LostShard(f"{name} ends after {size} bytes without a tar file's end; it is damaged, or cut off")
    while first:
        if any(first):
            raise LostShard(f"{name} is damaged at byte {file.tell() - len(first)}, or other tar files were appended to it")
        first = file.read(BUFFER)


def _look(body: bytes) -> list[tuple[int, int, bool]]:
    """Height, width and whether an image is gray; nothing of one that cannot be read."""
    try:
        image = open_image(body)
        height, width = (image.width, image.height) if orientation_swaps(image) else (image.height, image.width)
        gray = Image.getmodebase(image.mode) == "L"
        if not gray:
            pixels, _ = decode(body, Data(source="", image_size=(64, 64), channels=3, fit="stretch"))
            gray = bool(np.ptp(pixels.astype(np.int16), axis=2).max() <= 8)
        return [(height, width, gray)]
    except (BrokenImage, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return []
