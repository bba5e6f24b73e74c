"""`maskdm edit --task text`: a tiny random CLIP network with a tokenizer of letters, saved and read back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_evaluation_transformers import SQUARE, TOWER, pictures, write
from test_sample_command import run  # noqa: F401 - the fixture

from maskdm.cli import run_command
from maskdm.errors import UserError
from maskdm.evaluation.clip_text import read_prompt
from maskdm.evaluation.preparation import Preparation

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: i for i, token in enumerate([*letters, *(f"{each}</w>" for each in letters), "<|startoftext|>", "<|endoftext|>"])}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 20}
    text |= {"vocab_size": len(vocabulary), "bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    torch.manual_seed(1)
    write(transformers.CLIPModel(transformers.CLIPConfig(vision_config=TOWER, text_config=text, projection_dim=24)), folder)
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("size", [(28, 28), 20, 60])
def test_the_differentiable_preparation_is_pillows(resample: Image.Resampling, size: Any) -> None:
    preparation = Preparation(size, (1.0, 2.0, 3.0), (50.0, 60.0, 70.0), (18, 18), resample)
    images = pictures(3) // 2 + 60  # nothing to cut off
    found = preparation.differentiable(images.float())
    assert (found - preparation(images)).abs().max() < 1.1 / 50
    assert preparation.differentiable(images[:, :1].float()).shape == (3, 3, 18, 18)
    with pytest.raises(UserError, match="filter lanczos, which has no gradient"):
        Preparation(size, (0.0,) * 3, (1.0,) * 3, None, Image.Resampling.LANCZOS).differentiable(images.float())


def test_the_distance_is_the_librarys_and_has_a_gradient(clip: Path) -> None:
    prompt = read_prompt(clip, " red flower ", CPU)
    images = torch.rand(3, 3, 40, 30) * 2 - 1
    model, tokenizer = transformers.CLIPModel.from_pretrained(clip), transformers.AutoTokenizer.from_pretrained(clip)
    pixels = Preparation((28, 28), tuple(255 * m for m in SQUARE["image_mean"]), tuple(255 * s for s in SQUARE["image_std"]))
    with torch.no_grad():
        whole = ((images + 1) * 127.5).round()
        output = model(pixel_values=pixels(whole.byte()), **tokenizer("red flower", return_tensors="pt"))
    torch.testing.assert_close(
        prompt.distance(whole / 127.5 - 1), 1 - output.logits_per_image[:, 0] / model.logit_scale.exp(), atol=2e-3, rtol=0
    )
    images.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distance = prompt.distance(images)
    assert distance.dtype == torch.float32
    distance.sum().backward()
    assert images.grad is not None and images.grad.flatten(1).norm(dim=1).min() > 0
    assert all(parameter.grad is None for parameter in prompt.model.parameters())
    other = read_prompt(clip, "a white dog", CPU)
    assert (other.embedding - prompt.embedding).norm() > 1e-3


@pytest.mark.parametrize("method", ["cheap", "full"])
def test_images_come_nearer_to_the_prompt(method: str, run: Path, clip: Path, tmp_path: Path) -> None:  # noqa: F811
    found: list[dict[str, Any]] = []
    for strength in ("0.001", "1"):
        out = tmp_path / strength
        words = ["edit", str(run), "--task", "text", "--prompt", "red flower", "--clip", str(clip), "--method", method]
        assert run_command([*words, "--strength", strength, "--num", "3", "--steps", "8", "--out", str(out)]) == 0
        found.append(json.loads((out / "edit.json").read_text()))
    free, guided = found
    assert guided["loss"] < free["loss"] - 0.05
    assert guided["task"] == "text" and guided["backward"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "text", "--clip", "clip"], "--prompt belongs to task text: give it"),
        (["--task", "text", "--prompt", "a flower"], "--clip belongs to task text: give it"),
        (["--task", "classify", "--target", "3", "--prompt", "a"], "--prompt belongs to task text: leave it out of classify"),
        (["--task", "classify", "--target", "3", "--clip", "clip"], "--clip belongs to task text: leave it out of classify"),
        (["--task", "text", "--prompt", "a", "--clip", "clip", "--image", "x.png"], "task text takes no --image"),
        (["--task", "text", "--prompt", "a", "--clip", "nowhere"], "nowhere is no folder"),
        (["--task", "text", "--prompt", " ", "--clip", "clip"], "--prompt is empty"),
        (["--task", "text", "--prompt", "a" * 30, "--clip", "clip"], "--prompt has 32 tokens, and the network reads 20"),
    ],
)
def test_what_does_not_fit_is_said(
    more: list[str],
    message: str,
    run: Path,  # noqa: F811
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(clip) if word == "clip" else word for word in more]
    assert run_command(["edit", str(run), "--out", str(tmp_path / "out"), "--num", "2", "--steps", "2", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "out").exists()


def test_folders_that_lack_something_are_refused_by_name(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(name: str, *without: str) -> Path:
        folder = shutil.copytree(clip, tmp_path / name)
        for each in without:
            (folder / each).unlink(missing_ok=True)
        return folder

    def refused(folder: Path, words: str) -> None:
        with pytest.raises(UserError, match=words) as raised:
            read_prompt(folder, "a flower", CPU)
        assert "\n" not in str(raised.value)

    refused(copy("mute", "tokenizer.json", "vocab.json", "merges.txt"), r"mute has no tokenizer \(tokenizer\.json, or")
    refused(copy("blind", "preprocessor_config.json"), r"preprocessor_config\.json is missing")
    refused(copy("empty", "model.safetensors"), "empty cannot be loaded by the Transformers library")
    refused(copy("bare", "config.json"), r"there is no .*config\.json")
    broken = copy("broken")
    (broken / "tokenizer.json").write_text("{")
    refused(broken, "the tokenizer in .*broken fails on 'a flower'")
    tower = write(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(projection_dim=24, **TOWER)), tmp_path / "tower")
    refused(tower, "holds a network of the type clip_vision_model; text needs both towers")
    half = copy("half")
    _without_the_text_tower(half)
    refused(half, r"half lacks \d+ of the network's weights")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(clip, r"pip install 'maskdm\[transformers\]'")


def _without_the_text_tower(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = {name: value for name, value in load_file(folder / "model.safetensors").items() if not name.startswith("text_model.")}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
