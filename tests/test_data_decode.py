from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from data_helpers import digit, photo, settings
from PIL import Image, ImageChops

from maskdm.data import BrokenImage, decode


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(float) - b.astype(float)).mean()) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_undone(orientation: int, kind: str) -> None:
    upright = photo().resize((96, 64))
    undo = {  # the operation that a camera's orientation stands for, inverted
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind != "PNG" else {}
    pixels, notes = decode(encoded(stored, kind, exif=exif, **options), settings((64, 96)))
    assert close(pixels, np.asarray(upright), 4)
    assert not close(pixels, np.asarray(upright)[::-1], 20)
    assert notes == ()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_costs_only_the_orientation() -> None:
    pixels, _ = decode(encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0nonsense"), settings((32, 48)))
    assert pixels.shape == (32, 48, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_every_mode_gives_the_same_picture(mode: str, channels: int) -> None:
    gray = photo(1).convert("L").resize((48, 32))
    if mode in ("I", "I;16"):
        image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
    elif mode == "F":
        image = Image.fromarray(np.asarray(gray, dtype=np.float32) / 255)
    else:
        image = gray.convert(mode) if mode == "P" else gray.convert("RGB").convert(mode)
    assert image.mode == mode
    pixels, _ = decode(image, settings((32, 48), channels=channels))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (32, 48, channels)
    expected = np.asarray(gray)[..., None].repeat(channels, axis=2)
    assert close(pixels, np.asarray(gray.convert("1").convert("RGB"))[..., :channels] if mode == "1" else expected, 3)


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels, notes = decode(encoded(Image.fromarray(ramp), "PNG"), settings(channels=1))
    assert np.array_equal(pixels[..., 0], np.rint(ramp / 257).astype(np.uint8))
    assert notes == ()
    dark = (ramp // 300).astype(np.uint16)
    assert decode(encoded(Image.fromarray(dark), "PNG"), settings(channels=1))[0].max() == 1


def test_values_without_a_known_range_are_stretched_and_said() -> None:
    image = Image.fromarray(np.linspace(-5, 1000, 64, dtype=np.float32).reshape(8, 8))
    pixels, notes = decode(encoded(image, "TIFF"), settings(channels=1))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert any("range" in note for note in notes)
    assert decode(Image.fromarray(np.full((8, 8), 7e4, dtype=np.float32)), settings())[0].max() == 0
    with pytest.raises(BrokenImage, match="no numbers"):
        decode(Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)), settings())


def test_cmyk_jpeg_keeps_its_colours() -> None:
    small = photo().resize((96, 64))
    pixels, _ = decode(encoded(small.convert("CMYK"), "JPEG", quality=95), settings((64, 96)))
    assert close(pixels, np.asarray(small), 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_shows_the_background(mode: str) -> None:
    base = Image.new("LA" if "L" in mode or mode == "La" else "RGBA", (8, 8))
    image = base.convert("RGBA").convert("PA") if mode == "PA" else base.convert(mode)
    pixels, notes = decode(image, settings(background="ff8000"))
    assert pixels.reshape(-1, 3).tolist() == [[255, 128, 0]] * 64
    assert len(notes) == 1
    assert "transparent" in notes[0]


def test_half_transparent_is_blended() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert abs(int(decode(image, settings())[0][0, 0, 0]) - 127) <= 1


def test_palette_with_transparency() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 0, 4, 8))
    for kind in ("PNG", "GIF"):
        pixels, notes = decode(encoded(image, kind, transparency=0), settings(background="#0000ff"))
        assert pixels[0, 0].tolist() == [200, 100, 50]
        assert pixels[0, 7].tolist() == [0, 0, 255]
        assert notes
    assert decode(encoded(image, "PNG"), settings(background="#0000ff"))[0][0, 7].tolist() == [10, 20, 30]


@pytest.mark.parametrize("kind", ["RGB", "L"])
def test_one_transparent_colour(kind: str) -> None:
    image = Image.new(kind, (8, 8), 0)
    colour = (0, 0, 0) if kind == "RGB" else 0
    assert decode(encoded(image, "PNG", transparency=colour), settings())[0].min() == 255


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels, notes = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options), settings())
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert any("animated" in note for note in notes)


def test_photographs_with_a_second_picture_are_no_animation() -> None:
    assert decode(encoded(photo(), "MPO", save_all=True, append_images=[photo(1)]), settings())[1] == ()


@pytest.mark.parametrize("size", [(32, 32), (20, 64), (64, 20)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_each_fit_keeps_what_it_says(fit: str, size: tuple[int, int]) -> None:
    # left half red, right half green, a blue band around: what remains tells the fit
    image = Image.new("RGB", (120, 80), "blue")
    image.paste("red", (4, 4, 60, 76))
    image.paste("green", (60, 4, 116, 76))
    pixels, _ = decode(image, settings(size, fit=fit, background="#ffffff"))
    height, width = size
    assert pixels.shape == (height, width, 3)
    middle = pixels[height // 2]
    assert close(middle[width // 2 - 3], np.array([255, 0, 0]), 2)
    assert close(middle[width // 2 + 3], np.array([0, 128, 0]), 2)
    blue = (pixels[..., 2] > 60) & (pixels[..., 1] < 60)
    white = (pixels > 200).all(axis=2)
    wide = width / height > 120 / 80
    match fit:
        case "stretch":
            assert blue[:, 0].all()
            assert blue[0].all()
            assert not white.any()
        case "crop":
            assert not white.any()
            assert blue[:, 0].all() == wide
            assert blue[0].all() == (not wide)
        case _:
            assert white[:, 0].all() == wide
            assert white[0].all() == (not wide)


def test_pad_is_centred_and_gray_where_gray_is_wanted() -> None:
    pixels, _ = decode(Image.new("L", (20, 10), 0), settings((20, 20), channels=1, fit="pad", background="#ff0000"))
    assert set(pixels[:5].ravel()) == {76}  # the luminance of red
    assert set(pixels[5:15].ravel()) == {0}
    assert set(pixels[15:].ravel()) == {76}


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 7)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_extreme_shapes(shape: tuple[int, int], fit: str) -> None:
    pixels, notes = decode(Image.new("RGB", shape, "red"), settings((16, 24), fit=fit))
    assert pixels.shape == (16, 24, 3)
    assert (pixels.reshape(-1, 3) == [255, 0, 0]).all(axis=1).any()
    if max(shape) < 16:
        assert any("enlarged" in note for note in notes)


def test_downsizing_does_not_alias() -> None:
    checker = Image.fromarray(((np.indices((512, 512)).sum(0) % 2) * 255).astype(np.uint8))
    pixels, _ = decode(checker, settings((16, 16), channels=1))
    assert np.abs(pixels.astype(int) - 127).max() <= 3


def test_reduced_jpeg_decoding_stays_close_to_full_decoding() -> None:
    data = encoded(photo().resize((1600, 1068)), "JPEG", quality=95)
    for fit in ("crop", "pad", "stretch"):
        fast, _ = decode(data, settings((48, 48), fit=fit))
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            full, _ = decode(image, settings((48, 48), fit=fit))
        assert close(fast, full, 2.5)


def test_a_whole_image_of_the_right_size_is_untouched() -> None:
    assert np.array_equal(decode(encoded(digit(3), "PNG"), settings(channels=1))[0][..., 0], np.asarray(digit(3)))


def test_the_callers_image_is_left_alone() -> None:
    image = photo().convert("RGBA")
    before = image.copy()
    decode(image, settings())
    assert ImageChops.difference(image, before).getbbox(alpha_only=False) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_truncated_files_are_broken(kind: str, part: float) -> None:
    data = encoded(photo(), kind)
    with pytest.raises(BrokenImage):
        decode(data[: int(len(data) * part)], settings())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am text", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),
    ],
)
def test_no_image_at_all(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage, match=reason):
        decode(data, settings())


def test_damaged_bytes_raise_nothing_else() -> None:
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA"):
        whole = np.frombuffer(encoded(photo().resize((40, 30)), kind), dtype=np.uint8)
        for _ in range(40):
            data = whole.copy()
            places = random.integers(0, min(len(data), 400), 6)
            data[places] = random.integers(0, 256, 6)
            with contextlib.suppress(BrokenImage):
                assert decode(data.tobytes(), settings())[0].shape == (8, 8, 3)


def test_a_bomb_is_refused_by_name() -> None:
    header = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(BrokenImage, match="more than 179 million pixels"):
        decode(header, settings())
