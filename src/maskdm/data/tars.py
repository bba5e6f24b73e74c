"""Tar shards that others wrote, in the layout of WebDataset: read through once, for an index."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

from maskdm.config import Data
from maskdm.data.cache import cache_directory, put
from maskdm.data.decode import MOST_BYTES, BrokenImage, decode, open_image, orientation_swaps
from maskdm.data.index import INDEX, RECORD, About, Index, Records, Shard, hash_of, read_index, write_index
from maskdm.data.remote import LostShard, RangeFile, Remote
from maskdm.data.source import class_labels
from maskdm.data.threads import readers
from maskdm.errors import UserError

IMAGES = frozenset({"avif", "bmp", "gif", "jpeg", "jpg", "png", "ppm", "pgm", "tif", "tiff", "webp"})

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


def index_of(base: str, names: Sequence[str], remote: Remote, note: Callable[[str], None] | None = None) -> Index:
    """The index of tar files below a folder or URL, made by reading all of them through, once, and kept in the cache.

    Reading goes on where it was stopped. A shard that cannot be read is left out and named in `lost`. Raises UserError where none can.
    """
    key = hashlib.sha256(json.dumps([base, list(names)]).encode()).hexdigest()[:32]
    folder = cache_directory() / f"tars-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        sizes = _sizes(base, names, remote)
        known = folder / "sizes.json"
        if (folder / INDEX).is_file() and json.loads(known.read_bytes()) != sizes:
            (folder / INDEX).unlink()  # the shards have changed since
        if not (folder / INDEX).is_file():
            _scan_all(folder, base, names, sizes, remote, note)
            put(known, json.dumps(sizes).encode())
    return read_index(str(folder), remote, base)


def _sizes(base: str, names: Sequence[str], remote: Remote) -> dict[str, int | str]:
    """The size of each shard, or why it is not known."""

    def size(name: str) -> int | str:
        try:
            return remote.size(f"{base}/{name}")
        except LostShard as error:
            return str(error)

    futures = [readers().submit(partial(size, name)) for name in names]
    return {name: future.result() for name, future in zip(names, futures, strict=True)}


def _scan_all(
    folder: Path, base: str, names: Sequence[str], sizes: dict[str, int | str], remote: Remote, note: Callable[[str], None] | None
) -> None:
    def scan(number: int, name: str) -> Scanned | str:
        size, part = sizes[name], folder / f"{number:06d}"
        if isinstance(size, str):
            return size
        kept = _kept(part, name, size)
        if kept is not None:
            return kept
        try:
            found = _scan(base, name, size, remote)
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
    for number, (name, future) in enumerate(zip(names, futures, strict=True), 1):
        found = future.result()
        if isinstance(found, str):
            lost.append((name, found))
        elif found.shard.images:
            good.append(found)
        if note is not None:
            note(f"read {number} of {len(names)} shards")
    if not good:
        why = f"{lost[0][0]}: {lost[0][1]}" if lost else f"files such as {names[0]} have none of .{', .'.join(sorted(IMAGES))}"
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


def _scan(base: str, name: str, size: int, remote: Remote) -> Scanned:
    """Read a shard through. Raises LostShard where it cannot be read, or ends before its end."""
    found: list[tuple[int, int, int, int]] = []
    keys: list[str] = []
    classes: dict[str, str] = {}
    looks: list[tuple[int, int, bool]] = []
    file = io.BufferedReader(RangeFile(remote, f"{base}/{name}", size), BUFFER)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, last = member.name.rpartition("/")
                stem, _, extension = last.partition(".")
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None  # a hole has any size
                key = f"{folder}/{stem}"
                if content is not None and extension.lower() in IMAGES:
                    if member.size > MOST_BYTES:
                        raise LostShard(f"{name}: {member.name} has {member.size / 2**30:.1f} GiB, more than an image may have")
                    body = content.read()
                    if len(body) < member.size:
                        raise LostShard(f"{name} ends within an image; it is damaged")
                    found.append((member.offset_data, len(body), -1, hash_of(body)))
                    keys.append(key)
                    looks += _look(body) if len(looks) < LOOKED_AT else []
                elif content is not None and extension == "cls":
                    classes[key] = content.read(100).decode("utf-8", "replace").strip()
    except tarfile.TarError as error:
        raise LostShard(f"{name} is no tar file, or damaged ({error})") from error
    repeated = [key for key, times in Counter(keys).items() if times > 1]
    if repeated:
        raise LostShard(f"{name} has several images of one name, such as {repeated[0].lstrip('/')}: which is meant is not known")
    return Scanned(Shard(name, size, "", len(found)), np.array(found, dtype=RECORD), [classes.get(key) for key in keys], looks)


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
