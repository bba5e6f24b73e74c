"""The examples are run, shortened by their own arguments: one tiny run on real digits serves all that need one."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["width=16", "depth=2", "heads=2", "threads=1", "sampling__steps=2"]
FEW = ["limit=200", "heldout=0.05"]
SHORT = [*TINY, "sampling__num=4", "tracking=none"]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """A folder to run in and a cache."""
    import maskdm.runs  # noqa: F401 - whose parts are changed below

    path = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("MASKDM_CACHE", str(path / "cache"))
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(path / "modules"))
        patch.setattr(sys.modules["maskdm.runs.compare"], "SLICES", 2)
        yield path


def execute(name: str, *arguments: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def quickstart(place: Path) -> dict[str, Any]:
    return execute("quickstart.py", *SHORT, *FEW, "pretrain__budget__steps=2", "finetune__budget__steps=2")


def test_quickstart(quickstart: dict[str, Any], place: Path) -> None:
    assert all(size(place / "runs" / "quickstart" / f"digit-{i}.png") == (64, 64) for i in range(10))
    assert quickstart["figures"]["num_samples"] == 500
    assert (place / "runs" / "quickstart-model" / "model_index.json").is_file()


def test_finetune_few(place: Path) -> None:
    found = execute("finetune_few.py", *SHORT, "budget__steps=2")
    assert all(len(losses) >= 1 and losses[-1] > 0 for losses in found["losses"].values())
    assert found["tuned"].metrics and found["many"].path == Path("runs/many")
    assert len(list((place / "runs" / "images" / "many").iterdir())) == 1737
    fates = {each["fate"] for each in json.loads((place / "runs" / "few" / "run.json").read_text())["init"]}
    assert fates == {"loaded"}


def test_custom_guidance(quickstart: dict[str, Any], place: Path) -> None:
    found = execute("custom_guidance.py", str(quickstart["run"].path))["found"]
    assert found["guided"] < 0.5 * found["free"]
    assert size(place / "runs" / "quickstart" / "eights-guided.png") == (256, 256)


def test_compare_arms(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = execute("compare_arms.py", "64images", *TINY, "pretrain__batch=16", "finetune__batch=16", *FEW)["found"]
    assert list(found["arms"]) == ["whole", "masked"] and len(found["verdicts"]) == 1
    assert "masked" in capsys.readouterr().out and (place / "runs" / "compare" / "compare.png").is_file()


def test_diffusers_scheduler(quickstart: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart
    execute("diffusers_scheduler.py")
    assert "the same images: True" in capsys.readouterr().out


def test_every_example_is_short_and_says_what_it_shows() -> None:
    for file in EXAMPLES.glob("*.py"):
        text = file.read_text()
        assert ast.get_docstring(ast.parse(text)), file
        assert len(text.splitlines()) <= 40 or file.name == "onnx_sample.py", file
