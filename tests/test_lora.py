"""Adapters: trained alone, kept small, and gone from what is left."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maskdm.arithmetic import flops
from maskdm.cli import run_command
from maskdm.config import Lora
from maskdm.engine import adapters
from maskdm.errors import UserError
from maskdm.models import DiT, UViT
from maskdm.recipes import recipe
from maskdm.runs.store import load_denoiser, reconstruct_ema

TINY = ["--model.width", "16", "--depth", "3", "--heads", "2", "--threads", "1", "--sampling.steps", "2", "--sampling.num", "4"]
STEPS = ["--pretrain.budget.steps", "2", "--finetune.budget.steps", "2", "--precision", "fp32", "--tracking", "none"]


@pytest.mark.parametrize("kind", [DiT, UViT])
def test_adapters_begin_as_nothing_and_merge_to_a_plain_network(kind: Any) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    network, plain = kind(8, 1, 2, 16, 3, 2, num_classes=3), kind(8, 1, 2, 16, 3, 2, num_classes=3)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([5.0, 800.0]), torch.tensor([0, 3])
    before = network(x, t, labels).sample.detach()
    lora = Lora(2, 0.5)
    adapters.adapt(network, lora, ["class_embedding.weight"])
    assert torch.equal(network(x, t, labels).sample, before)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name for name in trained if not adapters.is_adapter(name)} == {"class_embedding.weight"}
    layers = {name.partition(".lora_")[0] for name in trained if adapters.is_adapter(name)}
    assert len(layers) == 4 * 3 and all(".attention." in name or ".mlp." in name for name in layers)
    for name, parameter in network.named_parameters():
        if name in trained:
            parameter.data += 0.1 * torch.randn_like(parameter)
    plain.load_state_dict(adapters.merged(network.state_dict(), lora))
    after = network(x, t, labels).sample
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(plain(x, t, labels).sample, after, atol=1e-5, rtol=1e-5)


def test_arithmetic_leaves_out_what_is_not_trained() -> None:
    whole = recipe("digits", "digits")
    adapted = replace(whole, lora=Lora(8), init="run")
    mask = whole.stages[-1].mask
    scores = 3 * 4 * 16**2 * whole.model.width * whole.blocks
    assert flops(adapted, mask, 5) == pytest.approx(2 / 3 * (flops(whole, mask, 5) - 5 * scores) + 5 * scores)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--lora.rank needs peft: pip install 'maskdm\[lora\]'"):
        adapters.require(Lora(8))
    adapters.require(Lora())
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(tmp_path / "x"), "--lora.rank", "8"]) == 2
    assert "lora.rank is 8, and there are no weights to adapt; name a run with --init" in capsys.readouterr().err
    for setting, said in ((("--lora.rank", "-1"), "must be 0 or more"), (("--lora.scale", "0"), "must be above 0")):
        assert run_command(["train", "digits", "--recipe", "digits", "--out", str(tmp_path / "x"), *setting]) == 2
        assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A run, and one that adapts it to gray images of four classes, two of them new; and the command of that."""
    pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("lora")
    os.environ["MASKDM_CACHE"] = str(path / "cache")
    first, second = path / "first", path / "second"
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(first), *TINY, *STEPS]) == 0
    random = np.random.default_rng(0)
    np.savez(path / "few.npz", x=random.integers(0, 255, (40, 8, 8, 1), dtype=np.uint8), y=8 + np.arange(40) % 4)
    budget = ["--finetune.budget.steps", "6", "--finetune.batch", "4", "--finetune.warmup", "0", "--intervals.save", "2", "--lr", "0.01"]
    common = ["--init", str(first), "--threads", "1", "--sampling.steps", "2", "--num", "4", "--precision", "fp32", "--tracking", "none"]
    command = ["train", str(path / "few.npz"), *common, *budget, "--lora.rank", "2", "--ema.snapshots", "2"]
    assert run_command([*command, "--out", str(second)]) == 0
    return first, second, command


def test_checkpoints_hold_the_adapters_alone_and_the_result_is_plain(runs: tuple[Path, Path, list[str]]) -> None:
    first, second, _ = runs
    last = sorted((second / "checkpoints").iterdir())[-1]
    for file in ("model", "average"):
        names = set(load_file(last / f"{file}.safetensors"))
        assert all(adapters.is_adapter(name) or name == "class_embedding.weight" for name in names) and len(names) == 2 * 4 * 3 + 1
    assert {name.partition("/")[2] for name in load_file(last / "optimizer.safetensors")} == names
    model = load_file(second / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    network, weights, _ = load_denoiser(second, "ema")
    assert set(model) == set(weights) == set(network.state_dict())
    assert all(torch.equal(model[name], weights[name]) for name in model)
    before = load_denoiser(first, "ema")[1]
    changed = {name for name in before if name in weights and not torch.equal(before[name], weights[name])}
    assert changed == {name for name in before if re.search(r"(qkv|attention\.out|gate_up|down)\.weight$", name)} | {
        "class_embedding.weight"
    }
    for state in (load_denoiser(second, "raw")[1], load_denoiser(second, "best")[1], reconstruct_ema(second, 0.1)[0]):
        assert set(state) == set(weights)
        network.load_state_dict(state)
    info = json.loads((second / "run.json").read_text())
    assert info["parameters"] == sum(value.numel() for value in weights.values())
    assert {each["fate"] for each in info["init"]} == {"loaded", "resized"}


def test_a_run_with_adapters_resumes_exactly(runs: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, second, command = runs
    from maskdm.engine import Trainer

    step = Trainer.step

    def cut(self: Trainer, *arguments: Any) -> Any:
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", cut)
    assert run_command([*command, "--out", str(tmp_path / "cut")]) == 130
    monkeypatch.undo()
    assert run_command([*command, "--out", str(tmp_path / "cut")]) == 0
    whole, again = (load_denoiser(path, "raw")[1] for path in (second, tmp_path / "cut"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_was_adapted_can_be_exported_sampled_and_adapted_again(
    runs: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, second, command = runs
    assert run_command(["sample", str(second), "--num", "2", "--out", str(tmp_path / "s"), "--ema", "0.1"]) == 0
    assert run_command(["ema-sweep", str(second), "--sigma-rel", "0.1", "--save"]) == 0
    assert run_command(["export", str(second), "--out", str(tmp_path / "e")]) == 0
    exported = load_file(tmp_path / "e" / "unet" / "diffusion_pytorch_model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in exported)
    command[command.index("--init") + 1] = str(second)
    capsys.readouterr()
    assert run_command([*command, "--out", str(tmp_path / "third")]) == 0
    said = capsys.readouterr().err
    assert "adapters of rank 2:" in said and "million weights are trained; the others stay as they are" in said
