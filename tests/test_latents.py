"""Training on the latents of an autoencoder, which the test trains on real images first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from maskdm.cli import run_command
from maskdm.config import Data
from maskdm.data import Latents, flip, open_source, prepare, to_model_range
from maskdm.errors import UserError
from maskdm.models import encode, open_autoencoder
from maskdm.runs.directory import RunDirectory
from maskdm.runs.latents import with_shape
from maskdm.runs.store import load_pipeline
from maskdm.sampling import MaskDMPipeline

TINY = [
    "--image-size", "16", "--model.width", "16", "--depth", "1", "--heads", "2", "--patch", "2", "--threads", "1", "--precision", "fp32",
    "--pretrain.budget.steps", "6", "--finetune.budget.steps", "4", "--pretrain.batch", "8", "--finetune.batch", "8",
    "--intervals.log", "1", "--intervals.save", "2", "--intervals.evaluate", "5", "--intervals.sample", "5",
    "--sampling.steps", "2", "--sampling.num", "4", "--data.flip", "0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(cache))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Digits at 16 pixels to 3 x 8 x 8 latents; trained until they can be told from what comes out."""
    torch.manual_seed(0)
    net = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=3, norm_num_groups=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, mid_block_add_attention=False,
    )  # fmt: skip
    images = to_model_range(prepare(open_source("digits"), Data("digits", (16, 16), channels=1), cache).field(np.arange(1000)))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(60):
        batch = images[step * 16 % 900 :][:64]
        loss = (net.decode(net.encode(batch).latent_dist.mode()).sample - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.15 * images.var()
    path = tmp_path_factory.mktemp("autoencoder")
    net.save_pretrained(path)
    return path


def train(out: Path, autoencoder: Path, *more: str) -> int:
    return run_command(["train", "digits", "--recipe", "digits", "--autoencoder", str(autoencoder), "--out", str(out), *TINY, *more])


@pytest.fixture(scope="module")
def trained(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDM_CACHE", str(cache))
        assert train(out, autoencoder) == 0
    return out


def test_a_run_on_latents_trains_resumes_and_samples(trained: Path, autoencoder: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    config = RunDirectory(out).config()
    assert (config.data.latent_factor, config.data.latent_channels, config.grid, config.data.field_size) == (2, 3, (4, 4), (8, 8))
    assert len(list((cache / "latents").glob("*.npy"))) == 1
    values = np.load(next((cache / "latents").glob("*.npy")))
    assert values.shape == (1797, 2, 3, 8, 8)
    dataset = prepare(open_source("digits"), config.data, cache)
    training, _ = dataset.split(config.data.heldout, config.seed)
    latents = Latents(values, config.data.latent_mean, config.data.latent_std).take(training)[:, 0]
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.02 and (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    assert train(out, autoencoder) == 0  # nothing to do
    assert train(out, autoencoder, "--finetune.budget.steps", "6", "--fork") == 0
    assert run_command(["sample", str(out), "--num", "2", "--steps", "2", "--out", str(tmp_path / "drawn")]) == 0
    folder = MaskDMPipeline.from_pretrained(out / "model")
    drawn: Any = folder(2, [1, 2], torch.Generator().manual_seed(0), 2, output_type="pt")
    ours, _ = load_pipeline(out)
    assert drawn.images.shape == (2, 1, 16, 16)
    assert torch.equal(drawn.images, ours(2, [1, 2], torch.Generator().manual_seed(0), 2, output_type="pt").images)  # pyright: ignore


@pytest.mark.slow
def test_a_run_on_latents_is_evaluated(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    assert run_command(["evaluate", str(tmp_path / "run"), "--num", "20"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["num_samples"] == 20 and metrics["denoising"]["heldout"] > 0


@pytest.mark.usefixtures("trained")
def test_latents_are_those_of_the_image_and_of_the_mirrored_one(autoencoder: Path, cache: Path) -> None:
    data = Data("digits", (16, 16), channels=1, autoencoder=str(autoencoder), flip=0.5)
    images = to_model_range(prepare(open_source("digits"), data, cache).field(np.arange(5)))
    net = open_autoencoder(str(autoencoder))
    values = np.load(next((cache / "latents").glob("*.npy")), mmap_mode="r")[:5].astype(np.float32)
    for view, shown in enumerate((images, images.flip(-1))):
        assert np.abs(values[:, view] - encode(net, shown).numpy()).max() < 0.01
    both = torch.from_numpy(values)
    assert torch.equal(
        flip(both, torch.tensor([True, False, True, False, False])), torch.stack([both[i, 1 if i in (0, 2) else 0] for i in range(5)])
    )


def test_decoding_undoes_encoding(trained: Path, cache: Path) -> None:
    pipeline, _ = load_pipeline(trained)
    config = RunDirectory(trained).config()
    images = to_model_range(prepare(open_source("digits"), config.data, cache).field(np.arange(50)))
    values = np.load(next((cache / "latents").glob("*.npy")), mmap_mode="r")
    latents = Latents(values, config.data.latent_mean, config.data.latent_std).take(np.arange(50))[:, 0]
    assert (pipeline.to_pixels(latents) - images).square().mean() < 0.15 * images.var()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data("digits", (16, 16), channels=3), "takes images of 1 channels; use --channels 1"),
        (Data("digits", (15, 15), channels=1), "does not take images of 15x15"),
        (Data("digits", (16, 16), channels=1, autoencoder="/nowhere/at/all"), "cannot be opened"),
    ],
)
def test_what_does_not_fit_is_refused(data: Data, message: str, autoencoder: Path) -> None:
    from dataclasses import replace

    with pytest.raises(UserError, match=message):
        with_shape(replace(data, autoencoder=data.autoencoder or str(autoencoder)))


def test_a_network_that_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a UNet2DModel; give one of AutoencoderKL, AutoencoderDC"):
        open_autoencoder(str(tmp_path))


def test_another_autoencoder_is_another_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(trained), *TINY]) == 2
    assert "data.autoencoder" in capsys.readouterr().err
