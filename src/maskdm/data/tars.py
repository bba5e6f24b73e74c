"""Tar shards in the layout of WebDataset: prepared images written to them, and read back by number."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdm.data.dataset import Dataset
from maskdm.data.remote import LostShard, Remote
from maskdm.errors import UserError

INDEX = "index.json"
PARTIAL = "index.partial.json"


@dataclass(frozen=True)
class Shard:
    """A tar file: its name, size in bytes, SHA-256, and where each image's bytes lie in it (offset, length)."""

    name: str
    size: int
    sha256: str
    images: list[list[int]]


@dataclass(frozen=True)
class Index:
    """What `pack` wrote. `content` is the hash of the pixels of the data set it came from."""

    content: str
    shard_images: int
    class_names: list[str]
    shards: list[Shard]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Images in each shard."""
        return np.array([len(shard.images) for shard in self.shards], dtype=np.int64)


def read_index(path: Path) -> Index:
    """The index of a folder of shards. Raises UserError where it is missing or damaged."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return Index(found["content"], found["shard_images"], found["class_names"], [Shard(**each) for each in found["shards"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as an index of shards ({error}); write the shards again with a new folder") from error


def pack(dataset: Dataset, folder: Path, shard_images: int) -> Index:
    """Write the images to tar shards and an index. A second call goes on where the first was stopped. Raises UserError for other data."""
    if shard_images < 1:
        raise UserError(f"{shard_images} images a shard are too few; give 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    done: list[Shard] = []
    for path in (folder / INDEX, folder / PARTIAL):
        if path.exists():
            index = read_index(path)
            if (index.content, index.shard_images) != (dataset.content_hash, shard_images):
                raise UserError(f"{folder} holds shards of other images or of another size; give another folder")
            done = index.shards
            break
    kept = {shard.name: shard for shard in done if _is_whole(folder / shard.name, shard.size)}
    shards: list[Shard] = []
    for number, first in enumerate(range(0, len(dataset), shard_images)):
        name = f"{number:06d}.tar"
        rows = range(first, min(first + shard_images, len(dataset)))
        shards.append(kept[name] if name in kept else _write_shard(dataset, rows, folder / name))
        index = Index(dataset.content_hash, shard_images, list(dataset.class_names), shards)
        if name not in kept:
            _replace(folder / PARTIAL, json.dumps(asdict(index)).encode())
    index = Index(dataset.content_hash, shard_images, list(dataset.class_names), shards)
    _replace(folder / INDEX, json.dumps(asdict(index)).encode())
    (folder / PARTIAL).unlink(missing_ok=True)
    return index


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_shard(dataset: Dataset, rows: range, path: Path) -> Shard:
    buffer = io.BytesIO()
    images: list[list[int]] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            pixels, png = dataset.images[row], io.BytesIO()
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(png, "PNG")
            body = png.getvalue()
            images.append([buffer.tell() + tarfile.BLOCKSIZE, len(body)])
            _add(tar, f"{row:09d}.png", body)
            if dataset.labels is not None:
                _add(tar, f"{row:09d}.cls", str(int(dataset.labels[row])).encode())
            _add(tar, f"{row:09d}.json", json.dumps({"name": dataset.name_of(row)}).encode())
    body = buffer.getvalue()
    _replace(path, body)
    return Shard(path.name, len(body), hashlib.sha256(body).hexdigest(), images)


def _add(tar: tarfile.TarFile, name: str, body: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(body)
    tar.addfile(member, io.BytesIO(body))


def _replace(path: Path, body: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_image(remote: Remote, folder: str, shard: Shard, row: int) -> NDArray[np.uint8]:
    """Pixels [height, width, channels] of an image of a shard. Raises LostShard where its bytes are missing or not an image."""
    address = f"{folder}/{shard.name}"
    body = remote.read(address, *shard.images[row])
    try:
        pixels = np.asarray(Image.open(io.BytesIO(body), formats=("PNG",)))
    except (OSError, SyntaxError, ValueError) as error:
        raise LostShard(f"{address}: image {row} is damaged") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]
