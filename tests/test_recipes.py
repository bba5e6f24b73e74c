from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm.cli import run_command
from maskdm.config import Diffusion, DiTConfig, Hardware, UViTConfig
from maskdm.engine import this_machine
from maskdm.errors import UserError
from maskdm.masking import num_kept
from maskdm.models import build
from maskdm.recipes import OFFERED, RECIPES, choose, recipe
from maskdm.recipes.automatic import Facts, flops_per_image
from maskdm.recipes.paper import ABLATION, PAPER
from maskdm.runs.plan import describe_mask, plan_lines
from maskdm.sampling import MaskDMPipeline
from maskdm.settings import from_plain, to_plain

OPEN = -1
"""Steps that the paper does not give."""


def facts(count: int = 5000, side: tuple[int, int] = (32, 32), gray: bool = False, classes: int = 0, cpu: bool = True) -> Facts:
    return Facts("photos", count, side[0], side[1], gray, classes, cpu, 8e10 if cpu else 1e14)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_together(name: str) -> None:
    config = recipe(name, "data")
    config.check()
    assert config.data.source == "data"
    assert len(plan_lines(config, this_machine(Hardware(device="cpu")))) == 1 + len(config.stages)
    assert from_plain(to_plain(config)) == config
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    assert f"`{name}`" in page or name.removeprefix("celeba64-") in ABLATION
    assert name in OFFERED or re.fullmatch(r"celeba64-(patch|block2|block4|crop)-(10|50|90)", name)


# --- the paper's, against the tables of its configurations (MASKDM.md) ---

LINEAR, COSINE = ("linear", None), ("cosine", 1.0)
ROWS: dict[str, tuple[tuple[str, float | None], str, list[tuple[str, int, float, int, int]]]] = {
    # schedule and clip; size of the network and images; of each stage the mask, batch, lr, warm-up and steps
    "celeba64": (LINEAR, "S 64", [("block 4, 90%", 256, 2e-4, 0, 200_000), ("none", 128, 2e-4, 0, 200_000)]),
    "celeba64-patch-10": (LINEAR, "S 64", [("patch, 10%", 256, 2e-4, 0, 200_000), ("none", 128, 2e-4, 0, 200_000)]),
    "celeba64-block8-50": (LINEAR, "S 64", [("block 8, 50%", 256, 2e-4, 0, 200_000), ("none", 128, 2e-4, 0, 200_000)]),
    "celeba64-scratch": (LINEAR, "S 64", [("none", 128, 2e-4, 0, 200_000)]),
    "celebahq256": (COSINE, "B 256", [("block 4, 90%", 256, 2e-4, 0, 200_000), ("none", 32, 1e-5, 5000, OPEN)]),
    "celebahq256-chain": (
        COSINE,
        "B 256",
        [("block 4, 90%", 256, 2e-4, 0, 200_000), ("block 4, 50%", 64, 2e-4, 5000, OPEN), ("none", 32, 1e-5, 5000, OPEN)],
    ),
    "church256": (("linear", 1.0), "B 256", [("block 4, 90%", 256, 2e-4, 0, 200_000), ("none", 64, 1e-4, 5000, OPEN)]),
    "vggface2-transfer": (COSINE, "S 256", [("block 4, 90%", 256, 2e-4, 0, 200_000)]),
    "celebahq256-finetune-10": (("cosine", None), "S 256", [("none", 64, 5e-5, 0, OPEN)]),
    "celebahq256-finetune-1": (("cosine", None), "S 256", [("none", 64, 5e-5, 0, OPEN)]),
    "wavelet-l": (COSINE, "L 256", [("patch, 70%", 128, 1e-4, 0, 200_000), ("none", 16, 5e-5, 0, 550_000)]),
}
PARAMETERS = {"S 64": 44_292_144, "S 256": 46_258_224, "B 256": 102_417_456, "L 256": 233_416_896}
FLIPPED = ("church256", "celebahq256-finetune-10", "celebahq256-finetune-1", "wavelet-l")


@pytest.mark.parametrize("name", ROWS)
def test_the_papers_figures(name: str) -> None:
    (schedule, clip), size, stages = ROWS[name]
    config = recipe(name, "data")
    assert (config.diffusion.schedule, config.optimizer.clip) == (schedule, clip)
    assert config.diffusion == Diffusion(schedule=config.diffusion.schedule, target="eps")
    assert config.optimizer.betas == (0.99, 0.99) and config.optimizer.weight_decay == 0.03
    assert config.ema.decay == (0.9999 if name in ("church256", "wavelet-l") else 0.999)
    assert config.data.flip == (0.5 if name in FLIPPED else 0) and not config.data.conditional
    assert config.data.image_size == (int(size.split()[1]),) * 2
    assert (config.sampling.scheduler, config.sampling.steps, config.sampling.eta) == ("ddim", 250, 1.0)
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config.model, config.data, 0).parameters()) == PARAMETERS[size]
    assert config.model.patch == 4 and (config.model.transform == "haar") == (name == "wavelet-l")
    assert len(config.stages) == len(stages)
    for stage, (mask, batch, lr, warmup, steps) in zip(config.stages, stages, strict=True):
        assert (describe_mask(stage.mask), stage.batch, stage.lr, stage.warmup) == (mask, batch, lr, warmup)
        assert steps in (OPEN, stage.budget.steps) and (stage.decay, stage.start_from) == ("constant", "raw")


def test_the_ablation_has_the_authors_thirteen_masks() -> None:
    assert len(ABLATION) == 13 and set(PAPER) == {*ROWS, *(f"celeba64-{name}" for name in ABLATION)}
    kept = {name: num_kept(mask, (16, 16)) for name, mask in ABLATION.items()}
    assert (kept["crop-10"], kept["crop-50"], kept["crop-90"]) == (15**2, 11**2, 5**2)
    assert (kept["patch-10"], kept["block2-90"], kept["block4-90"], kept["block8-50"]) == (231, 28, 32, 128)
    for name, mask in ABLATION.items():
        config, plain = recipe(f"celeba64-{name}", "x"), recipe("celeba64", "x")
        assert config == replace(plain, stages=(replace(plain.stages[0], mask=mask), plain.stages[1]))
    assert recipe("celeba64-block4-90", "x") == recipe("celeba64", "x")


# --- trained, small, for a few steps ---

TINY = [
    "--model.width", "16", "--depth", "1", "--heads", "2", "--threads", "1", "--precision", "fp32", "--tracking", "none",
    "--sampling.steps", "2", "--sampling.num", "4", "--ema.snapshots", "0",
]  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(10):
        colours = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((40, 36)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def test_wavelets_from_a_folder_to_samples(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    steps = ["--pretrain.budget.steps", "4", "--pretrain.batch", "4", "--finetune.budget.steps", "3", "--finetune.batch", "4"]
    command = ["train", str(photos), "--recipe", "wavelet-l", "--out", str(out), "--image-size", "32", "--heldout", "0.2", *TINY, *steps]
    assert run_command(command) == 0
    card = json.loads((out / "run.json").read_text())
    assert card["status"] == "finished" and [stage["steps"] for stage in card["stages"]] == [4, 3]
    assert (card["tokens"], card["stages"][0]["kept"]) == (16, 5)  # patches; of two tokens each
    assert run_command(["sample", str(out), "--num", "2", "--steps", "2", "--out", str(tmp_path / "samples")]) == 0
    with Image.open(tmp_path / "samples" / "sample-000000.png") as image:
        assert image.size == (32, 32)
    pipeline = MaskDMPipeline.from_pretrained(str(out / "model"))
    assert pipeline.unet.config["transform"] == "haar"
    capsys.readouterr()
    assert run_command([*command[:4], "--out", str(tmp_path / "odd"), "--image-size", "36", *TINY]) == 2
    assert "image_size 36 is not a multiple of 8, patch 4 at half the size (transform haar); use --image-size" in capsys.readouterr().err


def test_every_recipe_prints_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    for name in OFFERED.replace("celeba64-{patch,block2,block4,crop}-{10,50,90}", "celeba64-crop-90").split(", "):
        assert run_command(["train", "digits", "--recipe", name, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
        said = "".join(capsys.readouterr())
        assert all(f"stage {stage.name}: " in said for stage in recipe(name, "digits").stages)
    assert not (tmp_path / "run").exists()


def test_a_transfer_is_two_commands(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many, few = str(tmp_path / "many"), str(tmp_path / "few")
    size = ["--image-size", "16"]
    first = ["--pretrain.budget.images", "12", "--pretrain.batch", "4", "--model.transform", "haar", "--patch", "2"]
    assert run_command(["train", str(photos), "--recipe", "transfer-pretrain", "--out", many, *size, *TINY, *first]) == 0
    rest = ["--budget.images", "8", "--batch", "4", *TINY[6:]]
    command = ["train", str(photos), "--recipe", "transfer", "--init", many, "--out", few, *size, *rest]
    assert run_command(command) == 0
    said = "".join(capsys.readouterr())
    assert f"network and noise: those of {many}" in said and "(averaged)" in said and "re-initialised" not in said
    assert run_command(command) == 0  # the same command goes on, or is done
    assert run_command([*command, "--model.width", "32"]) == 2
    assert run_command(["train", str(photos), "--recipe", "transfer", "--init", str(tmp_path / "no"), "--out", str(tmp_path / "x")]) == 2
    assert "no" in capsys.readouterr().err


def test_unknown_recipe() -> None:
    with pytest.raises(UserError, match="did you mean cifar10"):
        recipe("cifar", "data")


@pytest.mark.parametrize("side", [(5, 5), (8, 8), (28, 28), (32, 40), (33, 47), (96, 64), (300, 200), (4000, 3000)])
@pytest.mark.parametrize("cpu", [True, False])
def test_choices_hold_together_for_any_size(side: tuple[int, int], cpu: bool) -> None:
    choice = choose(facts(side=side, cpu=cpu))
    choice.config.check()
    height, width = choice.config.data.image_size
    assert height == width <= max(8, min(side))
    assert height <= (64 if cpu else 256)
    assert len(choice.reasons) >= 5


def test_choices_follow_the_data() -> None:
    plain, classes = choose(facts()).config, choose(facts(classes=7)).config
    assert not plain.data.conditional and classes.data.conditional
    assert choose(facts(gray=True)).config.data.channels == 1 and plain.data.channels == 3
    assert choose(facts(count=20)).config.stages[0].budget.images == 40_000  # 2 000 times the data at most
    small, large = choose(facts(side=(32, 32))).config, choose(facts(side=(32, 32), cpu=False)).config
    assert (small.model.patch, small.stages[1].batch, small.optimizer.name) == (2, 16, "muon")
    assert (large.model.patch, large.stages[1].batch, large.optimizer.name) == (4, 128, "adamw")
    assert choose(facts(), image_size=(48, 72)).config.data.image_size == (48, 72)
    assert choose(facts(side=(256, 256), cpu=False)).config.model == DiTConfig(768, 12, 12, 8)


def test_a_run_to_start_from_gives_its_network_and_one_stage() -> None:
    init = recipe("cifar10", "x")
    config = choose(facts(side=(64, 64)), init=init).config
    assert config.model == init.model and config.diffusion == init.diffusion
    assert [(stage.name, stage.start_from) for stage in config.stages] == [("finetune", "ema")]


def test_flops_are_those_of_the_blocks() -> None:
    model = UViTConfig(width=64, depth=4, heads=2)
    assert flops_per_image(model, 10) == 3 * 5 * (24 * 10 * 64**2 + 4 * 100 * 64)
