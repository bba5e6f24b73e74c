"""Decode every image once, into files that training memory-maps; a second run finds them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from maskdm.config import Data
from maskdm.data.dataset import HASHES, IMAGES, LABELS, MANIFEST, SUMMARY, Dataset, open_cached
from maskdm.data.decode import BrokenImage, decode
from maskdm.data.index import Index
from maskdm.data.shards import open_dataset
from maskdm.data.source import Source
from maskdm.errors import UserError

FORMAT = 1
"""Raised when decoding or the files of the cache change, so that older caches are not taken."""

CHUNK_ITEMS, CHUNK_BYTES = 64, 8 << 20
"""Images that a thread decodes at a time, at most, and the bytes of their pixels."""

MAX_THREADS = 16
"""More would wait for the interpreter's lock."""

DAY = 86400.0
PARTIAL = ".partial-"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Decoded:
    """One image's pixels and their SHA-256; or, without pixels, the one note is why."""

    pixels: NDArray[np.uint8] | None
    digest: bytes
    notes: tuple[str, ...]


def prepare(source: Source, settings: Data, cache_dir: Path, progress: Progress | None = None) -> Dataset:
    """Decode all images as set, or open them where an earlier call left them in `cache_dir`.

    Images that cannot be read are left out and listed in `broken`; `settings.max_broken=1` lists them whatever their
    share. `progress` is called with (images done, images in all), not at all when the cache has them.
    Raises UserError: too many broken images, fewer than two good ones, no classes where `conditional` asks for them,
    no room on the disk.
    """
    if source.index is not None:
        return _use(source, source.index, settings)
    if settings.conditional and not source.class_names:
        raise UserError(f"{source.name} has no classes to learn; drop --conditional, or sort it into a sub-folder per class")
    path = cache_dir / _key(source, settings)
    dataset = open_cached(path, source.class_names, source.notes)
    if dataset is None:
        try:
            dataset = _build(source, settings, cache_dir, path, progress)
        except OSError as error:
            raise _about_disk(error, source, settings, cache_dir) from error
    check_broken(source, settings, dataset.broken, len(dataset))
    unlabeled = 0 if dataset.labels is None else np.count_nonzero(dataset.labels < 0)
    if settings.conditional and unlabeled:
        raise UserError(f"{unlabeled} of {len(dataset)} images of {source.name} have no class; drop them, or --conditional")
    return dataset


def _use(source: Source, index: Index, settings: Data) -> Dataset:
    """The images where they lie."""
    if settings.conditional and not index.class_names:
        raise UserError(f"{source.name} has no classes to learn; drop --conditional, or pack images that have")
    dataset = open_dataset(index, settings, source.name, source.notes)
    if len(dataset) < 2:
        raise UserError(f"{source.name} has only {len(dataset)} images; training needs at least 2")
    unlabeled = 0 if dataset.labels is None else np.count_nonzero(dataset.labels < 0)
    if settings.conditional and unlabeled:
        raise UserError(f"{unlabeled} of {len(dataset)} images of {source.name} have no class; drop --conditional, or pack others")
    return dataset


def _key(source: Source, settings: Data) -> str:
    parts = [FORMAT, source.fingerprint(), decoding(settings)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def decoding(settings: Data) -> dict[str, str | int | list[int]]:
    """The settings that change pixels."""
    return {
        "image_size": list(settings.image_size),
        "channels": settings.channels,
        "fit": settings.fit,
        "background": settings.background.removeprefix("#").lower(),
    }


def check_broken(source: Source, settings: Data, broken: tuple[tuple[str, str], ...], good: int) -> None:
    """Raise UserError where too many images cannot be read."""
    total = good + len(broken)
    first = "; ".join(f"{name}: {reason}" for name, reason in broken[:3]) + ("; ..." if len(broken) > 3 else "")
    if good == 0:
        raise UserError(f"no image of {source.name} can be read ({first}); give images such as .png or .jpg")
    if len(broken) > settings.max_broken * total + 1e-6:  # the share that the message gives is rounded
        share = min(1.0, ceil(100 * len(broken) / total) / 100)
        raise UserError(
            f"{len(broken)} of {total} images of {source.name} cannot be read ({first}); "
            f"remove them, or go on without them by --max-broken {share:g}"
        )
    if good < 2:
        raise UserError(f"{source.name} has only one image that can be read; training needs at least 2")


def _about_disk(error: OSError, source: Source, settings: Data, cache_dir: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = len(source) * settings.image_size[0] * settings.image_size[1] * settings.channels / 1e9
        return UserError(f"the disk of {cache_dir} is full: the images take {need:.2g} GB; free some, or move MASKDM_CACHE")
    return UserError(f"cache {cache_dir} cannot be written ({error.strerror or error}); set MASKDM_CACHE to a folder that can")


# --- building a cache ---------------------------------------------------------------------------------------------


def _build(source: Source, settings: Data, cache_dir: Path, path: Path, progress: Progress | None) -> Dataset:
    """Write under a name of this process's own, then rename: a reader sees all or nothing, whoever is killed."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache_dir)
    partial = cache_dir / f"{PARTIAL}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        good, broken = _write(source, settings, partial, progress)
        if good == 0:
            check_broken(source, settings, broken, good)
        return _publish(source, partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(source: Source, partial: Path, path: Path) -> Dataset:
    try:
        partial.rename(path)
    except OSError:
        # another process was first, or what is there is damaged, which cannot be renamed over and goes with `partial`
        there = open_cached(path, source.class_names, source.notes)
        if there is not None:
            return there
        away = path.with_name(f"{partial.name}-damaged")
        path.rename(away)
        partial.rename(path)
        shutil.rmtree(away, ignore_errors=True)
    dataset = open_cached(path, source.class_names, source.notes)
    if dataset is None:
        raise OSError(errno.EIO, "what was written cannot be read back")
    return dataset


def _remove_stale(cache_dir: Path) -> None:
    """Remove what killed processes left: those of this machine at once, others after a day without a change."""
    for left in cache_dir.glob(f"{PARTIAL}*"):
        with suppress(OSError, ValueError, IndexError):
            host, pid = left.name.removeprefix(PARTIAL).removesuffix("-damaged").rsplit("-", 2)[:2]
            changed = max(file.stat().st_mtime for file in (left, *left.iterdir()))
            if time.time() - changed > DAY or (host == socket.gethostname() and not _is_alive(int(pid))):
                shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 would end the process: leave it to its age
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _write(source: Source, settings: Data, folder: Path, progress: Progress | None) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Decode into the files of a cache. Returns the number of good images, and (name, reason) of the broken ones."""
    shape = (*settings.image_size, settings.channels)
    hashes: list[bytes] = []
    labels: list[int] = []
    broken: list[tuple[str, str]] = []
    notes: Counter[str] = Counter()
    # written in order rather than through a memory map: on a full disk that is an error, and not a killed process
    with (folder / IMAGES).open("wb") as images, (folder / MANIFEST).open("w", encoding="utf-8") as manifest:
        _write_header(images, len(source), shape)
        for index, item in enumerate(decode_all(source, settings, progress)):
            name = source.item_name(index)
            row = None if item.pixels is None else len(hashes)
            line = {"name": name, "index": row, "notes": item.notes, "sha256": item.digest.hex()}
            manifest.write(json.dumps(line) + "\n")
            if item.pixels is None:
                broken.append((name, item.notes[0]))
                continue
            images.write(item.pixels.data)
            hashes.append(item.digest)
            labels.append(source.label(index))
            notes.update(item.notes)
        images.seek(0)
        _write_header(images, len(hashes), shape)
    np.save(folder / LABELS, np.array(labels, dtype=np.int64))
    np.save(folder / HASHES, np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32))
    summary = {
        "format": FORMAT,
        "source": source.name,
        "fingerprint": source.fingerprint(),
        "settings": decoding(settings),
        "class_names": source.class_names,
        "count": len(hashes),
        "content_hash": hashlib.sha256(b"".join(hashes)).hexdigest(),
        "broken": broken,
        "notes": [f"{count} image{'s' if count > 1 else ''} {note}" for note, count in notes.most_common()],
        "sizes": {name: (folder / name).stat().st_size for name in (IMAGES, MANIFEST, LABELS, HASHES)},
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return len(hashes), tuple(broken)


def _write_header(file: IO[bytes], count: int, shape: tuple[int, ...]) -> None:
    """NumPy pads a header for any first side, so that this can be written again with the count that is known at the end."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})


def decode_all(source: Source, settings: Data, progress: Progress | None, first: int = 0) -> Iterator[Decoded]:
    """All images from `first` on, in order, decoded by a thread per core.

    Threads, as they start at once, and Pillow decodes and resizes outside the interpreter's lock. A trial on two busy cores,
    start included, 10 000 CIFAR-10 JPEG files, per second: one thread 8 800, two 9 800, two forked processes 7 500, two
    spawned 3 400. A longer run was not tried, and would favour processes more.
    """
    size = settings.image_size[0] * settings.image_size[1] * settings.channels
    step = max(1, min(CHUNK_ITEMS, CHUNK_BYTES // size))
    chunks = iter(range(first, len(source), step))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, MAX_THREADS)

    def run(start: int) -> list[Decoded]:
        return [_decode_one(source, settings, index) for index in range(start, min(start + step, len(source)))]

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    pending: deque[Future[list[Decoded]]] = deque()
    done = first
    try:
        # Pillow's warnings, on odd metadata and on large images, say nothing that the notes do not
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while True:
                while len(pending) < 2 * workers and (start := next(chunks, None)) is not None:
                    pending.append(pool.submit(run, start))
                if not pending:
                    return
                decoded = pending.popleft().result()
                yield from decoded
                done += len(decoded)
                if progress is not None:
                    progress(done, len(source))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode_one(source: Source, settings: Data, index: int) -> Decoded:
    try:
        pixels, notes = decode(source.load(index), settings)
    except BrokenImage as error:
        return Decoded(None, b"", (str(error),))
    except (OSError, ValueError) as error:  # the file that holds it with others, such as a table, is damaged there
        return Decoded(None, b"", (f"cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})",))
    pixels = np.ascontiguousarray(pixels)
    return Decoded(pixels, hashlib.sha256(pixels.data).digest(), notes)
