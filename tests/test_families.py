"""The masks beyond dropping patches at the door: disjoint views, routes past the inner blocks, deferred dropping."""

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
    CropMask,
    Data,
    DecodeMask,
    DeferMask,
    Diffusion,
    DiTConfig,
    Ema,
    Mask,
    Model,
    NoMask,
    PatchMask,
    ReduceMask,
    RouteMask,
    Stage,
    UViTConfig,
    ViewsMask,
)
from maskdm.data import Dataset, Loader, to_model_range
from maskdm.data.loader import flip
from maskdm.diffusion import add_noise, drop_labels
from maskdm.draws import draw_step
from maskdm.engine import Precision, Trainer
from maskdm.errors import UserError
from maskdm.masking import Route, draw, draw_route, put_back, take, tokens_of_blocks
from maskdm.models import Denoiser, build, patchify
from maskdm.objective import masked_denoising_loss
from maskdm.runs.plan import describe_mask

MODELS: tuple[Model, ...] = (DiTConfig(32, 6, 2, 2), UViTConfig(32, 7, 2, 2))
FAMILIES: tuple[Mask, ...] = (
    *(PatchMask(0.75), ViewsMask(4), RouteMask(0.5, 2), RouteMask(0.75, 2, True), DeferMask(0.75, 2), DecodeMask(0.5, 2), ReduceMask(2)),
)
both = pytest.mark.parametrize("model", MODELS)


def fit(model: Model, mask: Mask) -> Model:
    """The network with the layers that a mask needs: SPRINT's for the spread route, MaskDiT's token."""
    return replace(model, fuse=2 if mask == RouteMask(0.75, 2, True) else 0, mask_token=isinstance(mask, DecodeMask))


def config(model: Model, mask: Mask, classes: bool = True) -> Config:
    data = Data("made up", (16, 16), channels=1, conditional=classes)
    return Config(data, model, (Stage("one", Budget(steps=4), mask, batch=4, lr=1e-3),), Diffusion(target="v"), ema=Ema(snapshots=0))


def network(model: Model) -> Denoiser:
    torch.manual_seed(0)
    found = build(model, config(model, NoMask()).data, 3)
    for parameter in found.parameters():  # adaLN-zero would hide everything behind zeros
        parameter.data += 0.05 * torch.randn_like(parameter)
    return found


def dataset(count: int = 12) -> Dataset:
    random = np.random.default_rng(0)
    images = (60 * (np.arange(count) % 3)[:, None, None, None] + random.integers(0, 60, (count, 16, 16, 1))).astype(np.uint8)
    return Dataset(images, np.arange(count) % 3, ("a", "b", "c"), "", "", (), (), Path("made up"))


def trainer(settings: Config, precision: Precision = "fp32") -> Trainer:
    return Trainer(settings, Loader(dataset(), np.arange(12), 0), network(settings.model), torch.device("cpu"), precision)


@both
@pytest.mark.parametrize(
    ("mask", "fuse"), [(RouteMask(0.0, 2), 0), (RouteMask(0.0, 2), 2), (DeferMask(0.0, 2), 0), (DecodeMask(0.0, 2), 0)]
)
def test_at_rate_zero_each_equals_the_whole_model(model: Model, mask: Mask, fuse: int) -> None:
    model = replace(model, fuse=fuse, mask_token=isinstance(mask, DecodeMask))
    settings = config(model, mask)
    found, x, t = network(model).eval(), torch.randn(2, 1, 16, 16), torch.tensor([100.0, 800.0])
    route = draw_route(mask, 8, settings.grid, torch.Generator().manual_seed(0))
    assert route is not None
    assert route.kept is not None
    some = replace(route, kept=route.kept[:2])
    torch.testing.assert_close(found(x, t, torch.tensor([0, 1]), None, some).sample, found(x, t, torch.tensor([0, 1])).sample)


@both
@pytest.mark.parametrize("mask", [PatchMask(0.0), BlockMask(0.0, 2), CropMask(8)])
def test_what_hides_nothing_at_the_door_trains_as_whole_images_do(model: Model, mask: Mask) -> None:
    for here, there in zip(trainer(config(model, mask)).run(), trainer(config(model, NoMask())).run(), strict=True):
        torch.testing.assert_close(here.loss, there.loss)
        torch.testing.assert_close(here.grad_norm, there.grad_norm)


@both
def test_a_route_passes_by_the_inner_blocks_alone(model: Model) -> None:
    found, x, t = network(model).eval(), torch.randn(2, 1, 16, 16), torch.tensor(300.0)
    kept = torch.stack([torch.randperm(64)[:32].sort().values for _ in range(2)])
    seen: list[int] = []
    blocks = [m for name, m in found.named_modules() if type(m).__name__ in ("DiTBlock", "UViTBlock")]
    hooks = [b.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1])) for b in blocks]
    routed = found(x, t, None, None, Route(kept, 2, 2)).sample
    extras = 0 if isinstance(model, DiTConfig) else 2
    assert seen == [n + extras for n in tokens_of_blocks(RouteMask(0.5, 2), (8, 8), len(blocks))]
    assert routed.shape == x.shape and not torch.allclose(routed, found(x, t).sample, atol=1e-3)
    for hook in hooks:
        hook.remove()


@both
def test_what_is_deferred_depends_on_every_patch_and_comes_out_for_the_kept(model: Model) -> None:
    found, t = network(model).eval(), torch.tensor(300.0)
    patches = torch.randn(1, 64, 4)
    kept = torch.arange(0, 64, 4)[None]
    output = found(patches, t, None, None, Route(kept, 2, 0)).sample
    assert output.shape == (1, 16, 4)
    other = patches.clone()
    other[:, 1] += 1  # a patch that is dropped, but only after it was mixed in
    assert not torch.allclose(found(other, t, None, None, Route(kept, 2, 0)).sample, output, atol=1e-4)


@both
def test_what_is_decoded_has_not_seen_the_hidden_patches(model: Model) -> None:
    found, t = network(replace(model, mask_token=True)).eval(), torch.tensor(300.0)
    patches, kept = torch.randn(1, 64, 4), torch.arange(0, 64, 2)[None]
    output = found(patches, t, None, None, Route(kept, 0, 2)).sample
    other = patches.clone()
    other[:, 1::2] += 1
    torch.testing.assert_close(found(other, t, None, None, Route(kept, 0, 2)).sample, output)
    assert output.shape == patches.shape
    with torch.no_grad():
        assert found.hidden_token is not None
        found.hidden_token += 1
    assert not torch.allclose(found(patches, t, None, None, Route(kept, 0, 2)).sample, output, atol=1e-3)


@both
def test_the_loss_of_decoding_is_of_the_kept_and_a_little_of_the_others(model: Model) -> None:
    settings = config(replace(model, mask_token=True), DecodeMask(0.5, 2, 0.1))
    found = network(settings.model)
    images = torch.from_numpy(dataset().images[:4].transpose(0, 3, 1, 2).copy())
    draws = draw_step(settings, settings.stages[0].mask, 0, 0, 0, 4, 4, torch.device("cpu"))
    assert draws.route is not None and draws.route.kept is not None
    labels = torch.zeros(4, dtype=torch.int64)
    loss = masked_denoising_loss(found, settings.diffusion, images, labels, draws)
    plain = masked_denoising_loss(found, settings.diffusion, images, labels, replace(draws, route=replace(draws.route, reconstruct=0.0)))
    torch.testing.assert_close(plain.total, plain.errors.mean())
    torch.testing.assert_close(loss.errors, plain.errors)
    x0 = to_model_range(patchify(flip(images, draws.flip), 2))
    noised = add_noise(settings.diffusion, x0, draws.noise, draws.t)
    output = found(noised.x_t, draws.t, drop_labels(labels, draws.drop, 3), None, draws.route).sample
    hidden = torch.ones(4, 64, dtype=torch.bool).scatter(1, draws.route.kept, False)
    torch.testing.assert_close(loss.errors, (output - noised.target)[~hidden].square().reshape(4, -1).mean(dim=1))
    each = noised.x_t[hidden]
    guess = (each - each.mean(dim=1, keepdim=True)) / (each.var(dim=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(loss.total - plain.total, 0.1 * (output[hidden] - guess).square().mean())


@both
def test_the_fusion_joins_what_passed_by_with_what_went_through(model: Model) -> None:
    found, x, t = network(replace(model, fuse=2)).eval(), torch.randn(2, 1, 16, 16), torch.tensor(300.0)
    whole = found(x, t).sample
    torch.testing.assert_close(found(x, t, None, None, Route(None, 2, 2)).sample, whole)
    both = Route(None, 2, 2, torch.tensor([False, True]))
    mixed = found(x, t, None, None, both).sample
    torch.testing.assert_close(mixed[0], whole[0])
    nothing = Route(torch.zeros(2, 0, dtype=torch.int64), 2, 2)
    seen: list[str] = []
    hooks = [
        m.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, m in found.named_modules()
        if type(m).__name__ in ("DiTBlock", "UViTBlock")
    ]
    alone = found(x, t, None, None, nothing).sample  # the outer blocks alone
    torch.testing.assert_close(mixed[1], alone[1])
    assert len(seen) == 4 and not torch.allclose(alone, whole, atol=1e-3)
    for hook in hooks:
        hook.remove()


def test_half_of_those_without_a_label_go_without_the_inner_blocks() -> None:
    settings = config(replace(MODELS[0], fuse=2), NoMask())
    draws = draw_step(settings, NoMask(), 0, 0, 0, 4000, 4000, torch.device("cpu"))
    assert draws.route is not None and draws.route.shallow is not None and draws.route.kept is None
    assert (draws.drop | ~draws.route.shallow).all()
    assert float(draws.route.shallow.float().mean()) == pytest.approx(0.05, abs=0.02) and draws.drop.sum() > 1.5 * draws.route.shallow.sum()


def test_what_is_spread_leaves_as_many_of_all_neighbours() -> None:
    for ratio, each in ((0.25, 3), (0.5, 2), (0.75, 1)):
        route = draw_route(RouteMask(ratio, 2, True), 64, (8, 4), torch.Generator().manual_seed(0))
        assert route is not None and route.kept is not None and (route.kept.diff(dim=1) > 0).all()
        seen = torch.zeros(64, 32).scatter(1, route.kept, 1.0)
        neighbours = seen.reshape(64, 4, 2, 2, 2).sum(dim=(2, 4))
        assert (neighbours == each).all() and (seen.mean(dim=0) > each / 4 - 0.25).all() and (seen.mean(dim=0) < each / 4 + 0.25).all()


@both
def test_reduced_images_have_patches_in_the_middle_of_what_they_cover(model: Model) -> None:
    settings, found = config(model, ReduceMask(2)), network(model).eval()
    images = torch.from_numpy(dataset().images[:4].transpose(0, 3, 1, 2).copy())
    draws = draw_step(settings, ReduceMask(2), 0, 0, 0, 4, 4, torch.device("cpu"))
    assert draws.noise.shape == (4, 16, 4) and draws.reduced == 2
    loss = masked_denoising_loss(found, settings.diffusion, images, None, draws)
    x0 = patchify(torch.nn.functional.avg_pool2d(to_model_range(flip(images, draws.flip)), 2), 2)
    noised = add_noise(settings.diffusion, x0, draws.noise, draws.t)
    output = found(noised.x_t, draws.t, None, reduced=2).sample
    torch.testing.assert_close(loss.errors, (output - noised.target).square().mean(dim=(1, 2)))
    table = torch.arange(64.0)[:, None] + torch.tensor([0.0, 100.0])
    assert found._pooled(table, 2)[0].tolist() == [4.5, 104.5] and found._pooled(table, 2).shape == (16, 2)
    assert torch.equal(found._pooled(table, 1), table)
    order = torch.randperm(16)
    assert not torch.allclose(found(noised.x_t[:, order], draws.t, None, reduced=2).sample, output[:, order], atol=1e-3)


def test_views_are_disjoint_and_hold_all_patches() -> None:
    kept = draw(ViewsMask(4), 8, (8, 8), torch.Generator().manual_seed(0))
    assert kept is not None and kept.shape == (8, 16)
    for image in kept.reshape(2, 64):
        assert sorted(image.tolist()) == list(range(64))
    assert (kept.diff(dim=1) > 0).all() and not torch.equal(kept[:4], kept[4:])


def test_views_are_sequences_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    from maskdm.engine import teaching as module

    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    plain = masked_denoising_loss

    def loss(model: Denoiser, diffusion: Diffusion, images: torch.Tensor, labels: torch.Tensor | None, draws: object, _: object) -> object:
        seen.append((images, labels))
        return plain(model, diffusion, images, labels, draws)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "masked_denoising_loss", loss)
    settings = config(DiTConfig(32, 2, 2, 2), ViewsMask(4))
    run = trainer(replace(settings, stages=(replace(settings.stages[0], accumulate=2),)))
    step = next(run.run())
    assert step.images == run.progress.images == 4 and [len(images) for images, _ in seen] == [8, 8]
    for images, labels in seen:
        assert labels is not None
        for first in (0, 4):
            assert all(torch.equal(images[first], images[first + i]) and labels[first] == labels[first + i] for i in range(4))
    assert not torch.equal(seen[0][0][0], seen[0][0][4])


@both
@pytest.mark.parametrize("mask", FAMILIES)
def test_pieces_change_no_step_and_losses_fall(model: Model, mask: Mask) -> None:
    whole = config(fit(model, mask), mask)
    pieces = replace(whole, stages=(replace(whole.stages[0], accumulate=2),))
    for a, b in zip(trainer(whole).run(), trainer(pieces).run(), strict=True):
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-5)
    longer = replace(whole, stages=(replace(whole.stages[0], budget=Budget(steps=60), lr=3e-3),))
    losses = [float(step.loss) for step in trainer(longer).run()]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


@both
@pytest.mark.parametrize("mask", [NoMask(), BlockMask(0.75, 2), CropMask(4), *FAMILIES])
def test_flops_are_those_that_torch_counts(model: Model, mask: Mask) -> None:
    """Beyond the blocks torch counts embeddings and heads, of images and of time; wide blocks make that little."""
    wide = replace(fit(model, mask), width=256, heads=4, depth=9 if isinstance(model, UViTConfig) else 8)
    settings = config(wide, mask)
    run = trainer(settings, "bf16")  # whose attention is products that torch counts
    with FlopCounterMode(display=False) as counter:
        next(run.run())
    counted, said = counter.get_total_flops(), flops(settings, mask, 4)
    assert said == pytest.approx(counted, rel=0.02)


def test_ideal_speed_ups_follow_from_the_blocks() -> None:
    settings = config(DiTConfig(32, 6, 2, 2), NoMask())
    n, d = 64, 32
    assert ideal_speedup(settings, PatchMask(0.75)) == pytest.approx(4 * (6 * d + n) / (6 * d + n / 4))
    route = (n * (6 * d + n) * 6) / (n * (6 * d + n) * 4 + n / 2 * (6 * d + n / 2) * 2)
    assert ideal_speedup(settings, RouteMask(0.5, 2)) == pytest.approx(route)
    assert ideal_speedup(settings, ViewsMask(4)) == pytest.approx((6 * d + n) / (6 * d + n / 4))
    assert [tokens_per_image(settings, mask) for mask in FAMILIES] == [16, 64, 64, 64, 64, 32, 16]
    assert len({describe_mask(mask) for mask in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize(
    ("mask", "fuse", "message"),
    [
        (RouteMask(0.5, 3), 0, "leaves no inner block"),
        (DeferMask(0.5, 6), 0, "leaves no other block"),
        (RouteMask(0.001, 1), 0, "spares nothing"),
        (RouteMask(0.5, 1), 2, "mask.edge 1 is not model.fuse 2"),
        (DeferMask(0.5), 2, "does not go with model.fuse"),
        (DecodeMask(0.5), 0, "add --model.mask_token true"),
    ],
)
def test_masks_that_cannot_be_are_named(mask: Mask, fuse: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(DiTConfig(32, 6, 2, 2, fuse=fuse), mask).check()
    with pytest.raises(UserError, match="odd grid"):
        replace(config(DiTConfig(32, 6, 2, 2), RouteMask(0.5, 2, True)), data=Data("made up", (18, 16), channels=1)).check()
    with pytest.raises(UserError, match="factor 3 does not divide the grid of 8 x 8"):
        config(DiTConfig(32, 6, 2, 2), ReduceMask(3)).check()
    with pytest.raises(UserError, match="leaves no other block"):
        config(DiTConfig(32, 6, 2, 2, mask_token=True), DecodeMask(0.5, 6)).check()


def test_put_back_is_the_inverse_of_take() -> None:
    x, kept = torch.randn(2, 9, 3), torch.tensor([[0, 4, 8], [1, 2, 3]])
    assert torch.equal(put_back(take(x, kept), kept, x), x)
    assert torch.equal(take(put_back(torch.zeros(2, 3, 3), kept, x), kept), torch.zeros(2, 3, 3))
