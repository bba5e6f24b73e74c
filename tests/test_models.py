from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import maskdm
from maskdm.config import SHORTHANDS, Data, UViTConfig
from maskdm.models import Denoiser, DiT, UViT, build, layers, patchify, unpatchify
from maskdm.models.layers import RMSNorm, RotaryPositions, attend, rotate


def make(kind: type[UViT] | type[DiT], size: int | tuple[int, int] = 8, classes: int = 10) -> Denoiser:
    torch.manual_seed(0)
    model = kind(size, 1, 2, width=32, depth=5, heads=4, num_classes=classes)
    for parameter in model.parameters():  # adaLN-zero would hide everything behind zeros
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


both = pytest.mark.parametrize("kind", [UViT, DiT])


@pytest.mark.parametrize(
    ("name", "side", "count"),
    # summed by hand in docs/equations.md; MASKDM.md rounds them to 44.3 M, 46.3 M and 102.4 M
    [("uvit-s", 64, 44_292_144), ("uvit-s", 256, 46_258_224), ("uvit-b", 256, 102_417_456)],
)
def test_parameters_are_the_papers(name: str, side: int, count: int) -> None:
    config = SHORTHANDS[name]
    assert isinstance(config, UViTConfig)
    with torch.device("meta"):
        model = build(config, Data("x", (side, side)), 0)
    assert sum(p.numel() for p in model.parameters()) == count


def test_blocks_built() -> None:
    for depth, blocks in ((13, 13), (12, 13), (16, 17)):
        model = UViT(8, 1, 2, width=8, depth=depth, heads=2)
        assert len(model.down_blocks) + 1 + len(model.up_blocks) == blocks


def test_patchify_round_trip_and_order() -> None:
    images = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[0, 1].reshape(3, 2, 2), images[0, :, 0:2, 2:4])  # row-major, the second patch of the first row
    assert torch.equal(unpatchify(patches, 2, (4, 6)), images)


@both
@pytest.mark.parametrize("size", [8, (8, 12)])
def test_all_patches_kept_in_order_is_the_whole_image(kind: type[UViT] | type[DiT], size: int | tuple[int, int]) -> None:
    model = make(kind, size)
    x, t, labels = torch.randn(3, 1, *model.size), torch.tensor([1.0, 500.0, 999.0]), torch.tensor([0, 5, 10])
    whole = model(x, t, labels).sample
    every = torch.arange(model.grid[0] * model.grid[1]).expand(3, -1)
    kept = model(patchify(x, 2), t, labels, every).sample
    assert torch.equal(patchify(whole, 2), kept)


@both
def test_a_masked_network_sees_where_its_patches_sit_and_nothing_else(kind: type[UViT] | type[DiT]) -> None:
    model = make(kind)
    patches, t = torch.randn(2, 5, 4), torch.tensor([300.0, 300.0])
    kept = torch.tensor([[0, 3, 6, 9, 12], [0, 3, 6, 9, 12]])
    out = model(patches, t, None, kept).sample
    assert out.shape == (2, 5, 4)
    moved = model(patches, t, None, kept + 1).sample
    assert (out - moved).abs().max() > 1e-3
    order = torch.tensor([4, 2, 0, 1, 3])  # a set: the order of the tokens carries nothing
    torch.testing.assert_close(model(patches[:, order], t, None, kept[:, order]).sample, out[:, order], atol=1e-5, rtol=1e-4)


@both
def test_time_and_class_matter_and_no_class_is_the_null_class(kind: type[UViT] | type[DiT]) -> None:
    model = make(kind)
    x = torch.randn(2, 1, 8, 8)
    a = model(x, 10, torch.tensor([1, 1])).sample
    assert (a - model(x, 900, torch.tensor([1, 1])).sample).abs().max() > 1e-3
    assert (a - model(x, 10, torch.tensor([2, 2])).sample).abs().max() > 1e-4
    assert torch.equal(model(x, 10, None).sample, model(x, 10, torch.tensor([10, 10])).sample)


@both
def test_save_and_load(kind: type[UViT] | type[DiT], tmp_path: Path) -> None:
    model = make(kind, (8, 12))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = kind.from_pretrained(tmp_path)
    x = torch.randn(2, 1, 8, 12)
    assert torch.equal(model(x, 7).sample, again.eval()(x, 7).sample)


@both
def test_recomputing_activations_changes_no_gradient(kind: type[UViT] | type[DiT]) -> None:
    model = make(kind).train()
    x = torch.randn(2, 1, 8, 8)
    gradients: list[torch.Tensor] = []
    for recompute in ("off", "selective", "all"):
        model.recompute(recompute)
        model.zero_grad()
        model(x, 300).sample.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@both
def test_recomputing_all_repeats_the_products_and_selective_only_the_rest(kind: type[UViT] | type[DiT]) -> None:
    model, inputs = make(kind).train(), torch.randn(2, 1, 8, 8)

    def run(what: Literal["off", "selective", "all"]) -> tuple[int, int]:
        """Matrix products, and other operations, of both passes."""
        model.recompute(what)
        ran: list[str] = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                ran.append(func.overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        with Count():
            model(inputs, 300).sample.square().mean().backward()
        products = [name for name in ran if name in ("mm", "addmm", "bmm")]
        return len(products), len(ran) - len(products)

    none, selective, everything = run("off"), run("selective"), run("all")
    assert none[0] == selective[0] < everything[0]
    assert none[1] < selective[1]


@both
def test_every_parameter_is_trained(kind: type[UViT] | type[DiT]) -> None:
    model = make(kind).train()
    model(torch.randn(4, 1, 8, 8), 300, torch.arange(4)).sample.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_embeddings_and_positions_are_not_decayed() -> None:
    assert make(UViT).undecayed() == {"positions.weight", "class_embedding.weight"}
    assert make(DiT).undecayed() == {"class_embedding.weight"}


def test_rotation_keeps_length_and_depends_on_distance_alone() -> None:
    rotary = RotaryPositions(8, (4, 4))
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(a: int, b: int) -> float:
        turned = [rotate(x, rotary(torch.tensor([[i]]))) for x, i in ((q, a), (k, b))]
        torch.testing.assert_close(turned[0].norm(), q.norm())
        return float((turned[0] * turned[1]).sum())

    assert score(0, 5) == pytest.approx(score(5, 10), abs=1e-5)  # one down and one across, both times
    assert score(0, 5) != pytest.approx(score(0, 1), abs=1e-4)


def test_the_gradient_of_a_rotation() -> None:
    turn = RotaryPositions(8, (3, 3))(torch.tensor([[0, 2, 4, 8], [1, 3, 5, 7]]))
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, turn), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_root_mean_square_is_torchs_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mine, theirs = ((3 * torch.randn(4, 6, 32, dtype=dtype)).requires_grad_() for _ in range(2))
    theirs.data.copy_(mine.data)
    got, expected = RMSNorm(32)(mine), torch.nn.functional.rms_norm(theirs.float(), (32,), None, 1e-6)
    loose = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got.float(), expected, **loose)
    weight = torch.randn(4, 6, 32)
    (got.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    torch.testing.assert_close(mine.grad.float(), theirs.grad.float(), **loose)


@pytest.mark.parametrize(("tokens", "most"), [(1, None), (17, None), (63, None), (64, None), (130, None), (130, 6 * 130**2 - 1)])
def test_attention_in_bf16_is_the_exact_one_and_so_is_its_gradient(tokens: int, most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if most is not None:  # too many scores to keep
        monkeypatch.setattr(layers, "MOST_SCORES", most)
        monkeypatch.setattr(torch.Tensor, "softmax", lambda *_, **__: pytest.fail("kept all scores"))
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, tokens, 16, requires_grad=True) for _ in range(3)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected, got = torch.nn.functional.scaled_dot_product_attention(*exact), attend(*rounded)
    assert got.dtype == torch.bfloat16 and got.shape == expected.shape
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.02)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    for mine, theirs in zip(rounded, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        difference = (mine.grad.float() - theirs.grad).square().mean().sqrt() / theirs.grad.square().mean().sqrt().clamp(min=1e-6)
        assert difference < 0.02 or theirs.grad.abs().max() < 1e-5  # of one token, queries and keys have no gradient


@both
@pytest.mark.parametrize("keep", [16, 5])
def test_half_precision_stays_near_the_full_one(kind: type[UViT] | type[DiT], keep: int) -> None:
    model, x, kept = make(kind), torch.randn(4, keep, 4), torch.arange(16).expand(4, -1)[:, :keep]
    arguments = torch.tensor([3.0, 200.0, 500.0, 999.0]), torch.arange(4), kept
    with torch.no_grad():
        exact = model(x, *arguments).sample
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x, *arguments).sample
    assert (rounded.float() - exact).square().mean().sqrt() < 0.02 * exact.std()


def test_the_classes_of_a_saved_pipeline_are_found() -> None:
    assert maskdm.UViT is UViT and maskdm.DiT is DiT
    with pytest.raises(AttributeError, match="no attribute 'UVit'"):
        _ = maskdm.UVit
