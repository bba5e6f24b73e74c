"""Images of shards as a data set whose images are read when they are asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil

import numpy as np
from numpy.typing import NDArray

from maskdm.config import Data
from maskdm.data.dataset import Dataset
from maskdm.data.decode import BrokenImage, decode
from maskdm.data.index import Index, hash_of
from maskdm.data.remote import LostShard, Remote
from maskdm.data.threads import decoders, readers
from maskdm.errors import UserError

REMOTE = Remote()

GAP = 1 << 18
"""Bytes between two images that are read along with them rather than by a second request."""

LONGEST = 16 << 20
"""Bytes of one request, at most, unless an image has more."""

CHUNK = 16
"""Images decoded by a thread at a time."""

REMEMBERED = 256 << 20
"""Bytes of images kept of those asked for by number, as held-out ones are again and again."""


@dataclass(frozen=True)
class Loss:
    """What cannot be read: a shard, or an image of it; how many images that is, and why."""

    name: str
    shard: int
    row: int | None
    images: int
    reason: str


class Reader:
    """Reads and decodes images of shards, in threads, and keeps account of what cannot be read.

    A shard that does not answer, or whose bytes end early, is given up until the process ends; an image that is not what the
    index says, alone.
    """

    def __init__(self, index: Index, settings: Data) -> None:
        self.index, self.settings = index, settings
        self._lost: dict[int, Loss] = {}
        self._broken: dict[int, Loss] = {}
        self._news: list[Loss] = []
        self._lock = threading.Lock()

    def bodies(self, rows: NDArray[np.int64]) -> dict[int, bytes]:
        """The encoded images of some rows, less those that are lost. Raises UserError where too many are."""
        futures = [readers().submit(lambda piece=piece: self._read(piece)) for piece in self._pieces(rows)]
        return {row: body for future in futures for row, body in future.result().items()}

    def read(self, rows: NDArray[np.int64]) -> dict[int, bytes]:
        """The same, in this thread alone."""
        return {row: body for piece in self._pieces(rows) for row, body in self._read(piece).items()}

    def _pieces(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Rows of one shard each, near to each other."""
        rows = np.unique(rows)
        if len(rows) == 0:
            return []
        shards, records = self.index.shard_of(rows), self.index.records[rows]
        begins = records["offset"].astype(np.int64)
        ends = begins + records["length"].astype(np.int64)
        cuts, first = [0], 0
        for i in range(1, len(rows)):
            if shards[i] != shards[i - 1] or not 0 <= begins[i] - ends[i - 1] <= GAP or ends[i] - begins[first] > LONGEST:
                cuts.append(first := i)
        return [rows[a:b] for a, b in pairwise([*cuts, len(rows)])]

    def _read(self, rows: NDArray[np.int64]) -> dict[int, bytes]:
        shard = int(self.index.shard_of(rows[:1])[0])
        if shard in self._lost:
            self.check()
            return {}
        records = self.index.records[rows]
        first, last = int(records["offset"][0]), int(records["offset"][-1] + records["length"][-1])
        try:
            body = REMOTE.read(self.index.address(shard), first, last - first)
        except LostShard as error:
            name = self.index.shards[shard].name
            self.lose(Loss(name, shard, None, self.index.shards[shard].images, str(error)))
            return {}
        found: dict[int, bytes] = {}
        for row, record in zip(rows.tolist(), records, strict=True):
            begins = int(record["offset"]) - first
            image = body[begins : begins + int(record["length"])]
            if row in self._broken:
                continue
            if hash_of(image) == int(record["hash"]):
                found[row] = image
            else:
                self.lose(Loss(self.index.name_of(row), shard, row, 1, "its bytes are not those of the index"))
        return found

    def decode(self, bodies: Sequence[tuple[int, bytes]]) -> dict[int, NDArray[np.uint8]]:
        """Pixels [height, width, channels] of encoded images, less those that cannot be decoded."""
        chunks = [bodies[i : i + CHUNK] for i in range(0, len(bodies), CHUNK)]
        futures = [decoders().submit(lambda chunk=chunk: self._decode(chunk)) for chunk in chunks]
        return {row: pixels for future in futures for row, pixels in future.result().items()}

    def _decode(self, bodies: Sequence[tuple[int, bytes]]) -> dict[int, NDArray[np.uint8]]:
        found: dict[int, NDArray[np.uint8]] = {}
        for row, body in bodies:
            try:
                found[row], _ = decode(body, self.settings)
            except BrokenImage as error:
                shard = int(self.index.shard_of(np.array([row]))[0])
                self.lose(Loss(self.index.name_of(row), shard, row, 1, str(error)))
        return found

    # --- what is lost ---

    def is_lost(self, row: int) -> bool:
        """Whether it is known that an image cannot be read."""
        return row in self._broken or int(self.index.shard_of(np.array([row]))[0]) in self._lost

    def loss_of(self, row: int) -> Loss:
        """Why an image, which is lost, is."""
        return self._broken.get(row) or self._lost[int(self.index.shard_of(np.array([row]))[0])]

    def news(self) -> list[Loss]:
        """What was found lost since this was last asked."""
        with self._lock:
            found, self._news = self._news, []
        return found

    def lose(self, loss: Loss, tell: bool = True) -> bool:
        """Note a loss, and whether it is to be told; returns whether it is new. Raises UserError where more is lost than may be."""
        with self._lock:
            known, key = (self._lost, loss.shard) if loss.row is None else (self._broken, loss.row)
            new = key not in known
            if new:
                known[key] = loss
                if tell:
                    self._news.append(loss)
        self.check()
        return new

    def check(self) -> None:
        """Raise UserError where more is lost than may be: whoever found it may not have been listened to."""
        with self._lock:
            found = [*self._lost.values(), *(each for each in self._broken.values() if each.shard not in self._lost)]
        count, total = sum(each.images for each in found), len(self.index)
        if count > self.settings.max_broken * total + 1e-6:
            refuse(self.index.base, [(each.name, each.reason) for each in found], count, total)


def refuse(
    name: str,
    lost: Sequence[tuple[str, str]],
    count: int,
    total: int,
    what: str = "images",
    way: str = "mend that, and the same command goes on",
) -> None:
    """Say that too many cannot be read, and the way out. Raises UserError."""
    first = "; ".join(f"{shard}: {reason}" for shard, reason in lost[:3]) + (f"; and {len(lost) - 3} more" if len(lost) > 3 else "")
    share = min(1.0, ceil(100 * count / max(1, total)) / 100)
    raise UserError(
        f"{count} of {total} {what} of {name} cannot be read ({first}); {way}, "
        f"or begin a run that goes on without them by --max-broken {share:g}"
    )


class ShardImages:
    """Images of shards, indexed as an array [n, height, width, channels]: what is asked for is read.

    In place of an image that is lost stands the next of those asked for at once that is not; if it is `strict`, nothing does.
    """

    nbytes = 0
    """Of pixels that are kept on this machine."""

    def __init__(self, reader: Reader, strict: bool = False) -> None:
        self.reader, self.strict = reader, strict
        settings = reader.settings
        self.shape = (len(reader.index), *settings.image_size, settings.channels)
        self.dtype = np.dtype(np.uint8)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        """The number of images."""
        return self.shape[0]

    def __getitem__(self, key: int | np.integer | slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pixels [n, height, width, channels] of some rows, or [height, width, channels] of one. Raises UserError: all are lost, or any."""
        if isinstance(key, int | np.integer):
            return self._take([range(len(self))[key]])[0]
        rows = list(range(len(self))[key]) if isinstance(key, slice) else np.asarray(key).tolist()
        return self._take(rows) if rows else np.zeros((0, *self.shape[1:]), dtype=np.uint8)

    def _take(self, rows: list[int]) -> NDArray[np.uint8]:
        missing = [row for row in rows if row not in self._kept]
        self._keep(self.reader.bodies(np.array(missing, dtype=np.int64)))
        found = self.reader.decode([(row, self._kept[row]) for row in dict.fromkeys(rows) if row in self._kept])
        gone = [row for row in dict.fromkeys(rows) if row not in found]
        if gone and (self.strict or not found):
            self._refuse(gone, len({*rows}))
        there = [i for i, row in enumerate(rows) if row in found]
        taken = np.stack([found[rows[there[int(np.searchsorted(there, i)) % len(there)]]] for i in range(len(rows))])
        self._forget()
        return taken

    def _refuse(self, gone: list[int], asked: int) -> None:
        first = "; ".join(f"{loss.name}: {loss.reason}" for loss in {self.reader.loss_of(row): None for row in gone[:100]})[:500]
        raise UserError(
            f"{len(gone)} of {asked} images asked for of {self.reader.index.base} cannot be read ({first}), and nothing can stand in for "
            f"them here; mend that, and the same command goes on"
        )

    def _keep(self, bodies: dict[int, bytes]) -> None:
        self._kept |= bodies
        self._bytes += sum(map(len, bodies.values()))

    def _forget(self) -> None:
        while self._bytes > REMEMBERED:
            self._bytes -= len(self._kept.popitem(last=False)[1])


class ShardDataset(Dataset):
    """Images in shards: nothing is decoded beforehand."""

    @property
    def reader(self) -> Reader:
        """What reads the images."""
        assert isinstance(self.images, ShardImages)
        return self.images.reader

    @property
    def index(self) -> Index:
        """Where the images lie."""
        return self.reader.index

    @cached_property
    def _strict(self) -> ShardImages:
        return ShardImages(self.reader, strict=True)

    @property
    def whole(self) -> ShardImages:
        """The images, of which every one is there; a UserError where one is not."""
        return self._strict

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each image."""
        return tuple(self.index.name_of(row) for row in range(len(self)))

    def name_of(self, row: int) -> str:
        """Its shard's name, and its number in it."""
        return self.index.name_of(row)

    @cached_property
    def hashes(self) -> NDArray[np.uint8]:
        """[n, 8], of each image's encoded bytes."""
        return np.ascontiguousarray(self.index.records["hash"]).view(np.uint8).reshape(-1, 8)


def open_dataset(index: Index, settings: Data, name: str, notes: tuple[str, ...]) -> ShardDataset:
    """The images of an index as a data set. Raises UserError where too many of them are known to be lost."""
    if index.lost:
        share = len(index.lost), len(index.lost) + len(index.shards)
        if share[0] > settings.max_broken * share[1]:
            refuse(name, index.lost, *share, "shards", f"mend that, remove {index.path}, and run the command again")
    colour = settings.background.removeprefix("#").lower()
    content = hashlib.sha256(json.dumps([index.key, settings.image_size, settings.channels, settings.fit, colour]).encode()).hexdigest()
    return ShardDataset(
        images=ShardImages(Reader(index, settings)),
        labels=index.labels,
        class_names=index.class_names,
        fingerprint=index.key,
        content_hash=content,
        broken=index.lost,
        notes=notes,
        path=index.path,
    )
