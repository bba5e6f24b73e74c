"""No setting is dead: each one, changed, changes what is built or done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm.config import (
    BlockMask,
    Budget,
    Config,
    CropMask,
    Data,
    Diffusion,
    DiTConfig,
    Intervals,
    LogitNormalTimesteps,
    MinSNRWeight,
    PatchMask,
    Sampling,
    Stage,
    UViTConfig,
)
from maskdm.data import Loader, open_source, prepare
from maskdm.engine import Trainer
from maskdm.models import build
from maskdm.runs import Display, TrainRequest, train
from maskdm.runs.directory import RunDirectory
from maskdm.runs.sample import draw_images
from maskdm.runs.store import make_pipeline
from maskdm.settings import leaves, override, to_yaml

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in two classes: colours, transparency, one not square, one broken."""
    path = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(12):
        place = path / f"class {number % 2}"
        place.mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (14, 10, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    (path / "class 0" / "broken.png").write_text("no image")
    return path


def base(folder: Path) -> Config:
    """A configuration in which every setting can matter."""
    return Config(
        data=Data(str(folder), (8, 8), heldout=0.25, flip=0.3, conditional=True, max_broken=0.2),
        model=UViTConfig(width=16, depth=3, heads=2, patch=2, fuse=1),
        diffusion=Diffusion(target="v", weight=MinSNRWeight(0.5), timesteps=LogitNormalTimesteps()),
        stages=(
            Stage("one", Budget(steps=3, images=9, minutes=1.0), PatchMask(0.5), batch=4, warmup=2, lr=1e-2),
            Stage("two", Budget(steps=2), BlockMask(0.5, 2), batch=4, lr=1e-2, decay="cosine"),
            Stage("three", Budget(steps=2), CropMask(2), batch=4, lr=1e-2),
        ),
        intervals=Intervals(log=2, evaluate=2, sample=2, save=2, keep=1),
        sampling=Sampling(steps=3, num=4, eta=0.5, guidance=1.5),
    )


CHANGES: dict[str, str] = {
    "data.image_size": "12",
    "data.channels": "1",
    "data.conditional": "false",
    "data.fit": "pad",
    "data.background": "#000000",
    "data.flip": "0.9",
    "data.heldout": "0.4",
    "data.limit": "5",
    "model.kind": "{kind: dit, width: 16, depth: 3, heads: 2, patch: 2}",
    "model.width": "32",
    "model.depth": "5",
    "model.heads": "4",
    "model.patch": "1",
    "model.mlp_ratio": "2",
    "model.qkv_bias": "true",
    "model.fuse": "0",
    "model.mask_token": "true",
    "diffusion.schedule": "linear",
    "diffusion.target": "eps",
    "diffusion.weight.kind": "uniform",
    "diffusion.weight.gamma": "5",
    "diffusion.timesteps.kind": "uniform",
    "diffusion.timesteps.mean": "1",
    "diffusion.timesteps.std": "0.5",
    "diffusion.stratified": "true",
    "diffusion.label_drop": "0.9",
    "stages.one.budget.steps": "1",
    "stages.one.budget.images": "5",
    "stages.one.budget.minutes": "1e-9",
    "stages.one.mask.kind": "none",
    "stages.one.mask.ratio": "0.75",
    "stages.two.mask.ratio": "0.75",
    "stages.two.mask.size": "1",
    "stages.three.mask.size": "3",
    "stages.one.batch": "3",
    "stages.one.accumulate": "2",
    "stages.one.lr": "1e-3",
    "stages.one.warmup": "0",
    "stages.two.decay": "constant",
    "stages.two.start_from": "ema",
    "optimizer.name": "muon",
    "stages.two.lesson.kind": "{kind: halve, steps: 2}",
    "optimizer.betas": "0.8,0.9",
    "optimizer.weight_decay": "0.5",
    "optimizer.clip": "0.01",
    "ema.decay": "0.1",
    "ema.warmup": "false",
    "ema.snapshots": "0",
    "ema.sigma_rel": "0.05,0.2",
    "sampling.scheduler": "dpm++",
    "sampling.steps": "5",
    "sampling.eta": "0",
    "sampling.guidance": "3",
    "sampling.guide": "path",
    "sampling.guidance_window": "0.5,2",
    "sampling.guidance_rescale": "0.7",
    "seed": "1",
}
"""Settings whose change must show in the data, the network, the trained weights or the samples."""

ELSEWHERE = {
    "data.shuffle",  # tests/test_shards_training.py
    "sampling.threshold",  # tests/test_sampling.py
    "data.source", "data.max_broken", "init", "sampling.num", "tracking", "model.transform",
    "model.dial", "model.shortcuts",  # tests/test_distillation.py, with the settings of lessons
    "lora.rank", "lora.scale",  # tests/test_lora.py
    "stages.one.budget.auto",  # tests/test_switch.py
    "optimizer.muon",  # tests/test_muon.py
    "guard.spike", "guard.in_a_row", "guard.rollbacks",  # tests/test_guard.py
    "data.autoencoder", "data.latent_factor", "data.latent_channels", "data.latent_mean", "data.latent_std",  # tests/test_latents.py
    "hardware.device", "hardware.precision", "hardware.compile", "hardware.checkpoint_activations", "hardware.threads",
    "hardware.shard",  # tests/test_distributed.py
    "evaluation.measure", "evaluation.samples", "evaluation.features", "evaluation.patience",  # tests/test_cli_evaluate.py
    "intervals.log", "intervals.evaluate", "intervals.sample", "intervals.save", "intervals.keep",
}  # fmt: skip
"""Settings with a test of their own below."""


def effects(config: Config, cache: Path) -> str:
    """A digest of the data, the weights and averages after training, and samples."""
    dataset = prepare(open_source(config.data.source), config.data, cache, None)
    training, heldout = dataset.split(config.data.heldout, config.seed, config.data.limit)
    torch.manual_seed(config.seed)
    model = build(config.model, config.data, len(dataset.class_names) if config.data.conditional else 0)
    trainer = Trainer(config, Loader(dataset, training, config.seed), model, CPU, "fp32")
    steps = [step.stage.name for step in trainer.run()]
    digest = hashlib.sha256(json.dumps([dataset.content_hash, steps, heldout.tolist()]).encode())
    for group in trainer.tensors().values():
        for name in sorted(group):
            digest.update(name.encode() + str(group[name].shape).encode() + group[name].numpy().tobytes())
    names = list(dataset.class_names) if config.data.conditional else []
    pipeline = make_pipeline(trainer.average.model, config, names)
    drawn = draw_images(pipeline, config.sampling, range(2), [0, 1] if names else None, config.seed, "fp32")
    return digest.hexdigest() + hashlib.sha256(drawn.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_every_setting_is_covered_here(folder: Path) -> None:
    def anywhere(path: str) -> str:
        return ".".join("*" if i == 1 and path.startswith("stages") else part for i, part in enumerate(path.split(".")))

    known = {anywhere(leaf.path) for leaf in leaves(base(folder))}
    assert known == {anywhere(path) for path in {*CHANGES, *ELSEWHERE, "stages.one.name"}}


@pytest.mark.parametrize("path", CHANGES)
def test_a_changed_setting_changes_what_is_done(path: str, folder: Path, cache: Path) -> None:
    before = base(folder)
    after = override(before, [(path, CHANGES[path])])
    assert effects(before, cache) == effects(base(folder), cache) if path == "seed" else True
    assert effects(after, cache) != effects(before, cache)


def test_dit_settings_change_it_too(folder: Path, cache: Path) -> None:
    before = replace(base(folder), model=DiTConfig(width=16, depth=2, heads=2, patch=2), stages=base(folder).stages[:1])
    seen = {effects(before, cache)}
    for name, value in (("width", "32"), ("depth", "3"), ("heads", "4"), ("patch", "1"), ("mlp_ratio", "8")):
        seen.add(effects(override(before, [(f"model.{name}", value)]), cache))
    assert len(seen) == 6


@pytest.mark.parametrize(
    "model", ["{kind: dit, width: 16, depth: 2, heads: 2, patch: 1}", "{kind: uvit, width: 16, depth: 3, heads: 2, patch: 1}"]
)
def test_the_transform_changes_it_too(model: str, folder: Path, cache: Path) -> None:
    before = override(base(folder), [("model", model)])
    assert effects(override(before, [("model.transform", "haar")]), cache) != effects(before, cache)


# --- settings that show in a run, not in its weights ---


def run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[tuple[str, str], ...] = ()
) -> tuple[RunDirectory, list[dict[str, Any]]]:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "config.yaml"
    config = base(folder)
    file.write_text(to_yaml(replace(config, hardware=replace(config.hardware, threads=1, precision="fp32"))))
    out = tmp_path / "run"
    train(TrainRequest(str(folder), out, config_file=file, settings=settings), "maskdm train", Display())
    directory = RunDirectory(out)
    return directory, [json.loads(line) for line in directory.metrics_log.read_text().splitlines()]


@pytest.mark.parametrize(("name", "event"), [("log", "train"), ("evaluate", "heldout"), ("sample", "sample")])
def test_intervals_of_what_is_logged(name: str, event: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, often = run(folder, tmp_path / "a", monkeypatch)
    _, seldom = run(folder, tmp_path / "b", monkeypatch, ((f"intervals.{name}", "100"),))
    count = [sum(line["event"] == event for line in lines) for lines in (often, seldom)]
    assert count[0] > count[1] > 0


def test_checkpoints_are_saved_and_kept_as_set(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    for name, settings in (("a", ()), ("b", (("intervals.save", "1"), ("intervals.keep", "9"))), ("c", (("intervals.keep", "9"),))):
        (tmp_path / name).mkdir()
        directory, _ = run(folder, tmp_path / name, monkeypatch, settings)
        left.append(len(list(directory.checkpoints.iterdir())))
    assert left[0] < left[2] < left[1]


def test_snapshots_are_spread_over_each_stage(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, left in (
        ("2", ["one 2", "one 3", "three 6", "three 7", "two 4", "two 5"]),
        ("1", ["one 3", "three 7", "two 5"]),
        ("0", []),
    ):
        (tmp_path / number).mkdir()
        settings = (("ema.snapshots", number), ("one.budget.images", "100"))
        directory, _ = run(folder, tmp_path / number, monkeypatch, settings)
        assert sorted(f"{path.parent.name} {int(path.stem[-8:])}" for path in directory.snapshots.rglob("*.safetensors")) == left


def test_tracking(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (name, there) in enumerate((("tensorboard", True), ("none", False))):
        (tmp_path / str(number)).mkdir()
        directory, _ = run(folder, tmp_path / str(number), monkeypatch, (("tracking", name),))
        assert (directory.path / "tensorboard").exists() == there


def test_hardware(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (("hardware.precision", "bf16"), ("hardware.threads", "2"), ("hardware.device", "cpu"), ("sampling.num", "9"))
    directory, lines = run(folder, tmp_path, monkeypatch, settings)
    environment = directory.info()["environment"]
    assert (environment["precision"], environment["threads"], environment["device"]) == ("bf16", 2, "cpu")
    with Image.open(next(directory.samples.iterdir())) as picture:
        assert picture.width == picture.height == 3 * 66 + 2  # nine images
    dataset = prepare(open_source(str(folder)), base(folder).data, tmp_path / "cache", None)
    with torch.compiler.set_stance("force_eager"):  # the path of a compiled network, without the minute that compiling takes
        (tmp_path / "compiled").mkdir()
        _, again = run(folder, tmp_path / "compiled", monkeypatch, (*settings, ("hardware.compile", "true")))
    plain, forced = ([line["loss"] for line in each if line["event"] == "heldout"] for each in (lines, again))
    assert forced == plain and len(plain) > 2  # what was rehearsed left nothing behind
    config = override(base(folder), [("hardware.compile", "true"), ("hardware.checkpoint_activations", "selective")])
    trainer = Trainer(config, Loader(dataset, dataset.split(0.25, 0)[0], 0), build(config.model, config.data, 2), CPU, "fp32")
    assert trainer.network is not trainer.model and trainer.model.gradient_checkpointing
    with torch.compiler.set_stance("force_eager"):
        assert next(trainer.run()).loss > 0
