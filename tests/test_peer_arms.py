"""Other people's networks as arms of a comparison. Those whose code lies elsewhere are skipped by name: $MASKDM_PEERS is where it lies."""

from __future__ import annotations

import copy
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import compare, sizes
from benchmarks.peers.adapters import Shape
from benchmarks.peers.arms import PEERS, parse_peers
from benchmarks.peers.networks import Authors, MaskDiT, PeerDenoiser, UNet, UViT
from maskdm.arithmetic import flops
from maskdm.config import DecodeMask, NoMask, PatchMask
from maskdm.data import to_model_range
from maskdm.diffusion import add_noise, alpha_sigma
from maskdm.draws import draw_step
from maskdm.engine import Trainer, make_optimizer
from maskdm.errors import UserError
from maskdm.masking import take
from maskdm.models import build, patchify, unpatchify
from maskdm.objective import masked_denoising_loss
from maskdm.recipes import recipe
from maskdm.runs.contestant import Contestant

SMALL = [
    *("--width", "32", "--depth", "2", "--heads", "2", "--num", "20", "--sampling.steps", "2", "--seeds", "1"),
    *("--pretrain.batch", "16", "--finetune.batch", "16", "--pretrain.warmup", "1", "--threads", "1"),
]
SHAPE = Shape(8, 2, 32, 3, 2, channels=1, classes=10)
BASE = recipe("digits", "digits")


def clone(name: str) -> Path:
    """Where a peer's code lies, as `owner+name` or `name`; its test is skipped where it does not."""
    repository = PEERS[name].repository or ""
    folder = Path(os.environ.get("MASKDM_PEERS", "none"))
    pytest.importorskip("einops")
    for path in (folder / repository.replace("/", "+"), folder / repository.partition("/")[2]):
        if path.is_dir():
            return path
    pytest.skip(f"no clone of {repository} in $MASKDM_PEERS")


def command(out: Path) -> list[str]:
    arms = ["--arms", "whole", "--peers", "unet"]
    return ["digits", "--recipe", "digits", "--budget", "320images", "--out", str(out), *SMALL, *arms]


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = importlib.import_module("maskdm.runs.compare")
    monkeypatch.setattr(runs, "SLICES", 4)
    monkeypatch.setattr(runs, "MEASURED", 32)
    monkeypatch.setattr(runs, "FINAL", 32)


@pytest.mark.usefixtures("_short")
@pytest.mark.slow
def test_a_peer_is_trained_and_measured_as_our_arm_is_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped, real, left = tmp_path / "a", tmp_path / "b", Contestant.advance, 6
    assert compare.run_command(command(whole)) == 0
    found = json.loads((whole / "compare.json").read_text())
    ours, its = found["arms"]["whole"], found["arms"]["unet"]
    assert ours["images"] == its["images"] == 320 and its["time"] > 0
    assert {"loss", "distance", "precision", "recall"} <= set(its) and found["verdicts"][0]["arm"] == "unet"
    network = found["networks"]["unet"]
    assert network["source"] == "diffusers" and network["matched"] == "flops"
    assert its["flops"] == 320 * network["flops"]["its"]  # as counted, not by the formula of our networks
    assert json.loads((whole / "request.json").read_text())["arms"]["unet"]["network"] == network
    (stage,) = its["stages"]
    assert stage["speedup"] == stage["ideal_speedup"] == 1  # beside itself, not beside our whole images

    def advance(self: Contestant, trainer: Trainer, unit: str, until: float, stop: list[str], loss: Any) -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            real(self, trainer, unit, until - 16, stop, loss)  # in the midst of a turn
            stop.append("SIGTERM")
        return real(self, trainer, unit, until, stop, loss)

    monkeypatch.setattr(Contestant, "advance", advance)
    assert compare.run_command(command(stopped)) == 130
    assert compare.run_command(command(stopped)) == 0
    again = json.loads((stopped / "compare.json").read_text())
    for name in ("whole", "unet"):
        assert [r["loss"] for r in again["curves"][name][0]] == [r["loss"] for r in found["curves"][name][0]]


def small(name: str) -> PeerDenoiser:
    """A peer at the size of SHAPE, no output of which is nothing."""
    torch.manual_seed(0)
    peer: dict[str, type[Any]] = {"unet": UNet, "uvit": UViT, "authors": Authors, "maskdit": MaskDiT}
    model = peer[name](None if name == "unet" else clone(name), SHAPE, BASE.diffusion)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([0.0, 400.5, 999.0]), torch.tensor([0, 9, 10])


@pytest.mark.parametrize("name", PEERS)
def test_the_contract_of_a_denoiser(name: str) -> None:
    model, (images, t, labels) = small(name), inputs()
    whole = model(images, t, labels).sample
    assert whole.shape == images.shape and whole.std() > 1e-4
    torch.testing.assert_close(model(patchify(images, 2), t, labels).sample, patchify(whole, 2))
    torch.testing.assert_close(model(images, t).sample, model(images, t, torch.tensor([10, 10, 10])).sample)
    assert not torch.equal(whole[0], model(images, t).sample[0])
    torch.testing.assert_close(copy.deepcopy(model).eval()(images, t, labels).sample, whole)
    names = dict(model.named_parameters())
    assert model.undecayed() <= set(names) and len(make_optimizer(model, BASE.optimizer, 1e-3).param_groups) == 2
    assert {key for key in names if key.endswith("pos_embed") and names[key].requires_grad} <= model.undecayed()
    with pytest.raises(UserError, match="checkpoint_activations"):
        model.recompute("all")


def test_the_authors_network_sees_kept_patches_alone() -> None:
    model, (images, t, labels) = small("authors"), inputs()
    patches = patchify(images, 2)
    every = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(model(patches, t, labels, kept=every).sample, model(patches, t, labels).sample)
    kept = torch.tensor([[0, 3, 5, 9]]).expand(3, -1)
    bare = model.network(
        images, t, mask=torch.ones(3, 18, dtype=torch.bool).index_fill(1, torch.tensor([0, 1, 2, 5, 7, 11]), False), y=labels
    )
    ours = model(take(patches, kept), t, labels, kept=kept).sample
    torch.testing.assert_close(ours, bare)  # of one channel the order within a patch is the same


def test_masked_training_of_maskdit_has_the_loss_of_its_paper() -> None:
    """arXiv 2306.09305, section 3.4: the error on visible patches, and 0.1 times that of the image's hidden ones, normalised."""
    model = small("maskdit")
    images, labels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 2, 3])
    draws = draw_step(BASE, DecodeMask(0.5, 1), 0, 0, 0, 4, 4, torch.device("cpu"))
    loss = masked_denoising_loss(model, BASE.diffusion, images, labels, draws).total
    assert draws.route is not None and draws.route.kept is not None
    noised = add_noise(BASE.diffusion, patchify(to_model_range(images), 2), draws.noise, draws.t)
    dropped = torch.where(draws.drop, 10, labels)
    output = model(noised.x_t, draws.t, dropped, route=draws.route).sample
    visible = torch.zeros(4, 16).scatter(1, draws.route.kept, 1.0)
    order = torch.stack([torch.cat([row.nonzero()[:, 0], (1 - row).nonzero()[:, 0]]) for row in visible])
    mask = {"mask": 1 - visible, "ids_keep": order[:, :8], "ids_restore": order.argsort(dim=1)}
    one_hot = torch.eye(11)[dropped, :10]
    x = noised.x_t
    normal = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 1e-6).sqrt()
    denoise = ((output - noised.target).square().mean(2) * visible).sum() / visible.sum()
    alpha, sigma = (each[:, None, None] for each in alpha_sigma(BASE.diffusion.schedule, draws.t))
    bare = patchify(model.network(unpatchify(x, 2, (8, 8)), draws.t, one_hot, mask_ratio=0.5, mask_dict=mask)["x"], 2)
    torch.testing.assert_close(output, torch.where(visible.bool()[..., None], bare, alpha * x - sigma * bare))
    rebuild = ((output - normal).square().mean(2) * (1 - visible)).sum() / (1 - visible).sum()
    torch.testing.assert_close(loss, denoise + 0.1 * rebuild)


@pytest.mark.parametrize("name", ["authors", "uvit", "maskdit"])
def test_an_arm_from_a_clone_is_about_as_large_as_ours_and_says_whence(name: str) -> None:
    (arm,) = parse_peers(name, {name: clone(name)}, BASE)
    assert arm.network is not None
    record = json.loads(json.dumps(arm.record()))["network"]
    assert record["source"].endswith(str(PEERS[name].repository)) and len(record["commit"]) == 40 and len(record["sha256"]) == 64
    assert record["flops"]["its"] == pytest.approx(record["flops"]["ours"], rel=0.2)
    assert set(arm.network.flops) == {NoMask(), *(stage.mask for stage in arm.stages)}
    masks = [stage.mask for stage in arm.stages if not isinstance(stage.mask, NoMask)]
    assert all(arm.network.flops[mask] < 0.7 * arm.network.flops[NoMask()] for mask in masks)
    assert len(masks) == (name != "uvit") and "matched by flops" in arm.describe()
    assert arm.network.build(10).num_classes == 10


def test_both_ways_to_match_a_size() -> None:
    first, second = parse_peers("unet,unet@parameters", {}, BASE)
    assert first.name == "unet" and second.name == "unet@parameters" and first.network is not None and second.network is not None
    by_work, by_size = first.network.record, second.network.record
    assert by_size["parameters"]["its"] == pytest.approx(by_size["parameters"]["ours"], rel=0.3) and by_size["width"] > by_work["width"]
    assert by_work["flops"]["its"] == pytest.approx(by_work["flops"]["ours"], rel=0.5)


def test_the_count_of_flops_is_that_of_our_formula() -> None:
    model = build(BASE.model, BASE.data, 10)
    for mask in (NoMask(), PatchMask(0.5)):
        assert sizes.work(model, mask) == pytest.approx(flops(BASE, mask, 1), rel=0.03)


def test_the_nearest_size() -> None:
    assert [sizes.nearest((1, 2, 4, 8), float, wanted) for wanted in (0.1, 2.5, 3.1, 100.0)] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uvit", "peer uvit needs its code: git clone https://github.com/baofff/U-ViT"),
        ("uvitt", "did you mean|is no peer"),
        ("unet@size", "is no peer"),
        ("unet=patch-50", "unet knows no mask patch; give it one of none"),
        ("maskdit=patch-50", "maskdit knows no mask patch; give it one of none, decode"),
        ("unet=a=whole/init=runs/x", "leave /init out"),
    ],
)
def test_what_cannot_be_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_peers(text, {}, BASE)


def test_a_folder_that_is_no_clone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "digits",
        "--recipe",
        "digits",
        "--budget",
        "1s",
        "--out",
        str(tmp_path / "c"),
        *SMALL,
        "--peers",
        "uvit",
        "--uvit",
        str(tmp_path),
    ]
    assert compare.run_command(line) == 2
    assert f"--uvit {tmp_path} holds no libs/uvit.py; git clone https://github.com/baofff/U-ViT" in capsys.readouterr().err
