"""`maskdm sample` and what may be asked of it, on a small run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm.cli import run_command
from maskdm.errors import UserError
from maskdm.runs.wishes import choose_labels, parse_label

TRAIN = [
    "train", "digits", "--recipe", "digits", "--model.width", "32", "--depth", "2", "--heads", "2", "--threads", "1",
    "--pretrain.budget.minutes", "none", "--finetune.budget.minutes", "none", "--pretrain.budget.steps", "20",
    "--finetune.budget.steps", "60", "--pretrain.batch", "16", "--finetune.batch", "16", "--pretrain.lr", "1e-2", "--finetune.lr", "1e-2",
    "--finetune.warmup", "5", "--sampling.steps", "2", "--sampling.num", "4", "--tracking", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "run"
    assert run_command([*TRAIN, "--out", str(out)]) == 0
    return out


def picture(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.copy()


def draw(run: Path, out: Path, *more: str, num: int = 3) -> list[np.ndarray]:
    assert run_command(["sample", str(run), "--out", str(out), "--num", str(num), "--steps", "3", "--precision", "fp32", *more]) == 0
    return [np.asarray(picture(out / f"sample-{i:06}.png")).astype(int) for i in range(num)]


def frames(path: Path) -> int:
    with Image.open(path) as film:
        return film.n_frames  # pyright: ignore[reportAttributeAccessIssue]


def test_a_way_between_two_images_begins_and_ends_with_them(run: Path, tmp_path: Path) -> None:
    exact = ("--labels", "3", "--precision", "fp32")  # in bf16 a batch of six rounds otherwise than one of four
    plain = draw(run, tmp_path / "plain", *exact, num=6)
    way = draw(run, tmp_path / "way", *exact, "--between", "1,5", num=4)
    assert np.abs(way[0] - plain[1]).max() <= 1 and np.abs(way[3] - plain[5]).max() <= 1
    assert np.abs(way[1] - way[0]).max() > 1 and np.abs(way[2] - way[3]).max() > 1
    assert frames(tmp_path / "way" / "morph.gif") == 4


def test_films_sizes_and_tiles(run: Path, tmp_path: Path) -> None:
    draw(run, tmp_path / "film", "--animate")
    assert frames(tmp_path / "film" / "denoising.gif") == 3
    assert draw(run, tmp_path / "larger", "--image-size", "12x16")[0].shape == (12, 16)
    assert draw(run, tmp_path / "tiles", "--image-size", "12x16", "--tiles")[0].shape == (12, 16)
    same, plain = draw(run, tmp_path / "same", "--image-size", "8"), draw(run, tmp_path / "plain")
    assert all(np.array_equal(a, b) for a, b in zip(same, plain, strict=True))


def test_guides(run: Path, tmp_path: Path) -> None:
    plain = draw(run, tmp_path / "plain")
    earlier = next((run / "checkpoints").glob("*-pretrain"))
    for number, more in enumerate((
        ("--guidance", "4"), ("--guidance", "4", "--negative", "7"), ("--guidance", "4", "--guidance-window", "0.1", "3"),
        ("--guidance", "4", "--guidance-rescale", "1"), ("--guide", "auto", "--weak", str(earlier), "--guidance", "4"),
        ("--labels", "3+8"), ("--labels", "3:0.7+8:0.3", "1"),
    )):  # fmt: skip
        assert any(not np.array_equal(a, b) for a, b in zip(plain, draw(run, tmp_path / str(number), *more), strict=True)), more
    itself = draw(run, tmp_path / "itself", "--guide", "auto", "--weak", str(run), "--guidance", "4")
    assert max(np.abs(a - b).max() for a, b in zip(plain, itself, strict=True)) <= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--between", "1"], "--between is '1'; give the numbers of two images"),
        (["--negative", "3"], "give a --guidance above 1"),
        (["--negative", "3+8", "--guidance", "2"], "--negative is '3+8'; name one class"),
        (["--guide", "auto", "--guidance", "2"], "give --guide auto, --weak RUN"),
        (["--guide", "auto", "--weak", "nowhere", "--guidance", "2"], "nowhere"),
        (["--labels", "eleven"], "'eleven' is no class of this model"),
        (["--labels", "3:x+8"], "is no class of this model"),
        (["--tiles"], "give its --image-size"),
        (["--image-size", "9"], "9x9 is no whole number of the network's patches of 2"),
        (["--image-size", "4", "--tiles"], "smaller than the 8x8 of the network"),
        (["--guidance-window", "3", "1", "--guidance", "2"], "sampling.guidance_window is 3,1"),
        (["--guidance-rescale", "2"], "sampling.guidance_rescale is 2"),
        (["--threshold", "0"], "sampling.threshold is 0"),
    ],
)
def test_what_does_not_fit_is_said(more: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["sample", str(run), "--out", str(tmp_path), "--num", "2", "--steps", "2", *more]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_labels_and_mixtures() -> None:
    names = ["cat", "dog", "a+b"]
    assert parse_label(names, "dog") == {1: 1.0} and parse_label(names, "2") == parse_label(names, "a+b") == {2: 1.0}
    assert parse_label(names, "cat:3+dog:1") == {0: 0.75, 1: 0.25}
    assert choose_labels(names, [], 4) == [0, 1, 2, 0] and choose_labels([], [], 4) is None
    assert choose_labels(names, ["cat", "cat+dog"], 2) == [[1, 0, 0, 0], [0.5, 0.5, 0, 0]]
    assert choose_labels(names, ["cat", "dog"], 3, (0, 1)) == [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0]]
    with pytest.raises(UserError, match="add up to nothing"):
        parse_label(names, "cat:1+dog:-1")
