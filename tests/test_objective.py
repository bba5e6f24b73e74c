from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from maskdm.config import BlockMask, Config, CropMask, Diffusion, Mask, MinSNRWeight, NoMask, PatchMask
from maskdm.data import to_model_range
from maskdm.diffusion import Target, add_noise
from maskdm.draws import Draws, draw_step
from maskdm.masking import take
from maskdm.models import Denoiser, DiT, UViT, patchify
from maskdm.objective import masked_denoising_loss
from maskdm.recipes import recipe

CPU = torch.device("cpu")


def config(**diffusion: Any) -> Config:
    base = recipe("digits", "digits")
    return replace(base, diffusion=replace(base.diffusion, stratified=False, label_drop=0.0, **diffusion))


def model(kind: type[UViT] | type[DiT] = UViT) -> UViT | DiT:
    torch.manual_seed(0)
    made = kind(8, 1, 2, width=32, depth=3, heads=2, num_classes=10)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def images(batch: int = 16) -> Tensor:
    return torch.randint(0, 256, (batch, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def draws(mask: Mask, batch: int = 16, step: int = 0, seed: int = 0) -> Draws:
    return draw_step(config(), mask, seed, step, 0, batch, batch, CPU)


@pytest.mark.parametrize("kind", [UViT, DiT])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_with_nothing_masked_it_is_the_ordinary_loss(kind: type[UViT] | type[DiT], target: Target) -> None:
    """Written out here once more, in the plainest way, on whole images."""
    network, drawn, labels = model(kind), draws(NoMask()), torch.arange(16) % 10
    diffusion = config(target=target).diffusion
    x0 = to_model_range(images())
    noised = add_noise(diffusion, patchify(x0, 2), drawn.noise, drawn.t)
    ordinary = (network(noised.x_t, drawn.t, labels).sample - noised.target).square().mean()
    ours = masked_denoising_loss(network, diffusion, images(), labels, drawn).total
    every = replace(drawn, kept=torch.arange(16).expand(16, -1))
    torch.testing.assert_close(ours, ordinary, rtol=1e-6, atol=0)
    assert torch.equal(masked_denoising_loss(network, diffusion, images(), labels, every).total, ours)  # the same bits


@pytest.mark.parametrize("mask", [PatchMask(0.5), BlockMask(0.5, 2), CropMask(2)])
def test_hidden_patches_have_no_gradient_and_no_effect(mask: Mask) -> None:
    network, drawn, labels = model(), draws(mask), torch.arange(16) % 10
    assert drawn.kept is not None
    seen = torch.zeros(16, 16, dtype=torch.bool).scatter_(1, drawn.kept, True)
    assert drawn.noise.shape[1] == drawn.kept.shape[1]  # none is drawn for hidden patches
    loss = masked_denoising_loss(network, config().diffusion, images(), labels, drawn).total
    hidden_pixels = (~seen).reshape(16, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    other = torch.where(hidden_pixels, 255 - images(), images())
    assert torch.equal(masked_denoising_loss(network, config().diffusion, other, labels, drawn).total, loss)
    other = torch.where(hidden_pixels, images(), 255 - images())
    assert not torch.equal(masked_denoising_loss(network, config().diffusion, other, labels, drawn).total, loss)


class PerPatch(Denoiser):
    """A network that treats each patch by itself, knowing where it sits."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self._set_geometry(8, 2, 0)
        self.scale = nn.Parameter(torch.linspace(-1, 1, 16))

    def denoise(self, patches: Tensor, t: Tensor, labels: Tensor | None, kept: Tensor | None, *_: object) -> Tensor:
        scale = self.scale.expand(len(patches), -1) if kept is None else self.scale[kept]
        return patches * scale[..., None]


@pytest.mark.parametrize("mask", [PatchMask(0.75), BlockMask(0.5, 2)])
def test_over_masks_the_mean_is_the_whole_loss_for_a_network_that_treats_patches_alone(mask: Mask) -> None:
    network = PerPatch()
    whole = masked_denoising_loss(network, config().diffusion, images(), None, draws(NoMask())).total
    drawn = draws(NoMask())
    masks = [draws(mask, step=i).kept for i in range(600)]
    parts = [replace(drawn, kept=kept, noise=take(drawn.noise, kept)) for kept in masks]
    losses = [masked_denoising_loss(network, config().diffusion, images(), None, part).total for part in parts]
    values = torch.stack(losses).detach()
    assert abs(values.mean() - whole) < 4 * values.std() / 600**0.5
    assert values.std() > 0


def test_the_weight_scales_each_samples_error() -> None:
    network, drawn = model(), draws(NoMask())
    plain = masked_denoising_loss(network, config(schedule="cosine").diffusion, images(), None, drawn)
    weighted = masked_denoising_loss(network, Diffusion(target="v", weight=MinSNRWeight(5.0)), images(), None, drawn)
    assert torch.equal(plain.errors, weighted.errors)
    torch.testing.assert_close(plain.total, plain.errors.mean())
    assert not torch.isclose(weighted.total, plain.total)


# --- draws ---


def test_draws_are_a_function_of_seed_step_and_position_alone() -> None:
    whole = draw_step(config(), PatchMask(0.5), 3, 7, 0, 24, 24, CPU)
    for first, count in ((0, 5), (5, 11), (16, 8)):
        part = draw_step(config(), PatchMask(0.5), 3, 7, first, count, 24, CPU)
        here = slice(first, first + count)
        assert part.kept is not None and whole.kept is not None
        for mine, theirs in (
            (part.t, whole.t),
            (part.noise, whole.noise),
            (part.kept, whole.kept),
            (part.drop, whole.drop),
            (part.flip, whole.flip),
        ):
            assert torch.equal(mine, theirs[here])
    for other in (draw_step(config(), PatchMask(0.5), 4, 7, 0, 24, 24, CPU), draw_step(config(), PatchMask(0.5), 3, 8, 0, 24, 24, CPU)):
        assert not torch.equal(other.noise, whole.noise) and not torch.equal(other.t, whole.t)
    assert whole.noise.flatten(1).unique(dim=0).shape[0] == 24  # no two samples share their noise


def test_the_mask_changes_neither_time_nor_label_nor_mirroring() -> None:
    whole, masked = draws(NoMask()), draws(BlockMask(0.5, 2))
    assert torch.equal(whole.t, masked.t) and torch.equal(whole.drop, masked.drop) and torch.equal(whole.flip, masked.flip)


def test_noise_is_standard_normal_and_shares_are_as_set() -> None:
    base = config()
    settings = replace(base, diffusion=replace(base.diffusion, label_drop=0.25), data=replace(base.data, flip=0.75))
    drawn = draw_step(settings, NoMask(), 0, 0, 0, 4096, 4096, CPU)
    assert abs(drawn.noise.mean()) < 0.01 and abs(drawn.noise.std() - 1) < 0.01
    assert abs(drawn.drop.float().mean() - 0.25) < 0.03 and abs(drawn.flip.float().mean() - 0.75) < 0.03


def test_stratified_times_have_one_sample_in_every_slice() -> None:
    base = config()
    settings = replace(base, diffusion=replace(base.diffusion, stratified=True, schedule="vp"))
    t = draw_step(settings, NoMask(), 0, 0, 0, 100, 100, CPU).t
    assert torch.equal((t / 9.99).floor(), torch.arange(100.0))
