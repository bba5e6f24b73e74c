"""`maskdm edit` on a small run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_sample_command import TRAIN, picture, run  # noqa: F401 - the fixture

from maskdm.cli import run_command
from maskdm.errors import UserError
from maskdm.runs import Display
from maskdm.runs.directory import RunDirectory
from maskdm.runs.sets import dataset_of


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("images")
    Image.fromarray((np.asarray(load_digits().images)[3] * (255 / 16)).astype(np.uint8)).save(folder / "digit.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask * 0).save(folder / "black.png")
    (folder / "text.png").write_text("no image")
    return folder


def edited(run: Path, out: Path, *more: str) -> dict[str, Any]:  # noqa: F811
    arguments = ["edit", str(run), "--out", str(out), "--num", "3", "--steps", "10", *more]
    assert run_command(arguments) == 0
    assert picture(out / "edit-000002.png").size == (8, 8) and (out / "grid.png").is_file()
    return json.loads((out / "edit.json").read_text())


@pytest.mark.parametrize("method", ["cheap", "full", "project"])
@pytest.mark.parametrize("task", ["inpaint", "outpaint", "upscale", "deblur"])
def test_linear_tasks_come_nearer_to_the_truth(task: str, method: str, run: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    more = ["--mask", str(images / "mask.png")] if task == "inpaint" else []
    found = edited(run, tmp_path, "--task", task, "--image", str(images / "digit.png"), "--method", method, "--simulate", *more)
    assert found["psnr"] > 5 and found["loss"] < 3.0 and (found["backward"] > 0) == (method != "project") and found["evaluations"] >= 10
    if task == "inpaint":
        truth, result = picture(images / "digit.png"), picture(tmp_path / "edit-000000.png")
        assert np.array_equal(np.asarray(truth)[:, :4], np.asarray(result)[:, :4])


def test_what_was_given_is_shown_as_it_looks(tmp_path: Path) -> None:
    """A gray image is gray, and a blurred one blurred, where A+ y is green and sharp."""
    out, given = tmp_path / "run", np.zeros((8, 8, 3), dtype=np.uint8)
    given[:, 4:] = (255, 60, 0)
    Image.fromarray(given).save(tmp_path / "red.png")
    few = ["--pretrain.budget.steps", "1", "--finetune.budget.steps", "1", "--channels", "3"]
    assert run_command([*TRAIN, "--out", str(out), *few]) == 0
    for task in ("colourise", "deblur"):
        edited(out, tmp_path / task, "--task", task, "--image", str(tmp_path / "red.png"), "--simulate", "--steps", "2")
        first, truth = (np.asarray(picture(tmp_path / task / "grid.png")).astype(int)[4:60, x : x + 56] for x in (4, 72))
        if task == "colourise":
            assert (np.ptp(first, axis=2) <= 1).all() and np.ptp(first[0, :, 0]) > 50
        else:
            across = np.diff(truth[30, :, 0]), np.diff(first[30, :, 0])
            assert np.abs(across[1]).max() < 0.7 * np.abs(across[0]).max()


def test_palettes_classes_and_sketches(run: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    few = edited(run, tmp_path / "few", "--task", "palette", "--colours", "#000000,#ffffff")
    shades = np.asarray(picture(tmp_path / "few" / "edit-000000.png")).astype(int)
    assert np.minimum(shades, 255 - shades).mean() < 40 and few["method"] == "cheap"
    three = edited(run, tmp_path / "three", "--task", "classify", "--target", "3", "--data", "digits")
    hardly = edited(run, tmp_path / "hardly", "--task", "classify", "--target", "3", "--strength", "0.01")
    assert three["loss"] < 0.9 * hardly["loss"]
    sketch = ["--task", "sketch", "--image", str(images / "digit.png"), "--simulate", "--strength"]
    near, far = (edited(run, tmp_path / strength, *sketch, strength) for strength in ("0.2", "1"))
    assert near["psnr"] > far["psnr"] and near["method"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "inpaint", "--image", "digit.png"], "--mask belongs to task inpaint: give it"),
        (["--task", "inpaint", "--image", "digit.png", "--mask", "black.png"], "is black all over; paint white"),
        (["--task", "upscale"], "task upscale needs an --image"),
        (["--task", "palette", "--colours", "#000000", "--image", "digit.png"], "task palette takes no --image"),
        (["--task", "palette", "--colours", "red"], "--colours is 'red'"),
        (["--task", "upscale", "--image", "digit.png", "--factor", "3"], "--factor is 3; give a whole number"),
        (["--task", "deblur", "--image", "digit.png", "--blur", "0"], "--blur is 0"),
        (["--task", "deblur", "--image", "text.png"], "text.png cannot be read as an image"),
        (["--task", "deblur", "--image", "digit.png", "--mask", "mask.png"], "leave it out of deblur"),
        (["--task", "colourise", "--image", "digit.png"], "draws gray images"),
        (["--task", "deblur", "--image", "digit.png", "--data", "digits"], "--data belongs to task classify"),
        (["--task", "classify"], "--target belongs to task classify: give it"),
        (["--task", "classify", "--target", "eleven"], "'eleven' is no class"),
        (["--task", "deblur", "--image", "digit.png", "--scheduler", "heun"], "scheduler heun forgets"),
        (["--task", "sketch", "--image", "digit.png", "--strength", "0"], "a strength above 0"),
        (["--task", "deblur", "--image", "digit.png", "--strength", "-1"], "strength is -1; it must be above 0"),
        (["--task", "deblur", "--image", "digit.png", "--guidance", "4"], "leads to classes, and none is named; give --labels"),
    ],
)
def test_what_does_not_fit_is_said(
    more: list[str],
    message: str,
    run: Path,  # noqa: F811
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(images / word) if word.endswith(".png") else word for word in more]
    assert run_command(["edit", str(run), "--out", str(tmp_path), "--num", "2", "--steps", "2", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_images_that_have_moved_are_missed_with_the_way_out(run: Path) -> None:  # noqa: F811
    found = RunDirectory.existing(run)
    config = found.config()
    with pytest.raises(UserError, match=r"'gone' is no folder.* was trained on it: go where it was trained, or give --data"):
        dataset_of(found, replace(config, data=replace(config.data, source="gone")), None, Display(quiet=True))
