"""Muon: which weights it takes, the size of its steps, and that a run with it stops and goes on as one with AdamW does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskdm.config import Budget, Config, NoMask, Optimizer, PatchMask, Stage
from maskdm.data import Dataset, Loader, open_source, prepare
from maskdm.engine import Trainer, make_optimizer
from maskdm.engine.muon import Muon, orthogonalised
from maskdm.errors import UserError
from maskdm.models import DiT, UViT, build
from maskdm.recipes import recipe
from maskdm.settings import override

CPU = torch.device("cpu")
MUON = Optimizer(name="muon", muon=3.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = recipe("digits", "digits")
    return prepare(open_source("digits"), config.data, tmp_path_factory.mktemp("cache"), None)


def config() -> Config:
    base = override(recipe("digits", "digits"), [("model", "{kind: dit, width: 16, depth: 2, heads: 2, patch: 2}")])
    stages = (Stage("one", Budget(steps=3), PatchMask(0.5), batch=4, lr=1e-2), Stage("two", Budget(steps=3), NoMask(), batch=4, lr=1e-2))
    return replace(base, optimizer=MUON, stages=stages)


def trainer(settings: Config, dataset: Dataset) -> Trainer:
    indices, _ = dataset.split(settings.data.heldout, settings.seed)
    torch.manual_seed(0)
    return Trainer(settings, Loader(dataset, indices, settings.seed), build(settings.model, settings.data, 10), CPU, "fp32")


@pytest.mark.parametrize(
    "model", [UViT(8, 1, 2, 32, 3, 2, num_classes=10, fuse=1), DiT(8, 1, 2, 32, 2, 2, num_classes=10)], ids=["uvit", "dit"]
)
def test_it_takes_the_matrices_of_the_blocks(model: UViT | DiT) -> None:
    names = {p: name for name, p in model.named_parameters()}
    *_, matrices = make_optimizer(model, MUON, 1e-3).param_groups
    taken = {names[p] for p in matrices["params"]}
    assert taken == model.hidden_matrices() and all(names[p].endswith("weight") and p.ndim == 2 for p in matrices["params"])
    assert all("blocks" in name for name in taken) and not any("modulation" in name or "embedding" in name for name in taken)
    every = [p for group in make_optimizer(model, MUON, 1e-3).param_groups for p in group["params"]]
    assert len(every) == len(set(every)) == len(names)


def test_its_arithmetic_is_what_torch_counts() -> None:
    optimizer = make_optimizer(DiT(8, 1, 2, 32, 2, 2), MUON, 1e-3)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert optimizer.flops == counter.get_total_flops() > 0
    assert make_optimizer(DiT(8, 1, 2, 32, 2, 2), Optimizer(), 1e-3).flops == 0


def test_weights_that_stand_still_elsewhere_do_not_keep_it_from_the_blocks() -> None:
    """A table of positions that is not learned, as MaskDiT has it; adapters, whose blocks stand still, are AdamW's."""
    model = UViT(8, 1, 2, 32, 3, 2)
    model.positions.weight.requires_grad_(False)
    assert make_optimizer(model, MUON, 1e-3).flops > 0
    for name, p in model.named_parameters():
        p.requires_grad_(name not in model.hidden_matrices())
    assert make_optimizer(model, MUON, 1e-3).flops == 0


def test_a_step_has_the_stated_size_and_no_direction_is_longer() -> None:
    model = DiT(8, 1, 2, 32, 2, 2)
    optimizer = make_optimizer(model, replace(MUON, weight_decay=0.0), 1.0)
    optimizer.set_rate(1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    for name, p in model.named_parameters():
        if name in model.hidden_matrices():
            values = torch.linalg.svdvals((p.detach() - before[name]).float())
            expected = 1e-3 * 3.0 * 0.2 * max(p.shape) ** 0.5
            assert 0.5 * expected < values.min() and values.max() < 1.3 * expected, name
        else:  # AdamW's first step is of the rate's size
            assert (p.detach() - before[name]).abs().mean() == pytest.approx(1e-3, rel=0.01), name


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_it_computes_in_bf16_only_where_the_device_does(bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskdm.engine.muon.multiplies_bf16", lambda kind: bf16)
    wide = orthogonalised(torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0)))
    assert wide.dtype == dtype
    values = torch.linalg.svdvals(wide.float())
    assert values.min() > 0.6 and values.max() < 1.3


def test_it_is_the_one_of_torch() -> None:
    torch.manual_seed(0)
    model = DiT(8, 1, 2, 32, 2, 2)
    theirs = [torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if name in model.hidden_matrices()]
    ours = [p for name, p in model.named_parameters() if name in model.hidden_matrices()]
    torchs = torch.optim.Muon(theirs, lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    mine = Muon([{"params": ours, "weight_decay": 0.1}], 3e-3)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        torchs.step()
        mine.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-4), (a - b).abs().max()  # bf16 within


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_interrupted_and_resumed_equals_undisturbed_bit_for_bit(stop: int, dataset: Dataset) -> None:
    whole = trainer(config(), dataset)
    list(whole.run())
    first = trainer(config(), dataset)
    loop = first.run()
    for _ in range(stop):
        next(loop)
    tensors = {file: {name: value.clone() for name, value in group.items()} for file, group in first.tensors().items()}
    assert any(name.startswith("momentum_buffer/") for name in tensors["optimizer"])
    second = trainer(config(), dataset)
    second.restore(tensors, first.numbers())
    list(second.run())
    for file, group in whole.tensors().items():
        assert all(torch.equal(value, second.tensors()[file][name]) for name, value in group.items()), file


def test_a_bad_step_changes_nothing(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(config(), dataset)
    loop = run.run()
    next(loop)
    gradients = Trainer._gradients
    monkeypatch.setattr(Trainer, "_gradients", lambda self, *given: gradients(self, *given) * torch.nan)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    moments = {name: value.clone() for name, value in run.tensors()["optimizer"].items()}
    assert next(loop).bad
    assert all(torch.equal(before[name], p) for name, p in run.model.named_parameters())
    assert all(torch.equal(moments[name], value) for name, value in run.tensors()["optimizer"].items())


def test_it_does_not_go_with_cut_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="whole matrices"):
        override(config(), [("hardware.shard", "true")]).check()
