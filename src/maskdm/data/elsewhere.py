"""Shards, and tables, in folders and behind URLs: from a location to what is there."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import overload

import numpy as np

from maskdm.data import shards
from maskdm.data.decode import BrokenImage
from maskdm.data.index import INDEX, Index, hash_of, read_index
from maskdm.data.remote import LostShard, RangeFile, is_http
from maskdm.data.source import Source
from maskdm.data.tables import one_split, open_parquet
from maskdm.data.tars import index_of
from maskdm.errors import UserError

MOST = 1_000_000
"""Names that a pattern may stand for."""

BUFFER = 1 << 20


class _Names(Sequence[str]):
    """The names of an index's images, made when asked for."""

    def __init__(self, index: Index) -> None:
        self._of = index

    def __len__(self) -> int:
        return len(self._of)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = range(len(self))[index]
        return self._of.name_of(found) if isinstance(found, int) else [self._of.name_of(row) for row in found]


def is_pattern(location: str) -> bool:
    """Whether a location stands for several files: shards-{000..099}.tar, or *.parquet."""
    return any(mark in location for mark in "{*") and location.endswith((".tar", ".parquet"))


def open_shards(location: str, folder: str) -> Source:
    """Shards that `maskdm pack` has written. Raises UserError."""
    return _of_index(location, read_index(folder, shards.REMOTE))


def open_tars(location: str, base: str, names: Sequence[str]) -> Source:
    """Shards that others have written: they are read through once. Of several splits one is taken. Raises UserError."""
    names, notes = one_split(names)
    source = _of_index(location, index_of(base, names, shards.REMOTE))
    return replace(source, notes=(*notes, *source.notes))


def open_pattern(location: str) -> Source:
    """Several files of one kind. Raises UserError."""
    base, _, last = location.rpartition("/")
    names = expand(last)
    if any("*" in name for name in names):
        if is_http(location):
            raise UserError(f"{location}: a web server does not list its files; write {{000..099}} for the part that counts up")
        there = shards.REMOTE.names(base or ".")
        names = sorted({name for pattern in names for name in fnmatch.filter(there, pattern) if "/" not in name})
    if not names:
        raise UserError(f"{location} stands for no file that is there")
    return _open_names(location, base or ".", names)


def open_url(location: str) -> Source:
    """What is behind a URL: shards with our index, tar files, parquet files. Raises UserError."""
    place = location.rstrip("/")
    if place.endswith((".tar", ".parquet")):
        base, _, name = place.rpartition("/")
        return _open_names(location, base, [name])
    if is_http(place):
        return open_shards(location, place)
    try:
        there = shards.REMOTE.names(place)
    except LostShard as error:
        raise UserError(f"{location} cannot be listed ({error})") from error
    if INDEX in there:
        return open_shards(location, place)
    for kind in (".tar", ".parquet"):
        names = [name for name in there if name.endswith(kind)]
        if names:
            return _open_names(location, place, names)
    raise UserError(f"{location} holds no shards: neither {INDEX}, nor .tar or .parquet files; give another folder")


def _open_names(location: str, base: str, names: Sequence[str]) -> Source:
    if names[0].endswith(".tar"):
        return open_tars(location, base, names)
    remote = shards.REMOTE
    try:
        sizes = {name: remote.size(f"{base}/{name}") for name in names}
    except LostShard as error:
        raise UserError(f"{location} cannot be read ({error})") from error

    def open_file(name: str) -> io.BufferedReader:
        return io.BufferedReader(RangeFile(remote, f"{base}/{name}", sizes[name]), BUFFER)

    return open_parquet(location, names, open_file, partial(_digest, sizes))


def _digest(sizes: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()


def _of_index(location: str, index: Index) -> Source:
    def read(row: int) -> bytes:
        shard, record = int(index.shard_of(np.array([row]))[0]), index.records[row]
        try:
            body = shards.REMOTE.read(index.address(shard), int(record["offset"]), int(record["length"]))
        except LostShard as error:
            raise BrokenImage(str(error)) from error
        if hash_of(body) != int(record["hash"]):
            raise BrokenImage("its bytes are not those of the index")
        return body

    classes = f", {len(index.class_names)} classes" if index.class_names else ""
    return Source(
        name=location,
        description=f"{len(index.shards)} shards{classes}",
        class_names=index.class_names,
        notes=tuple(f"shard {name} cannot be read ({reason}): left out" for name, reason in index.lost),
        names=_Names(index),
        labels=index.labels,
        read=read,
        identify=lambda: index.key,
        index=index,
    )


def expand(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: {000..099} counts up, {a,b} names each. Raises UserError."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers is None:
        parts = found[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < MOST:
            raise UserError(f"'{pattern}' counts from {first} to {last}; give at most {MOST} shards, the smaller number first")
        parts = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]
    return [name for part in parts for name in expand(pattern[: found.start()] + part + pattern[found.end() :])]
