"""`maskdm pack`: images decoded as for training, written as tar shards in the layout of WebDataset, with an index."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdm.config import Data
from maskdm.data.cache import put
from maskdm.data.index import INDEX, RECORD, About, Index, Records, Shard, hash_of, read_index, write_index
from maskdm.data.prepare import check_broken, decode_all, decoding
from maskdm.data.remote import Remote
from maskdm.data.source import Source
from maskdm.errors import UserError

PARTS = "parts"
"""Folder of what is known of each shard until all are written."""

ENCODERS = 8

Progress = Callable[[int, int], None]


@dataclass
class Part:
    """A shard that is written: how many images of the source it ends behind, and which of them were broken."""

    shard: Shard
    until: int
    broken: list[tuple[str, str]]
    records: Records


@dataclass(frozen=True)
class _Item:
    name: str
    label: int
    pixels: NDArray[np.uint8]


def pack(
    source: Source,
    settings: Data,
    folder: Path,
    shard_images: int,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Index:
    """Write all images of a source, in its order. A second call goes on where the first was stopped.

    A shard's images are in memory at a time. Images that cannot be read are left out, up to `settings.max_broken`, and told to `note`.
    Raises UserError: too many of those, or a folder with other things in it.
    """
    if shard_images < 1:
        raise UserError(f"--shard-images is {shard_images}; give 1 or more")
    about = hashlib.sha256(json.dumps([source.fingerprint(), decoding(settings), shard_images]).encode()).hexdigest()
    done = _take_up(folder, about)
    if done is None:
        return _whole(read_index(str(folder), Remote()))
    parts = list(done)
    for part in _write_shards(source, settings, folder, shard_images, parts, progress):
        _note(folder / PARTS, part)
        parts.append(part)
    broken = [each for part in parts for each in part.broken]
    if note is not None:
        for name, reason in broken:
            note(f"{name} is left out: {reason}")
    images = sum(part.shard.images for part in parts)
    check_broken(source, settings, tuple(broken), images)
    size, gray = settings.image_size, settings.channels == 1
    records = np.concatenate([part.records for part in parts])
    write_index(folder, [part.shard for part in parts if part.shard.images], records, About(source.class_names, *size, gray, (), about))
    shutil.rmtree(folder / PARTS)
    return read_index(str(folder), Remote())


def _take_up(folder: Path, about: str) -> list[Part] | None:
    """What an earlier call has written; None where that is all. Raises UserError where the folder holds something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}") from None
    mark = folder / PARTS / "about"
    there = mark if mark.is_file() else folder / INDEX
    if there.is_file():
        try:
            known = mark.read_text() if there == mark else json.loads(there.read_bytes())["source"]
        except (ValueError, KeyError, TypeError):
            known = None
        if known != about:
            raise UserError(f"--out {folder} holds shards of other images or settings; give another folder")
        return _parts(folder) if there == mark else None
    if any(entry.name != PARTS for entry in folder.iterdir()):
        raise UserError(f"--out {folder} holds other files; give an empty or a new folder")
    (folder / PARTS).mkdir(exist_ok=True)
    put(mark, about.encode())
    return []


def _whole(index: Index) -> Index:
    for shard in index.shards:
        path = Path(index.base) / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            raise UserError(f"{path} is missing or damaged; remove {index.base} and write it again")
    return index


def _parts(folder: Path) -> list[Part]:
    """The shards that are there whole, up to the first that is not."""
    found: list[Part] = []
    while (file := folder / PARTS / f"{len(found):06d}.json").is_file():
        known: Any = json.loads(file.read_text())
        shard = Shard(**known["shard"])
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            break
        broken = [(name, reason) for name, reason in known["broken"]]
        found.append(Part(shard, known["until"], broken, np.load(file.with_suffix(".npy"))))
    return found


def _note(folder: Path, part: Part) -> None:
    """Keep what is known of a shard; what comes last says that it is whole."""
    file = folder / part.shard.name.replace(".tar", ".json")
    body = io.BytesIO()
    np.save(body, part.records, allow_pickle=False)
    put(file.with_suffix(".npy"), body.getvalue())
    put(file, json.dumps({"shard": asdict(part.shard), "until": part.until, "broken": part.broken}).encode())


def _write_shards(
    source: Source, settings: Data, folder: Path, shard_images: int, done: Sequence[Part], progress: Progress | None
) -> Iterator[Part]:
    """The shards that are missing, each once it is on the disk."""
    number, row = len(done), sum(part.shard.images for part in done)
    first = done[-1].until if done else 0
    items: list[_Item] = []
    broken: list[tuple[str, str]] = []
    with ThreadPoolExecutor(ENCODERS, "maskdm-encode") as encoders:
        for at, found in enumerate(decode_all(source, settings, progress, first), first):
            if found.pixels is None:
                broken.append((source.item_name(at), found.notes[0]))
            else:
                items.append(_Item(source.item_name(at), source.label(at), found.pixels))
            if len(items) == shard_images or at + 1 == len(source):
                pngs = list(encoders.map(_encode, [item.pixels for item in items]))
                shard, records = _write(folder / f"{number:06d}.tar", items, pngs, row)
                yield Part(shard, at + 1, broken, records)
                number, row = number + 1, row + len(items)
                items, broken = [], []


def _encode(pixels: NDArray[np.uint8]) -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(png, "PNG")
    return png.getvalue()


def _write(path: Path, items: Sequence[_Item], pngs: Sequence[bytes], row: int) -> tuple[Shard, Records]:
    buffer = io.BytesIO()
    records = np.zeros(len(items), dtype=RECORD)
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (item, png) in enumerate(zip(items, pngs, strict=True)):
            records[i] = (buffer.tell() + tarfile.BLOCKSIZE, len(png), item.label, hash_of(png))
            _add(tar, f"{row + i:09d}.png", png)
            if item.label >= 0:
                _add(tar, f"{row + i:09d}.cls", str(item.label).encode())
            _add(tar, f"{row + i:09d}.json", json.dumps({"name": item.name}).encode())
    body = buffer.getvalue()
    put(path, body)
    return Shard(path.name, len(body), hashlib.sha256(body).hexdigest(), len(items)), records


def _add(tar: tarfile.TarFile, name: str, body: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(body)
    tar.addfile(member, io.BytesIO(body))
