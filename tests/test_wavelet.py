"""Wavelets inside a network: exact, orthonormal, two tokens a patch, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskdm.arithmetic import flops, ideal_speedup, tokens_per_image
from maskdm.config import (
    BlockMask,
    Budget,
    Config,
    Data,
    DeferMask,
    Diffusion,
    DiTConfig,
    Ema,
    Hardware,
    Mask,
    Model,
    NoMask,
    PatchMask,
    RouteMask,
    Stage,
    UViTConfig,
    ViewsMask,
)
from maskdm.data import Dataset, Loader
from maskdm.engine import Trainer, this_machine, transfer
from maskdm.errors import UserError
from maskdm.masking import Route, draw, take, tokens_of_blocks
from maskdm.models import Denoiser, build, haar, inverse_haar, patchify
from maskdm.runs.plan import plan_lines

MODELS: tuple[Model, ...] = (DiTConfig(32, 6, 2, 2, transform="haar"), UViTConfig(32, 7, 2, 2, transform="haar"))
both = pytest.mark.parametrize("model", MODELS)


def config(model: Model, mask: Mask, size: tuple[int, int] = (32, 32)) -> Config:
    stage = Stage("one", Budget(steps=4), mask, batch=4, lr=1e-3)
    return Config(Data("made up", size), model, (stage,), Diffusion(target="v"), ema=Ema(snapshots=0))


def network(model: Model, size: tuple[int, int] = (32, 32), classes: int = 0) -> Denoiser:
    torch.manual_seed(0)
    found = build(model, Data("made up", size), classes)
    for parameter in found.parameters():  # adaLN-zero would hide everything behind zeros
        parameter.data += 0.05 * torch.randn_like(parameter)
    return found.eval()


def trainer(settings: Config) -> Trainer:
    random = np.random.default_rng(0)
    images = (80 * (np.arange(12) % 3)[:, None, None, None] + random.integers(0, 60, (12, 32, 32, 3))).astype(np.uint8)
    dataset = Dataset(images, np.zeros(12, np.int64), (), "", "", (), (), Path("made up"))
    return Trainer(settings, Loader(dataset, np.arange(12), 0), network(settings.model), torch.device("cpu"), "fp32")


# --- the transform ---


def test_the_transform_is_inverted_exactly() -> None:
    bytes_ = torch.randint(0, 256, (2, 3, 8, 12)).float()
    assert torch.equal(inverse_haar(*haar(bytes_)), bytes_)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, 12)  # any dimensions in front
    approximation, detail = haar(x)
    assert approximation.shape == (2, 5, 3, 4, 6) and detail.shape == (2, 5, 9, 4, 6)
    torch.testing.assert_close(inverse_haar(approximation, detail), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(haar(inverse_haar(approximation, detail)), (approximation, detail), rtol=1e-6, atol=1e-6)


def test_the_transform_is_orthonormal() -> None:
    every = torch.eye(48, dtype=torch.float64).reshape(48, 3, 4, 4)
    matrix = torch.cat([x.flatten(1) for x in haar(every)], dim=1)
    assert torch.equal(matrix @ matrix.T, torch.eye(48, dtype=torch.float64))  # so that white noise stays white


def test_approximation_and_details_are_what_they_are_called() -> None:
    flat = torch.full((1, 1, 4, 4), 0.5)
    approximation, detail = haar(flat)
    assert (approximation == 1.0).all() and not detail.any()
    rows = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(1, 1, 4, 4)
    for image, number in ((rows, 0), (rows.mT, 1), (rows * rows.mT, 2)):  # differences down, across, diagonally
        approximation, detail = haar(image)
        assert not approximation.any() and [bool(detail[:, i].any()) for i in range(3)] == [i == number for i in range(3)]


# --- in a network ---


@both
def test_all_patches_kept_is_the_whole_image_and_tokens_are_two_a_patch(model: Model) -> None:
    found, x, t = network(model, (16, 24)), torch.randn(2, 3, 16, 24), torch.tensor([100.0, 800.0])
    assert found.grid == (4, 6) and found.tokens == 48 and found.patch_size == 4
    seen: list[int] = []
    block = next(m for m in found.modules() if type(m).__name__ in ("DiTBlock", "UViTBlock"))
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    whole = found(x, t).sample
    kept = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(found(patchify(x, 4), t, None, kept).sample, patchify(whole, 4))
    assert whole.shape == x.shape
    some = found(patchify(x, 4)[:, :5], t, None, kept[:, :5]).sample
    extras = 0 if isinstance(model, DiTConfig) else 1
    assert some.shape == (2, 5, 48) and seen == [48 + extras, 48 + extras, 10 + extras]


@both
def test_a_masked_network_sees_where_its_patches_sit_and_nothing_else(model: Model) -> None:
    found, patches, t = network(model), torch.randn(2, 5, 48), torch.tensor(300.0)
    kept = torch.tensor([[0, 3, 6, 9, 12], [0, 3, 6, 9, 12]])
    out = found(patches, t, None, kept).sample
    assert (out - found(patches, t, None, kept + 1).sample).abs().max() > 1e-3
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(found(patches[:, order], t, None, kept[:, order]).sample, out[:, order], atol=1e-5, rtol=1e-4)


@both
def test_approximation_and_detail_are_told_apart_and_both_come_out(model: Model) -> None:
    found, t = network(model), torch.tensor(300.0)

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return haar(found(x, t).sample)

    approximation, detail = haar(torch.randn(1, 3, 32, 32))
    first = parts(inverse_haar(approximation, detail))
    second = parts(inverse_haar(approximation, detail.roll(1, dims=1)))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(first, second, strict=True))


@both
def test_every_parameter_is_trained_and_saved(model: Model, tmp_path: Path) -> None:
    found, x = network(model, classes=4).train(), torch.randn(4, 3, 32, 32)
    found(x, 300, torch.arange(4)).sample.square().mean().backward()
    assert [name for name, p in found.named_parameters() if p.grad is None or not p.grad.any()] == []
    found.save_pretrained(tmp_path)
    assert torch.equal(type(found).from_pretrained(tmp_path).eval()(x, 7).sample, found.eval()(x, 7).sample)


@both
def test_half_precision_stays_near_the_full_one(model: Model) -> None:
    found, x = network(model), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = found(x, 300).sample
        with torch.autocast("cpu", torch.bfloat16):
            rounded = found(x, 300).sample
    assert (rounded.float() - exact).square().mean().sqrt() < 0.02 * exact.std()


def test_a_new_dit_says_nothing() -> None:
    assert not build(MODELS[0], Data("x", (32, 32)), 0)(torch.randn(1, 3, 32, 32), 300).sample.any()


@both
def test_routes_and_deferred_dropping_take_both_tokens_of_a_patch(model: Model) -> None:
    found, x, t = network(model), torch.randn(2, 3, 32, 32), torch.tensor(300.0)
    every = torch.arange(64).expand(2, -1)
    torch.testing.assert_close(found(x, t, None, None, Route(every, 2, 2)).sample, found(x, t).sample)
    kept = every[:, ::4]
    deferred = found(patchify(x, 4), t, None, None, Route(kept, 2, 0)).sample
    assert deferred.shape == (2, 16, 48)
    torch.testing.assert_close(found(patchify(x, 4), t, None, None, Route(every, 2, 0)).sample, patchify(found(x, t).sample, 4))


# --- in training, and what is said of it ---


@both
@pytest.mark.parametrize("mask", [NoMask(), PatchMask(0.75), BlockMask(0.75, 4), ViewsMask(4), RouteMask(0.5, 2), DeferMask(0.75, 2)])
def test_flops_are_those_that_torch_counts(model: Model, mask: Mask) -> None:
    settings = config(replace(model, width=256, heads=4, depth=9 if isinstance(model, UViTConfig) else 8), mask)
    run = trainer(settings)
    run.model.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        next(run.run())
    assert flops(settings, mask, 4) == pytest.approx(counter.get_total_flops(), rel=0.25)


@both
def test_losses_fall(model: Model) -> None:
    settings = config(model, PatchMask(0.75))
    whole = Stage("two", Budget(steps=40), batch=4, lr=1e-3)
    longer = replace(settings, stages=(replace(settings.stages[0], budget=Budget(steps=100), lr=3e-3), whole))
    losses = [float(step.loss) for step in trainer(longer).run()]
    assert len(losses) == 140 and np.mean(losses[80:100]) < 0.9 * np.mean(losses[:20])
    assert np.isfinite(losses).all() and np.mean(losses[-20:]) < np.mean(losses[:20])


@both
def test_the_grid_is_that_of_the_coefficients(model: Model) -> None:
    settings = config(model, PatchMask(0.75))
    assert settings.grid == (8, 8) and settings.tokens == 128 and tokens_per_image(settings, PatchMask(0.75)) == 32
    n, d = 128, 32
    if isinstance(model, DiTConfig):
        assert ideal_speedup(settings, PatchMask(0.75)) == pytest.approx(4 * (6 * d + n) / (6 * d + n / 4))
    kept = draw(PatchMask(0.75), 2, settings.grid, torch.Generator().manual_seed(0))
    assert tokens_of_blocks(PatchMask(0.75), settings.grid, 6) == [16] * 6
    assert take(patchify(torch.randn(2, 3, 32, 32), model.side), kept).shape == (2, 16, 48)
    (line,) = plan_lines(settings, this_machine(Hardware(device="cpu")))[1:]
    assert "learns from 16 of 64 patches of two tokens" in line


@both
def test_sizes_that_do_not_divide_are_named_with_the_way_out(model: Model) -> None:
    with pytest.raises(UserError, match=r"image_size 30 is not a multiple of 4, patch 2 at half the size .* use --image-size 32"):
        config(model, NoMask(), (30, 30)).check()
    config(model, NoMask(), (28, 36)).check()


@both
def test_weights_start_another_run_at_another_size(model: Model) -> None:
    source, target = network(model, (32, 32), 2), network(model, (16, 24), 2)
    fates = transfer(source, source.state_dict(), target)
    assert [each.name for each in fates if each.fate == "resized"] == ([] if isinstance(model, DiTConfig) else ["positions.weight"])
    with pytest.raises(UserError, match=r"model.transform haar and this run pixels; use --model.transform haar"):
        transfer(source, source.state_dict(), network(replace(model, transform="pixels"), classes=2))
    gray = build(model, Data("x", (32, 32), channels=1), 2)
    resized = [each.name for each in transfer(source, source.state_dict(), gray) if each.fate == "resized"]
    assert len(resized) == 6 and "out.detail.bias" in resized


def test_resized_positions_are_those_of_each_set() -> None:
    model = UViTConfig(16, 3, 2, 2, transform="haar")
    source, target = network(model, (16, 16)), network(model, (32, 32))
    table = source.state_dict()["positions.weight"]
    table[1:17], table[17:] = 1.0, -1.0
    transfer(source, source.state_dict() | {"positions.weight": table}, target)
    resized = target.state_dict()["positions.weight"]
    torch.testing.assert_close(resized[1:65], torch.ones(64, 16))
    torch.testing.assert_close(resized[65:], -torch.ones(64, 16))


def test_parameters_are_the_papers() -> None:
    with torch.device("meta"):
        model = build(UViTConfig(1024, 16, 16, qkv_bias=True, transform="haar"), Data("x", (256, 256)), 0)
    assert sum(p.numel() for p in model.parameters()) == 233_416_896  # summed in docs/equations.md; MASKDM.md rounds it to 233.4 M
