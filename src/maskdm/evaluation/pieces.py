"""Large arrays computed piece by piece into a file: resumed after a kill, shared by several processes, read without loading."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskdm.engine import Ranks

PIECE = 256
"""Images drawn, or turned into features, at a time."""

Progress = Callable[[int, int], None]


def fill(
    path: Path,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    make: Callable[[slice], NDArray[Any]],
    ranks: Ranks,
    progress: Progress | None = None,
) -> NDArray[Any]:
    """The array in `path`, mapped (writing to it leaves the file alone); rows that are not there yet come from `make(rows)`.

    Pieces done are marked, so that another call goes on where a killed one stopped. With several ranks each makes its share; the
    folder must be one that all of them see. The name must stand for the content; a file of another shape or type is made anew.
    """
    partial, done = path.with_suffix(".partial"), path.with_suffix(".done")
    if ranks.first and path.is_file() and not _holds(path, shape, dtype):
        path.unlink(missing_ok=True)
    if ranks.first and not path.is_file():
        _reserve(partial, done, shape, dtype)
    ranks.wait()
    if not path.is_file():
        try:
            _make_share(partial, done, make, ranks, progress)
        except FileNotFoundError:
            if not path.is_file():  # else another command, doing the same, was quicker, and what it made is as good
                raise
    ranks.wait()
    if ranks.first and not path.is_file():
        with contextlib.suppress(FileNotFoundError):  # another command, doing the same, was quicker
            os.replace(partial, path)
        shutil.rmtree(done, ignore_errors=True)
    ranks.wait()
    return np.load(path, mmap_mode="c")


def _make_share(partial: Path, done: Path, make: Callable[[slice], NDArray[Any]], ranks: Ranks, progress: Progress | None) -> None:
    """Fill this rank's pieces of what is not there yet."""
    array = np.load(partial, mmap_mode="r+")
    for number, start in enumerate(range(0, len(array), PIECE)):
        marker = done / str(start)
        if number % ranks.world != ranks.rank or marker.is_file():
            continue
        rows = slice(start, min(start + PIECE, len(array)))
        array[rows] = make(rows)
        array.flush()
        marker.touch()
        if progress is not None:
            progress(rows.stop, len(array))


def _holds(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> bool:
    """Whether the file is there, whole, and an array of this shape and type."""
    try:
        found = np.load(path, mmap_mode="r")
    except (ValueError, OSError):
        return False
    return found.shape == shape and found.dtype == dtype


def _reserve(partial: Path, done: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    """Make room for the array, unless an earlier call did: a disk that fills up while pages are written would kill the process."""
    if done.is_dir() and _holds(partial, shape, dtype):
        return
    shutil.rmtree(done, ignore_errors=True)
    done.mkdir(parents=True)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with partial.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
        start = file.tell()
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), start, max(1, size))
        except OSError:
            partial.unlink()
            raise
        file.truncate(start + size)
