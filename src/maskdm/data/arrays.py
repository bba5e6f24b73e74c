"""Images as one array: a .npy or .npz file, or scikit-learn's digits."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from maskdm.data.decode import BrokenImage
from maskdm.data.source import Item, Source, class_labels, digest_files
from maskdm.errors import UserError, shorten

IMAGE_KEYS = ("images", "x", "arr_0")
LABEL_KEYS = ("labels", "label", "y", "arr_1")
NAME_KEYS = ("class_names", "classes")
LOOKED_AT = 64

Array = NDArray[Any]


def open_array(location: str, path: Path) -> Source:
    """A .npy array, memory-mapped, or the images and labels of a .npz. Raises UserError for anything else."""
    arrays: dict[str, Array] | None = None
    try:
        opened: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(opened, np.ndarray):
            with opened as archive:
                _check_fits(location, sum(entry.file_size for entry in archive.zip.infolist()))
                arrays = {key: archive[key] for key in archive.files}
    except UserError:
        raise
    except Exception as error:  # a damaged header or archive has the readers raise whatever it leads them to
        reason = shorten(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"{location} cannot be read as numbers ({reason}); save it again with numpy.save or savez") from error
    return _array_source(location, path, location, opened, None, ()) if arrays is None else _open_archive(location, path, arrays)


def _check_fits(location: str, size: int) -> None:
    """Refuse an archive that unpacks to more than the memory that is free: a megabyte of one can hold a terabyte of zeros."""
    free = psutil.virtual_memory().available
    if size > free:
        raise UserError(f"{location} unpacks to {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free; save the images as .npy")


def open_digits(location: str) -> Source:
    """scikit-learn's handwritten digits: 1 797 gray images of 8 x 8, ten classes."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = np.asarray(bunch.target, dtype=np.int64)
    return Source(
        name=location,
        description="scikit-learn's handwritten digits, 10 classes",
        class_names=tuple("0123456789"),
        notes=(),
        names=[f"digit {index:04d}" for index in range(len(images))],
        labels=labels,
        read=lambda index: Image.fromarray(images[index]),
        identify=lambda: hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
    )


def _open_archive(location: str, path: Path, arrays: dict[str, Array]) -> Source:
    key = next((key for key in IMAGE_KEYS if key in arrays), None)
    if key is None:
        candidates = [name for name, array in arrays.items() if array.ndim >= 3]
        if len(candidates) != 1:
            raise UserError(f"{location} has the arrays {', '.join(arrays) or 'none'}; name the one of the images 'images'")
        key = candidates[0]
    images = arrays[key]
    labels = next((arrays[name] for name in LABEL_KEYS if name in arrays), None)
    names = next((tuple(map(str, arrays[name].ravel())) for name in NAME_KEYS if name in arrays), ())
    _channels_last(f"{location}[{key}]", images)
    if labels is not None and (labels.size != len(images) or labels.dtype.kind not in "iubUS"):
        what = f"labels of shape {labels.shape} and type {labels.dtype}"
        raise UserError(f"{location}: {what} do not go with {len(images)} images; give one class each")
    return _array_source(location, path, f"{location}[{key}]", images, labels, names)


def _array_source(location: str, path: Path, what: str, images: Array, labels: Array | None, names: tuple[str, ...]) -> Source:
    images = _channels_last(what, images)
    _check_values(what, images)
    numbers, class_names = _labels(what, labels, names)
    height, width = images.shape[1:3]
    classes = f", {len(class_names)} classes" if class_names else ""

    def read(index: int) -> Item:
        return Image.fromarray(_to_uint8(images[index]))

    return Source(
        name=location,
        description=f"array of {len(images)} images of {height} x {width}{classes}",
        class_names=class_names,
        notes=(),
        names=[f"image {index:06d}" for index in range(len(images))],
        labels=numbers,
        read=read,
        identify=partial(digest_files, [(path.name, path)]),
    )


def _labels(what: str, labels: Array | None, names: tuple[str, ...]) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    if labels is None:
        return None, ()
    flat = labels.ravel()
    if not names:
        return class_labels([str(value) if flat.dtype.kind in "US" else int(value) for value in flat])
    if flat.dtype.kind in "US" or flat.max(initial=0) >= len(names):
        raise UserError(f"{what}: labels do not go with the {len(names)} class names; number them from 0")
    return np.maximum(flat.astype(np.int64), -1), names


def _channels_last(what: str, images: Array) -> Array:
    """[N, H, W] or [N, H, W, C], C of 1, 3 or 4, from any of the layouts taken; a view."""
    shape = images.shape
    if 0 in shape[1:]:
        raise UserError(f"{what} has shape {shape}: images of no pixels")
    if images.ndim == 4 and shape[3] == 1:
        return images[..., 0]
    if images.ndim == 4 and shape[3] in (3, 4):
        return images
    if images.ndim == 4 and shape[1] == 1:
        return images[:, 0]
    if images.ndim == 4 and shape[1] in (3, 4):
        return images.transpose(0, 2, 3, 1)
    if images.ndim == 3 and shape[2] > 4:
        return images
    raise UserError(f"{what} has shape {shape}; images are N x H x W, N x H x W x C or N x C x H x W with C of 1, 3 or 4")


def _check_values(what: str, images: Array) -> None:
    """Refuse types and ranges that would give wrong pictures, from a few images spread over the array."""
    if images.dtype.kind not in "buif":
        raise UserError(f"{what} has type {images.dtype}; give uint8, uint16, or floats from 0 to 1")
    for index in np.unique(np.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).astype(int)):
        try:
            _to_uint8(images[index])
        except BrokenImage as error:
            raise UserError(f"{what}, image {index}: {error}; scale to uint8 from 0 to 255, or floats from 0 to 1") from error


def _to_uint8(image: Array) -> NDArray[np.uint8]:
    """uint8 as it is; uint16 by 257; bool and floats from 0 to 1 by 255; other integers must be from 0 to 255."""
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if image.dtype == np.uint16:
        return np.rint(image / 257).astype(np.uint8)
    low, high = float(image.min()), float(image.max())
    if image.dtype.kind == "f" or image.dtype.kind == "b":
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too
            raise BrokenImage(f"floats from {low:g} to {high:g}, not from 0 to 1")
        return np.rint(np.clip(image.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    if low < 0 or high > 255:
        raise BrokenImage(f"{image.dtype} values from {low:g} to {high:g}, not from 0 to 255")
    return np.ascontiguousarray(image, dtype=np.uint8)
