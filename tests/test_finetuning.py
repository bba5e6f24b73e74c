"""A run from another's weights, whatever differs in the images: what became of each tensor is said, and the result is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm.cli import run_command

FEW = ["--threads", "1", "--sampling.steps", "2", "--sampling.num", "4", "--tracking", "none", "--finetune.budget.steps", "1"]


@pytest.mark.parametrize("network", ["uvit", "dit"])
def test_from_gray_without_classes_to_larger_colour_with_classes(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    np.savez(tmp_path / "gray.npz", x=random.integers(0, 255, (30, 8, 8), dtype=np.uint8))
    np.savez(tmp_path / "colour.npz", x=random.integers(0, 255, (30, 16, 24, 3), dtype=np.uint8), y=np.arange(30) % 3)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    shape = f"{{kind: {network}, width: 16, depth: 3, heads: 2, patch: 2}}"
    small = ["--model", shape, "--pretrain.budget.steps", "1", "--pretrain.batch", "4", "--finetune.batch", "4"]
    assert run_command(["train", str(tmp_path / "gray.npz"), "--out", str(first), *small, *FEW]) == 0, capsys.readouterr().err
    tuned = [*FEW, "--batch", "4"]
    assert (
        run_command(["train", str(tmp_path / "colour.npz"), "--out", str(second), "--init", str(first), *tuned, "--image-size", "16x24"])
        == 0
    )
    said = capsys.readouterr().err
    for line in ("resized: patch_embedding.weight (1 -> 3 channels)", "re-initialised: class_embedding.weight (0 -> 3 classes)"):
        assert line in said
    assert ("resized: positions.weight (4 x 4 -> 8 x 12 patches, 1 -> 2 condition tokens)" in said) == (network == "uvit")
    kept = json.loads((second / "run.json").read_text())["init"]
    assert sum(each["fate"] == "loaded" for each in kept) > 0.8 * len(kept)
    assert run_command(["sample", str(second), "--out", str(tmp_path / "s"), "--num", "1", "--steps", "1", "--labels", "2"]) == 0
    with Image.open(tmp_path / "s" / "sample-000000.png") as drawn:
        assert drawn.size == (24, 16) and drawn.mode == "RGB"
    assert run_command(["train", str(tmp_path / "gray.npz"), "--out", str(third), "--init", str(second), *tuned]) == 0
    said = capsys.readouterr().err
    assert "resized: out.weight (3 -> 1 channels)" in said and "unused: class_embedding.weight (the new model has no classes)" in said
