from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdm.config import Budget, Config, DiTConfig, Ema, Hardware, Model, Optimizer, PatchMask, Stage, UViTConfig
from maskdm.data import Dataset, Loader, open_source, prepare
from maskdm.engine import Average, Trainer, checkpoint, learning_rate, make_optimizer, more_pieces, transfer
from maskdm.errors import UserError
from maskdm.models import DiT, UViT, build
from maskdm.recipes import recipe

CPU = torch.device("cpu")
UVIT, DIT = UViTConfig(width=32, depth=3, heads=2, patch=2), DiTConfig(width=32, depth=2, heads=2, patch=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(open_source("digits"), recipe("digits", "digits").data, tmp_path_factory.mktemp("cache"), None)


def config(model: Model = UVIT, first: int = 5, second: int = 4) -> Config:
    base = recipe("digits", "digits")
    return replace(
        base,
        model=model,
        stages=(
            Stage("pretrain", Budget(steps=first), PatchMask(0.5), batch=12, accumulate=3, lr=1e-3, warmup=3),
            Stage("finetune", Budget(steps=second), batch=8, accumulate=2, lr=5e-4, decay="cosine", start_from="ema"),
        ),
    )


def trainer(settings: Config, dataset: Dataset) -> Trainer:
    torch.manual_seed(0)
    indices, _ = dataset.split(0.2, 0)
    return Trainer(settings, Loader(dataset, indices, settings.seed), build(settings.model, settings.data, 10), CPU, "fp32")


def flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{file}/{name}": value for file, group in state.items() for name, value in group.items()}


def steps(run: Iterator[Any], count: int) -> list[Any]:
    return [next(run) for _ in range(count)]


# --- ended early, and resumed ---


def test_only_the_last_stage_and_only_under_other_terms_goes_on_where_it_was_ended(dataset: Dataset) -> None:
    first = trainer(config(), dataset)
    run = first.run()
    steps(run, 2)
    first.end_stage()
    steps(run, 2)
    first.end_stage()
    patient = replace(config(), evaluation=replace(config().evaluation, patience=3))
    older = first.numbers()
    for stage in older["progress"]["stages"]:
        del stage["terms"]
    for settings, numbers, expected in (
        (config(), first.numbers(), (2, 2)),
        (patient, first.numbers(), (2, 4)),
        (config(second=3), first.numbers(), (2, 3)),
        (config(first=9), first.numbers(), (2, 2)),
        (config(second=3), older, (2, 2)),
    ):
        second = trainer(settings, dataset)
        second.restore(first.tensors(), numbers)
        list(second.run())
        assert tuple(stage.steps for stage in second.progress.stages) == expected


# --- exact resume ---


@pytest.mark.parametrize("model", [UVIT, DIT])
@pytest.mark.parametrize("stop", [1, 3, 5, 6, 8])
def test_interrupted_and_resumed_equals_undisturbed_bit_for_bit(model: Model, stop: int, dataset: Dataset, tmp_path: Path) -> None:
    undisturbed = trainer(config(model), dataset)
    losses = [step.loss for step in undisturbed.run()]

    first = trainer(config(model), dataset)
    seen = [step.loss for step in steps(first.run(), stop)]
    path = checkpoint.save(tmp_path, "step-1", first.tensors(), first.numbers())

    torch.manual_seed(99)  # a new process: other weights, other generator state
    second = trainer(config(model), dataset)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(1.0)
    saved = checkpoint.load(path)
    second.restore(saved.tensors, saved.numbers)
    seen += [step.loss for step in second.run()]

    assert [float(x) for x in seen] == [float(x) for x in losses]
    expected, got = flat(undisturbed.tensors()), flat(second.tensors())
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert undisturbed.progress.images == second.progress.images == 5 * 12 + 4 * 8
    for part in ("optimizer/exp_avg_sq/", "powers/0.05/", "powers/0.1/"):
        assert any(name.startswith(part) for name in expected)
    assert undisturbed.numbers()["powers"] == second.numbers()["powers"] == {"sigma_rel": [0.05, 0.1], "time": 4, "began": 5}


def test_another_seed_is_another_run(dataset: Dataset) -> None:
    one, other = trainer(config(), dataset), trainer(replace(config(), seed=1), dataset)
    assert [float(s.loss) for s in steps(one.run(), 2)] != [float(s.loss) for s in steps(other.run(), 2)]


def test_a_batch_in_pieces_is_the_batch_at_once(dataset: Dataset) -> None:
    whole = config()
    whole = replace(whole, stages=tuple(replace(stage, accumulate=1) for stage in whole.stages))
    pieces, once = trainer(config(), dataset), trainer(whole, dataset)
    for a, b in zip(steps(pieces.run(), 5), steps(once.run(), 5), strict=True):
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_halves_the_pieces_and_changes_no_step(
    error: Exception, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(config(), stages=tuple(replace(stage, accumulate=1) for stage in config().stages))
    pieces = (4, 4)  # of 12 and of 8 images
    in_pieces = replace(config(), stages=tuple(replace(s, accumulate=n) for s, n in zip(config().stages, pieces, strict=True)))
    expected = trainer(in_pieces, dataset)
    list(expected.run())
    cramped = trainer(asked, dataset)
    plain, calls = UViT.denoise, 0

    def denoise(self: UViT, patches: Tensor, *rest: Any) -> Tensor:
        """Memory lasts for a first piece of six, so that the failure leaves gradients behind, but for no second one."""
        nonlocal calls
        calls += 1
        if len(patches) > 6 or (len(patches) > 3 and calls % 2):
            raise error
        return plain(self, patches, *rest)

    monkeypatch.setattr(UViT, "denoise", denoise)
    assert [step.pieces for step in cramped.run()] == [4] * 5 + [4] * 4
    assert all(torch.equal(flat(expected.tensors())[name], value) for name, value in flat(cramped.tensors()).items())


def test_pieces_are_of_equal_size() -> None:
    assert [more_pieces(12, n) for n in (1, 2, 3, 4, 6, 12)] == [2, 4, 6, 12, 12, 12]
    assert [more_pieces(100, n) for n in (1, 2, 4)] == [2, 4, 10] and more_pieces(7, 1) == 7 and more_pieces(1, 1) == 1


def test_another_accumulate_holds_from_where_a_run_goes_on(dataset: Dataset) -> None:
    first = trainer(config(), dataset)
    steps(first.run(), 2)
    asked = replace(config(), stages=tuple(replace(stage, accumulate=4) for stage in config().stages))
    second = trainer(asked, dataset)
    second.restore(first.tensors(), first.numbers())
    assert next(second.run()).pieces == 4


def test_memory_too_small_for_one_image_is_an_error(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def denoise(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UViT, "denoise", denoise)
    with pytest.raises(torch.OutOfMemoryError):
        next(trainer(config(), dataset).run())


def test_other_errors_are_not_taken_for_memory(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def denoise(*_: Any) -> Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(UViT, "denoise", denoise)
    with pytest.raises(RuntimeError, match="shapes"):
        next(trainer(config(), dataset).run())


def test_recomputing_activations_and_bf16_train_too(dataset: Dataset) -> None:
    plain = [float(s.loss) for s in trainer(config(), dataset).run()]
    for what in ("selective", "all"):
        recompute = replace(config(), hardware=Hardware(checkpoint_activations=what))
        assert [float(s.loss) for s in trainer(recompute, dataset).run()] == plain
    half = trainer(config(), dataset)
    half.precision = "bf16"
    losses = [float(s.loss) for s in half.run()]
    assert losses != plain and losses == pytest.approx(plain, rel=0.05)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}  # master weights stay fp32


def test_training_lowers_the_loss(dataset: Dataset) -> None:
    losses = [float(s.loss) for s in trainer(config(DIT, first=150, second=1), dataset).run()]
    assert np.mean(losses[120:150]) < 0.75 * np.mean(losses[:10])


# --- stages ---


def test_stages_hand_over_weights_raw_or_averaged(dataset: Dataset) -> None:
    for start in ("raw", "ema"):
        settings = config()
        settings = replace(settings, ema=Ema(0.9, warmup=False), stages=(settings.stages[0], replace(settings.stages[1], start_from=start)))
        run = trainer(settings, dataset)
        steps(run.run(), 5)
        raw, average = flat({"m": run.model.state_dict()}), flat({"m": run.average.model.state_dict()})
        expected = {name: value.clone() for name, value in (raw if start == "raw" else average).items()}
        run._enter(settings.stages[1])
        got = flat({"m": run.model.state_dict()})
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), run.average.model.parameters(), strict=True))
        assert not run.optimizer.state


def test_a_stage_ends_at_the_first_of_its_limits(dataset: Dataset) -> None:
    for budget, count in ((Budget(steps=3, images=100), 3), (Budget(steps=9, images=20), 2), (Budget(minutes=1e-9, steps=50), 1)):
        settings = replace(config(), stages=(Stage("only", budget, batch=10),))
        done = list(trainer(settings, dataset).run())
        assert len(done) == count
        assert [s.ends_stage for s in done] == [False] * (count - 1) + [True]


def test_learning_rate_warms_up_and_decays() -> None:
    stage = Stage("s", Budget(steps=100), lr=2.0, warmup=4, decay="constant")
    assert [learning_rate(stage, i, i / 100) for i in (0, 1, 3, 50)] == [0.5, 1.0, 2.0, 2.0]
    assert learning_rate(replace(stage, decay="linear"), 50, 0.5) == 1.0
    long = replace(stage, warmup=1000)  # a tenth of the budget at most
    assert [learning_rate(long, i, i / 100) for i in (1, 5, 10, 60)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert learning_rate(replace(stage, decay="cosine", warmup=0), 25, 0.25) == pytest.approx(1 + math.cos(math.pi / 4))


def test_average_is_the_exponential_one() -> None:
    model = build(UVIT, config().data, 0)
    average = Average(model, Ema(0.9, warmup=False))
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(model, step)
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for got, want in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert [Average(model, Ema(0.999)).decay(n) for n in (0, 10, 100_000)] == [0.1, 11 / 20, 0.999]


def test_a_state_without_the_averages_of_snapshots_begins_them_where_it_stands(dataset: Dataset) -> None:
    before = trainer(replace(config(), ema=Ema(snapshots=0)), dataset)
    steps(before.run(), 3)
    tensors, numbers = before.tensors(), before.numbers()
    assert "powers" not in tensors
    for saved in (numbers, {key: value for key, value in numbers.items() if key != "powers"}):  # as an older version saved it
        after = trainer(config(), dataset)
        after.restore(tensors, saved)
        assert (after.powers.time, after.powers.began) == (0, 3)
        run = after.run()
        next(run)
        assert (after.powers.time, after.powers.began) == (1, 3)
        assert all(torch.equal(after.powers.tensors()[f"0.1/{n}"], p) for n, p in after.model.named_parameters())
        next(run)
        next(run)
        assert (after.powers.time, after.powers.began) == (1, 5)  # the next stage


def test_averages_of_snapshots_of_another_length_are_not_taken_over(dataset: Dataset) -> None:
    before, after = trainer(config(), dataset), trainer(replace(config(), ema=Ema(sigma_rel=(0.05, 0.2))), dataset)
    steps(before.run(), 3)
    after.restore(before.tensors(), before.numbers())
    assert (after.powers.time, after.powers.began) == (0, 3)


def test_no_average_counts_a_step_that_fp16_skipped(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(config(), dataset)
    loop = run.run()
    steps(loop, 2)
    before = {name: value.clone() for name, value in flat(run.tensors()).items()}
    scales = iter((2.0, 1.0))
    monkeypatch.setattr(run.scaler, "get_scale", lambda: next(scales))
    next(loop)
    after = flat(run.tensors())
    same = [name for name in before if name.startswith(("average/", "powers/"))]
    assert len(same) > 10 and all(torch.equal(before[name], after[name]) for name in same)
    assert run.powers.time == 2 and run.progress.step == 3


def test_only_matrices_decay() -> None:
    for model in (UViT(8, 1, 2, 32, 3, 2, num_classes=10), DiT(8, 1, 2, 32, 2, 2, num_classes=10)):
        decayed, rest = make_optimizer(model, Optimizer(weight_decay=0.1), 1e-3).param_groups
        assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
        names = {p: name for name, p in model.named_parameters()}
        assert all(names[p].endswith("weight") and "norm" not in names[p] for p in decayed["params"])
        assert {"class_embedding.weight"} <= {names[p] for p in rest["params"]}
        assert len(decayed["params"]) + len(rest["params"]) == len(names)


# --- checkpoints on disk ---


def save(folder: Path, name: str = "step-00000001") -> Path:
    return checkpoint.save(folder, name, {"model": {"w": torch.arange(6.0)}}, {"progress": {"step": 1}})


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    loaded = checkpoint.load(save(tmp_path))
    assert torch.equal(loaded.tensors["model"]["w"], torch.arange(6.0))
    assert loaded.numbers == {"progress": {"step": 1}}


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "no manifest", "format"])
def test_damage_is_named_with_the_way_out(damage: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    tensors, manifest = path / "model.safetensors", path / "manifest.json"
    data = bytearray(tensors.read_bytes())
    match damage:
        case "truncate":
            tensors.write_bytes(data[:-5])
        case "flip":
            data[-1] ^= 1
            tensors.write_bytes(data)
        case "remove":
            tensors.unlink()
        case "manifest":
            manifest.write_text(manifest.read_text()[:30])
        case "format":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
        case _:
            manifest.unlink()
    with pytest.raises(UserError, match=r"step-00000001") as error:
        checkpoint.load(path)
    assert "delete" in str(error.value) or "format 99" in str(error.value)


def test_a_save_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, "step-00000002")
    monkeypatch.undo()
    assert checkpoint.names(tmp_path) == ["step-00000001"]
    checkpoint.load(tmp_path / "step-00000001")
    save(tmp_path, "step-00000002")
    assert checkpoint.names(tmp_path) == ["step-00000001", "step-00000002"]


def test_rotation_keeps_the_latest_and_the_ends_of_stages(tmp_path: Path) -> None:
    for name in ("step-00000001", "step-00000002-pretrain", "step-00000003", "step-00000004", "step-100000000"):
        save(tmp_path, name)
    checkpoint.rotate(tmp_path, 2)
    assert checkpoint.names(tmp_path) == ["step-00000002-pretrain", "step-00000004", "step-100000000"]


# --- weights of another network ---


def small(size: int | tuple[int, int] = 8, channels: int = 1, classes: int = 10, patch: int = 2, width: int = 16) -> UViT:
    return UViT(size, channels, patch, width, 3, 2, num_classes=classes)


def fates(source: UViT, target: UViT, classes: tuple[list[str], list[str]] | None = None) -> dict[str, str]:
    return {each.name: each.fate for each in transfer(source, source.state_dict(), target, classes) if each.fate != "loaded"}


def test_the_same_network_is_loaded_whole() -> None:
    source, target = small(), small()
    assert fates(source, target) == {}
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True))


def test_positions_are_interpolated_and_classes_re_initialised_but_the_null() -> None:
    source, target = small(8, classes=10), small((16, 24), classes=102)
    with torch.no_grad():  # positions that are a plane stay that plane
        row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        source.positions.weight[2:] = (row + 10 * column).flatten()[:, None]
    assert fates(source, target) == {"positions.weight": "resized", "class_embedding.weight": "re-initialised"}
    plane = target.positions.weight[2:].reshape(8, 12, 16)[..., 0]
    inner = plane[3:5, 4:8]
    for axis, slope in ((0, 0.5), (1, 10 / 3)):  # a cubic goes a little around a straight line
        assert (inner.diff(dim=axis) > 0).all()
        assert inner.diff(dim=axis).mean().item() == pytest.approx(slope, rel=0.2)
    assert source.class_embedding is not None and target.class_embedding is not None
    assert torch.equal(source.class_embedding.weight[-1], target.class_embedding.weight[-1])
    assert torch.equal(source.positions.weight[:2], target.positions.weight[:2])


def test_grids_of_equal_count_and_other_shape_are_resized() -> None:
    assert fates(small((4, 16)), small((8, 8))) == {"positions.weight": "resized"}


def test_classes_to_and_from_none() -> None:
    source, target = small(classes=0), small(classes=10)
    assert fates(source, target) == {"positions.weight": "resized", "class_embedding.weight": "re-initialised"}
    assert torch.equal(source.positions.weight[0], target.positions.weight[1])  # the time token's position
    assert fates(small(classes=10), small(classes=0)) == {"positions.weight": "resized", "class_embedding.weight": "unused"}


def test_classes_are_known_by_name_and_new_ones_begin_as_none() -> None:
    source, target = small(classes=3), small(classes=4)
    report = transfer(source, source.state_dict(), target, (["cat", "dog", "cow"], ["ant", "cow", "cat", "bee"]))
    assert next((each.fate, each.reason) for each in report if each.name == "class_embedding.weight") == (
        "resized",
        "3 -> 4 classes: 2 known by name, 2 new",
    )
    assert source.class_embedding is not None and target.class_embedding is not None
    before, after = source.class_embedding.weight, target.class_embedding.weight
    assert torch.equal(after, before[[3, 2, 0, 3, 3]])
    assert fates(source, small(classes=3), (["a", "b", "c"], ["d", "e", "f"])) == {"class_embedding.weight": "re-initialised"}
    assert fates(source, small(classes=3), (["a", "b", "c"], ["a", "b", "c"])) == {}


def test_a_dit_given_classes_begins_as_it_was() -> None:
    source, target = DiT(8, 1, 2, 16, 2, 2), DiT((16, 8), 1, 2, 16, 2, 2, num_classes=3)
    for parameter in source.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    report = transfer(source, source.state_dict(), target, ([], ["a", "b", "c"]))
    assert [each.name for each in report if each.fate != "loaded"] == ["class_embedding.weight"]
    same_size = DiT(8, 1, 2, 16, 2, 2, num_classes=3)
    transfer(source, source.state_dict(), same_size, ([], ["a", "b", "c"]))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(same_size(x, 3.0, torch.tensor([0, 2])).sample, source(x, 3.0).sample)


@pytest.mark.parametrize("transform", ["pixels", "haar"])
@pytest.mark.parametrize("network", [DiT, UViT])
def test_channels_are_spread_and_gathered(network: Any, transform: Any) -> None:
    def made(channels: int) -> Any:
        found = network(8, channels, 2, 16, 2, 2, transform=transform)
        for parameter in found.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return found.eval()

    gray, colour, again = made(1), made(3), made(1)
    report = transfer(gray, gray.state_dict(), colour)
    assert {each.reason for each in report if each.fate == "resized"} == {"1 -> 3 channels"}
    assert not any(each.fate == "re-initialised" for each in report)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(colour(x.expand(-1, 3, -1, -1), 5.0).sample, gray(x, 5.0).sample.expand(-1, 3, -1, -1))
    transfer(colour, colour.state_dict(), again)
    torch.testing.assert_close(again(x, 5.0).sample, gray(x, 5.0).sample)
    four, three = made(4), made(3)
    transfer(three, three.state_dict(), four)
    rgb = torch.randn(2, 3, 8, 8)
    seen = four(torch.cat([rgb, torch.randn(2, 1, 8, 8)], dim=1), 5.0).sample
    torch.testing.assert_close(seen[:, :3], three(rgb, 5.0).sample)  # a channel more changes nothing of the others


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (small(width=32), r"model\.width 16 and this run 32; use --model\.width 16"),
        (small(patch=4), r"model\.patch 2 and this run 4"),
        (DiT(8, 1, 2, 16, 3, 2), r"--init is a UViT and this model a DiT; use --model uvit"),
    ],
)
def test_other_networks_are_refused_by_name(target: Any, message: str) -> None:
    source = small()
    with pytest.raises(UserError, match=message):
        transfer(source, source.state_dict(), target)


def test_weights_that_do_not_belong_are_refused_by_name() -> None:
    source = small()
    with pytest.raises(UserError, match="'extra', which this model does not"):
        transfer(source, source.state_dict() | {"extra": torch.zeros(1)}, small())
    without = {k: v for k, v in source.state_dict().items() if k != "norm.weight"}
    with pytest.raises(UserError, match=r"'norm\.weight' is missing"):
        transfer(source, without, small())
