"""Whole files of each format that maskdm reads, and what becomes of damaged ones."""

from __future__ import annotations

import io
import random
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, features
from sklearn.datasets import load_sample_images

from maskdm.config import Data
from maskdm.data import BrokenImage, Source, decode, inspect, open_source, prepare
from maskdm.errors import UserError
from tests.fuzz.mutate import mutate

Outcome = tuple[bool, str]
"""Whether it was taken, and the reason where not."""

TABLES = ("npy", "npz", "parquet")
IMAGES = (
    "png",
    "jpeg",
    "mpo",
    "gif",
    "bmp",
    "dib",
    "webp",
    "tiff",
    "ppm",
    "tga",
    "jpeg2000",
    *(["avif"] if features.check("avif") else []),
)
FORMATS = (*IMAGES, *TABLES)


@cache
def _picture() -> Image.Image:
    return Image.fromarray(load_sample_images().images[1]).resize((48, 32))


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def wholes(kind: str) -> tuple[bytes, ...]:
    """Undamaged files of a format, of several modes and ways to store."""
    image = _picture()
    gray, alpha, palette = image.convert("L"), image.convert("RGBA"), image.convert("P")
    alpha.putalpha(gray)
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    real = Image.fromarray(np.asarray(gray, dtype=np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    match kind:
        case "png":
            return (*(_encoded(each, "PNG") for each in (image, gray, alpha, palette, deep)), _encoded(image, "PNG", exif=exif))
        case "jpeg":
            modes = [_encoded(each, "JPEG") for each in (image, gray, image.convert("CMYK"))]
            return (*modes, _encoded(image, "JPEG", progressive=True), _encoded(image, "JPEG", exif=exif))
        case "mpo":
            return (_encoded(image, "MPO", save_all=True, append_images=[image.rotate(90)]),)
        case "gif":
            moving = _encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(180)], duration=50)
            return (moving, _encoded(gray, "GIF"), _encoded(palette, "GIF", transparency=3))
        case "bmp" | "dib":
            return tuple(_encoded(each, kind) for each in (image, gray, palette, image.convert("1"), alpha))
        case "webp":
            moving = _encoded(image, "WEBP", save_all=True, append_images=[image.rotate(180)])
            return (_encoded(image, "WEBP"), _encoded(alpha, "WEBP", lossless=True), moving, _encoded(image, "WEBP", exif=exif))
        case "tiff":
            packed = [_encoded(image, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "tiff_deflate")]
            return (*(_encoded(each, "TIFF") for each in (image, gray, deep, real, alpha)), *packed)
        case "ppm":
            return tuple(_encoded(each, "PPM") for each in (image, gray, deep, image.convert("1")))
        case "tga":
            return (*(_encoded(each, "TGA") for each in (image, gray, alpha, palette)), _encoded(image, "TGA", compression="tga_rle"))
        case "jpeg2000":
            return tuple(_encoded(each, "JPEG2000") for each in (image, gray, alpha))
        case "avif":
            return (_encoded(image, "AVIF"), _encoded(alpha, "AVIF"))
        case "npy" | "npz":
            return _arrays(kind)
        case "parquet":
            return _parquet()
        case _:
            raise ValueError(kind)


def _arrays(kind: str) -> tuple[bytes, ...]:
    pixels = np.stack([np.asarray(_picture())] * 3)
    labels = np.array([0, 1, 0])
    found: list[bytes] = []
    for images in (pixels, pixels[..., 0], pixels.astype(np.float32) / 255, pixels.astype(np.uint16) * 257):
        buffer = io.BytesIO()
        if kind == "npy":
            np.save(buffer, images)
        elif len(found) % 2:
            np.savez_compressed(buffer, images=images, labels=labels, class_names=np.array(["a", "b"]))
        else:
            np.savez(buffer, images=images, labels=labels)
        found.append(buffer.getvalue())
    return tuple(found)


def _parquet() -> tuple[bytes, ...]:
    import pyarrow as pa
    from pyarrow import parquet

    data = wholes("png")
    cells = [{"bytes": each, "path": f"{i}.png"} for i, each in enumerate(data)]
    tables = [
        pa.table({"image": cells, "label": [i % 2 for i in range(len(data))]}),
        pa.table({"image": list(data), "label": [str(i % 2) for i in range(len(data))]}),
    ]
    found: list[bytes] = []
    for table in tables:
        for compression in ("snappy", "none", "zstd"):
            sink = io.BytesIO()
            parquet.write_table(table, sink, compression=compression)
            found.append(sink.getvalue())
    return tuple(found)


def mutant(kind: str, number: int) -> bytes:
    """The damaged file of this number: the same for ever."""
    draw = random.Random(f"{kind} {number}")
    other = draw.choice(wholes(draw.choice(IMAGES) if draw.random() < 0.3 else kind))
    damaged = mutate(draw.choice(wholes(kind)), other, draw)
    return with_checksums(damaged) if kind == "png" and number % 2 else damaged


def with_checksums(data: bytes) -> bytes:
    """A damaged PNG file with each chunk's checksum made right, without which a reader looks no further."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data = data[:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4, "big") + data[end + 4 :]
        at = end + 4
    return data


def bombs() -> dict[str, Callable[[Path], Path]]:
    """Small files that ask for much memory, each written into a folder: (name, how)."""

    def png(folder: Path) -> Path:
        return _written(folder / "bomb.png", _encoded(Image.new("1", (20_000, 20_000)), "PNG"))

    def claims(folder: Path) -> Path:
        data = wholes("png")[0]
        return _written(folder / "claims.png", data[:16] + b"\x7f\xff\xff\xff" * 2 + data[24:])

    def archive(folder: Path) -> Path:
        path = folder / "bomb.npz"
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 18, 1024, 1024)})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("images.npy", header.getvalue())
        data = path.read_bytes()  # what it says of its unpacked size, in the directory of the archive: 64 GiB
        at = data.rindex(b"PK\1\2") + 24
        return _written(path, data[:at] + b"\xfe\xff\xff\xff" + data[at + 4 :])

    return {"png": png, "claims": claims, "npz": archive}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def attempt(kind: str, number: int) -> Outcome:
    """Give maskdm a damaged file. What it raises but does not promise is let through."""
    data, draw = mutant(kind, number), random.Random(f"settings {kind} {number}")
    fit = draw.choice(("crop", "pad", "stretch"))
    settings = Data(source="fuzz", image_size=(16, draw.choice((8, 16))), channels=draw.choice((1, 3)), fit=fit, max_broken=1.0)
    if kind in TABLES:
        return attempt_table(data, kind, settings)
    source = Source("fuzz", "fuzz", (), (), ["mutant"], None, lambda _: data, lambda: "fuzz")
    inspect(source)
    try:
        pixels, _ = decode(data, settings)
    except BrokenImage as error:
        return False, one_line(str(error))
    assert pixels.shape == (*settings.image_size, settings.channels) and pixels.dtype == np.uint8
    return True, ""


def attempt_table(data: bytes, kind: str, settings: Data) -> Outcome:
    """Give maskdm an array or table, as a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = _written(Path(folder) / f"fuzz.{kind}", data)
        try:
            source = open_source(str(path))
            inspect(source)
            dataset = prepare(source, settings, Path(folder) / "cache")
        except UserError as error:
            return False, one_line(str(error))
        assert len(dataset) >= 2
        return True, ""


def one_line(message: str) -> str:
    """The message, which must be one line that says something."""
    assert message.strip() and "\n" not in message and len(message) < 5000, repr(message[:300])
    return message
