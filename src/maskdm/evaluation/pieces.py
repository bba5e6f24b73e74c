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
    folder must be one that all of them see. The name must stand for the content.
    """
    partial, done = path.with_suffix(".partial"), path.with_suffix(".done")
    if ranks.first and not path.is_file():
        _reserve(partial, done, shape, dtype)
    ranks.wait()
    if not path.is_file():
        array = np.load(partial, mmap_mode="r+")
        starts = range(0, shape[0], PIECE)
        for number, start in enumerate(starts):
            marker = done / str(start)
            if number % ranks.world != ranks.rank or marker.is_file():
                continue
            rows = slice(start, min(start + PIECE, shape[0]))
            array[rows] = make(rows)
            array.flush()
            marker.touch()
            if progress is not None:
                progress(rows.stop, shape[0])
        del array
    ranks.wait()
    if ranks.first and not path.is_file():
        with contextlib.suppress(FileNotFoundError):  # another command, doing the same, was quicker
            os.replace(partial, path)
        shutil.rmtree(done, ignore_errors=True)
    ranks.wait()
    return np.load(path, mmap_mode="c")


def _reserve(partial: Path, done: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    """Make room for the array, unless an earlier call did: a disk that fills up while pages are written would kill the process."""
    if partial.is_file() and done.is_dir():
        with contextlib.suppress(ValueError, OSError):
            earlier = np.load(partial, mmap_mode="r")
            if earlier.shape == shape and earlier.dtype == dtype:
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
