"""What the documents say is run: every Python snippet, and every command line is parsed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm.cli import run_command, split_settings
from maskdm.config import Config
from maskdm.recipes import RECIPES, recipe
from maskdm.settings import find

ROOT = Path(__file__).parents[1]
NAMES = ("guide.md", "evaluation.md", "recipes.md", "sampling.md", "editing.md", "demo.md", "distillation.md", "export.md", "python.md")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in NAMES)]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_python_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    settings = ["--model.width", "16", "--depth", "1", "--heads", "2", "--threads", "1", "--sampling.steps", "2", "--sampling.num", "4"]
    steps = ["--pretrain.budget.steps", "2", "--finetune.budget.steps", "2"]
    assert run_command(["train", "digits", "--recipe", "digits", "--out", "runs/quickstart", *settings, *steps]) == 0
    photos()
    assert run_command(["train", "photos", "--out", "runs/photos", *settings, *steps]) == 0
    more = ["--image-size", "8", "--mask.ratio", "0.75", "--finetune.lr", "1e-4"]
    assert run_command(["train", "photos", "--out", "runs/small", *settings, *steps, *more]) == 0
    count = 0
    for page in PAGES:
        names: dict[str, object] = {}
        for block in blocks(page, "python"):
            exec(compile(block, f"{page.name}", "exec"), names)
            count += 1
    assert count >= 7
    assert (tmp_path / "photo-15.png").is_file()


def photos() -> None:
    """Sixty images in the folder `photos`."""
    from sklearn.datasets import load_digits

    Path("photos").mkdir()
    for number, pixels in enumerate(np.asarray(load_digits().images)[:60]):
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(f"photos/{number}.png")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_are_ones_that_exist(page: Path) -> None:
    from maskdm import cli

    found = 0
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["maskdm"] or "|" in words:
                continue
            found += 1
            parts = split_settings(words[1:]) if words[1] == "train" else cli.CommandLine(words[1:])
            assert not isinstance(cli._parse(parts.rest), int), line
            named = words[words.index("--recipe") + 1] if "--recipe" in words else "digits"
            assert named in RECIPES, line
            for name, _ in parts.settings:
                assert any(_knows(recipe(each, "x"), name) for each in RECIPES), line
    assert found >= 3 or page.name == "python.md"


def _knows(config: Config, name: str) -> bool:
    try:
        return bool(find(config, name).path)
    except Exception:
        return False


def test_make_targets_named_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text())) <= targets
