"""The end of a masked stage by evidence: probes that leave no trace but their cost, and a rule that is right on known curves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskdm.arithmetic import flops
from maskdm.cli import run_command
from maskdm.config import Budget, Config, Data, DiTConfig, Ema, NoMask, Optimizer, PatchMask, Stage
from maskdm.data import Dataset, Loader
from maskdm.engine import Machine, Switch, Trainer
from maskdm.engine.switch import KEPT, LENGTH, MARKS, best_end
from maskdm.errors import UserError
from maskdm.models import build
from maskdm.recipes import recipe
from maskdm.recipes.arms import parse_arm
from maskdm.runs import Display
from maskdm.runs.contestant import Contestant, Field


def config(auto: bool = True, masked: int = 400, whole: int = 80) -> Config:
    stages = (
        Stage("masked", Budget(images=4 * masked, auto=auto), PatchMask(0.5), batch=4, lr=1e-3),
        Stage("whole", Budget(images=4 * whole), batch=4, lr=1e-3, warmup=50),
    )
    return Config(Data("made up", (8, 8), channels=1, heldout=0.1), DiTConfig(16, 2, 2, 2), stages, ema=Ema(snapshots=0))


def trainer(settings: Config) -> Trainer:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1)).astype(np.uint8)
    dataset = Dataset(images, None, (), "", "", (), (), Path("made up"))
    torch.manual_seed(0)
    return Trainer(settings, Loader(dataset, np.arange(12), 0), build(settings.model, settings.data, 0), torch.device("cpu"), "fp32")


def train(run: Trainer, measured: list[float]) -> list[int]:
    """To the end, with these measurements; the steps at which there was a probe."""
    switch, probed = Switch(run, lambda: measured.pop(0)), []
    for step in run.run():
        if switch.after() is not None:
            probed.append(step.number)
    return probed


GOES_ON = [v for i in range(5) for v in (1.0 - 0.1 * i, 0.999 - 0.1 * i)]
"""Of each probe half and whole: what whole images bring is a hundredth of what masked ones do."""

ENDS = [1.1, 1.0, 0.99, 0.94]
"""At a tenth of the budget 1, at a quarter 0.94, after a fall by 0.05 within half of the probe: b = 0.01, c = 0.072."""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of however few steps, so that the runs of tests can be short."""
    monkeypatch.setattr("maskdm.engine.switch.LEAST", 0)


@pytest.mark.usefixtures("short")
def test_probes_leave_nothing_behind_but_their_cost() -> None:
    """Where masked training always pays, the steps are those of a stage that was never probed, fewer by the probes' cost."""
    run, plain = trainer(config()), trainer(config(auto=False))
    weights: dict[int, torch.Tensor] = {}
    for step in plain.run():
        weights[step.number] = plain.model.out.weight.detach().clone()
    assert train(run, list(GOES_ON)) == [40, 100, 200]
    first = run.progress.stages[0]
    assert len(first.probes) == len(MARKS) and first.probed("images") == pytest.approx(4 * 400 * LENGTH * 3, rel=0.3)
    assert first.images + first.probed("images") == pytest.approx(1600, abs=8) and not first.ended
    again = trainer(config())
    switch, count = Switch(again, lambda values=list(GOES_ON): values.pop(0)), 0
    for step in again.run():
        switch.after()
        if step.stage.name == "masked":
            count += 1
            assert torch.equal(again.model.out.weight, weights[step.number])
    assert count == first.steps


@pytest.mark.usefixtures("short")
def test_a_stage_ends_where_it_is_best_and_leaves_its_rest_to_the_next() -> None:
    run = trainer(config())
    assert train(run, list(ENDS)) == [40, 100] and run.progress.stages[0].ended
    masked, whole = run.progress.stages
    total = 1 + 80 * 2.3 / 400  # about: half of the patches cost less than half
    best = min(range(1, 401), key=lambda t: KEPT * 0.01 * 400 / t - 0.072 * math.log(total - t / 400))
    assert masked.steps == pytest.approx(best, abs=8)
    left = 1600 - masked.images - masked.probed("images")
    assert whole.images == pytest.approx(320 + left / 2.3, rel=0.1)
    assert whole.images == math.ceil((run.budget(1).images or 0) / 4) * 4  # whole steps of four
    assert not whole.probes


def test_what_is_left_is_worth_the_optimizers_arithmetic_too() -> None:
    settings = config()
    settings = replace(settings, optimizer=Optimizer("muon"), stages=(replace(settings.stages[0], batch=8), settings.stages[1]))
    run = trainer(settings)
    whole, masked = (flops(settings, stage.mask, 1) + run.optimizer.flops / stage.batch for stage in reversed(settings.stages))
    assert run.optimizer.flops > 0 and whole / masked != pytest.approx(2.3, rel=0.05)
    run.progress.stages[0] = replace(run.progress.stages[0], images=800, ended=True)
    assert run.budget(1).images == round(320 + 800 * masked / whole)


def test_a_stage_of_too_few_steps_is_not_probed_and_ends_halfway() -> None:
    run = trainer(config())
    assert train(run, []) == []
    masked, whole = run.progress.stages
    assert masked.ended and masked.steps == 200 and whole.images == pytest.approx(320 + 800 / 2.3, rel=0.1)


@pytest.mark.usefixtures("short")
def test_a_stopped_run_goes_on_to_the_same_end() -> None:
    whole, parts = trainer(config()), trainer(config())
    train(whole, list(ENDS))
    left = list(ENDS)
    switch = Switch(parts, lambda: left.pop(0))
    for step in parts.run():
        switch.after()
        if step.number == 60:
            break
    resumed = trainer(config())
    resumed.restore(parts.tensors(), json.loads(json.dumps(parts.numbers())))
    train(resumed, left)
    assert resumed.progress == whole.progress or [s.images for s in resumed.progress.stages] == [s.images for s in whole.progress.stages]
    assert torch.equal(resumed.model.out.weight, whole.model.out.weight)


@pytest.mark.parametrize("total", [1.1, 1.25, 3.0])
@pytest.mark.parametrize("masked", [0.0005, 0.005, 0.02])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_rule_ends_near_the_best_split_of_known_curves(power: float, masked: float, total: float) -> None:
    """Of its own law, and of two that fall slower and faster: at the loss of the best split, or of one that costs 5 % more in all."""
    falls, length = 0.004, 0.02

    def loss(t: float, w: float) -> float:
        return (KEPT if w > length else 1.0) * masked / power / t**power - falls * math.log(w)

    probes, until, at = list[dict[str, float]](), 1.0, 0.0
    for mark in MARKS:
        if mark < until:
            half, full = loss(mark, length / 2), loss(mark, length)
            probes.append({"at": mark, "half": half, "full": full, "middle": 16.0, "taken": 32.0})
            until = best_end(probes, total)
            at = max(mark, until)
    ends = [loss(t / 100, total - t / 100) for t in range(5, 101)]
    more = math.expm1((loss(at, total - at) - min(ends)) / falls) * (total - at)  # whole training that would make up for it
    assert more <= 0.055 * total


def test_what_probes_cannot_tell() -> None:
    probe = {"at": 0.1, "half": 0.2, "full": 0.19, "middle": 16.0, "taken": 32.0}
    assert best_end([probe], 1.25) == 1.0  # no other to compare it with
    older = {"at": 0.2, "half": 0.2, "full": 0.1, "second": 0.01}
    assert best_end([older, probe | {"at": 0.25}], 1.25) == 1.0
    assert best_end([probe, probe | {"at": 0.25, "full": math.nan}, probe | {"at": 0.5, "half": math.inf}], 1.25) == 0.5  # and none to come
    assert best_end([probe, probe | {"at": 0.25}], 1.25) == 0.0  # masked training brings nothing any more
    assert best_end([probe, probe | {"at": 0.25, "half": 0.17, "full": 0.18}], 1.25) == 1.0  # whole images bring nothing yet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": (config().stages[0],)}, "is for a masked stage before one on whole images"),
        ({"stages": (config().stages[0], replace(config().stages[1], mask=PatchMask(0.25)))}, "before one on whole images"),
        ({"stages": (replace(config().stages[0], mask=NoMask()), config().stages[1])}, "is for a masked stage"),
        ({"stages": (config().stages[0], replace(config().stages[1], budget=Budget(steps=9)))}, "limit both by the same"),
        ({"data": replace(config().data, heldout=0.0)}, "goes by the held-out loss"),
    ],
)
def test_what_could_not_be_probed_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(config(), **change).check()  # type: ignore[arg-type]


def test_an_arm_may_end_by_evidence() -> None:
    arm = parse_arm("patch-75@auto", recipe("cifar10", "photos"))
    made = arm.config(recipe("cifar10", "photos"), 0, lambda stage, share: Budget(images=round(1000 * share)))
    assert [(stage.budget.images, stage.budget.auto) for stage in made.stages] == [(800, True), (200, False)]
    assert arm.describe().startswith("patch-75 for at most 80%")


@pytest.mark.usefixtures("short")
def test_an_arm_pays_for_its_probes_and_their_measurements(tmp_path: Path) -> None:
    settings = config()
    run = trainer(settings)
    probes = len(train(run, GOES_ON.copy()))
    machine = Machine(torch.device("cpu"), "a core", 1, "fp32", 1e9)
    arm = parse_arm("patch-50@auto", settings)
    dataset = Dataset(np.zeros((12, 8, 8, 1), np.uint8), None, (), "", "", (), (), Path("made up"))
    found = Contestant(arm, settings, tmp_path, Field(dataset, np.arange(12), machine, Display(quiet=True))).spent(run)
    masked, whole = run.progress.stages
    trained = masked.images + whole.images + 4 * masked.probed("taken")
    assert probes == 3 and found["images"] == trained and found["steps"] == masked.steps + whole.steps
    work = flops(settings, PatchMask(0.5), 1) * masked.images + flops(settings, NoMask(), 1) * (trained - masked.images)
    assert found["flops"] == pytest.approx(work + flops(settings, NoMask(), 1) * 2 * probes * 32 * 8 / 3)  # no backward pass: a third


@pytest.mark.usefixtures("short")
def test_a_run_says_what_its_probes_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width", "16", "--depth", "2", "--heads", "2", "--sampling.steps", "1", "--sampling.num", "4", "--tracking", "[]"]
    budgets = ["--pretrain.budget.steps", "50", "--pretrain.budget.auto", "true", "--finetune.budget.steps", "10"]
    budgets += ["--pretrain.budget.minutes", "none", "--finetune.budget.minutes", "none"]
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(tmp_path / "run"), *small, *budgets]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    probes = [line for line in lines if line.get("event") == "probe" or line.get("kind") == "probe"]
    assert probes and probes[0]["stage"] == "pretrain" and probes[0]["loss"] > 0
    assert "probe of whole images at step 5" in capsys.readouterr().err
