"""Steps that go wrong are found wherever they do, not applied, said by name; and a run that cannot go on goes back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maskdm.cli import run_command
from maskdm.config import Guard
from maskdm.engine import Trainer
from maskdm.engine.guard import LEAST, Sentry, healthy

CPU = torch.device("cpu")
TRAIN = [
    "train", "digits", "--recipe", "digits", "--model.width", "16", "--depth", "1", "--heads", "2", "--threads", "1",
    "--pretrain.budget.steps", "40", "--finetune.budget.steps", "4", "--pretrain.batch", "8", "--finetune.batch", "8",
    "--intervals.log", "1", "--intervals.save", "10", "--intervals.evaluate", "50", "--intervals.sample", "50",
    "--sampling.steps", "2", "--sampling.num", "4",
]  # fmt: skip
BAD = 31
"""Step, from 1, at which something is injected."""


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path_factory.getbasetemp() / "maskdm-cache"))


def scale_gradients(trainer: Trainer, by: float) -> None:
    for parameter in trainer.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(by)


def one_gradient(trainer: Trainer, value: float) -> None:
    next(p for p in trainer.model.parameters() if p.grad is not None).grad[0] = value  # pyright: ignore[reportOptionalSubscript]


SITES: dict[str, Callable[[Trainer, torch.Tensor], torch.Tensor]] = {
    "loss is nan": lambda trainer, loss: (scale_gradients(trainer, math.nan), loss * math.nan)[1],
    "loss is inf": lambda trainer, loss: (scale_gradients(trainer, math.nan), loss * math.inf)[1],
    "a gradient is nan": lambda trainer, loss: (one_gradient(trainer, math.nan), loss)[1],
    "a gradient is inf": lambda trainer, loss: (one_gradient(trainer, math.inf), loss)[1],
    "loss leaps": lambda trainer, loss: (scale_gradients(trainer, 1e4), loss * 1e4)[1],
    "gradients leap": lambda trainer, loss: (scale_gradients(trainer, 1e6), loss)[1],
}


def inject(monkeypatch: pytest.MonkeyPatch, what: Callable[[Trainer, torch.Tensor], torch.Tensor], due: Callable[[Trainer], bool]) -> None:
    gradients = Trainer._gradients

    def wrapped(self: Trainer, *given: Any) -> torch.Tensor:
        loss = gradients(self, *given)
        return what(self, loss) if due(self) else loss

    monkeypatch.setattr(Trainer, "_gradients", wrapped)


def lines(out: Path, *events: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] in events]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("site", SITES)
def test_a_bad_step_is_not_applied_and_said_by_name(
    site: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    step = Trainer.step

    def watched(self: Trainer, *given: Any) -> Any:
        found = step(self, *given)
        moments = self.tensors()["optimizer"]
        states[self.progress.step] = {name: t.clone() for name, t in (self.model.state_dict() | moments).items()}
        return found

    inject(monkeypatch, SITES[site], lambda trainer: trainer.progress.step == BAD - 1)
    monkeypatch.setattr(Trainer, "step", watched)
    out = tmp_path / "run"
    assert run_command([*TRAIN, "--precision", precision, "--out", str(out)]) == 0
    (found,) = lines(out, "skipped")
    assert (found["step"], found["stage"], len(found["images"]), len(found["times"])) == (BAD, "pretrain", 8, 8)
    assert all(name.startswith("digit ") for name in found["images"])
    assert all(0 <= t < 1000 for t in found["times"])
    before, after, later = (states[BAD + i] for i in (-1, 0, 1))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in after)
    assert [line["step"] for line in lines(out, "train")] == [n for n in range(1, 45) if n != BAD]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines(out, "train"))
    last = out / "checkpoints" / "step-00000044-finetune"
    assert json.loads((last / "manifest.json").read_text())["progress"]["images"] == 44 * 8
    assert all(
        t.isfinite().all() for name in ("model", "average", "optimizer", "powers") for t in load_file(last / f"{name}.safetensors").values()
    )
    assert f"step {BAD} is skipped: " in capsys.readouterr().err


def test_ordinary_steps_are_not_bad(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_command([*TRAIN, "--out", str(out)]) == 0
    assert not lines(out, "skipped", "rollback")


def test_weights_that_are_no_numbers_send_the_run_back_for_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(math.nan)
        return loss

    seen: dict[tuple[int, int], list[int]] = {}
    batch = Trainer._backward

    def watched(self: Trainer, *given: Any) -> torch.Tensor:
        seen[self.progress.detours, self.progress.step] = self.feed.loader.indices_at(self.progress.images, 8).tolist()
        return batch(self, *given)

    monkeypatch.setattr(Trainer, "_backward", watched)
    inject(monkeypatch, spoil, lambda trainer: trainer.progress.step == 24 and trainer.progress.detours == 0)
    out = tmp_path / "run"
    assert run_command([*TRAIN, "--out", str(out)]) == 0
    (found,) = lines(out, "rollback")
    assert (found["step"], found["returns"]) == (20, 1) and 25 < found["left"] <= 30
    assert "went wrong" in found["reason"] or "no numbers" in found["reason"]
    assert seen[0, 20] != seen[1, 20]
    assert [line["step"] for line in lines(out, "train")] == list(range(1, 45))
    last = out / "checkpoints" / "step-00000044-finetune"
    assert all(t.isfinite().all() for name in ("model", "average") for t in load_file(last / f"{name}.safetensors").values())


@pytest.mark.slow
def test_a_run_killed_after_it_went_back_takes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        inject(patch, SITES["loss is nan"], lambda trainer: trainer.progress.step >= 24 and trainer.progress.detours == 0)
        assert run_command([*TRAIN, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        inject(patch, SITES["loss is nan"], lambda trainer: trainer.progress.step >= 24 and trainer.progress.detours == 0)
        inject(patch, lambda *_: (_ for _ in ()).throw(RuntimeError("killed")), lambda t: t.progress.detours == 1 and t.progress.step == 22)
        with pytest.raises(RuntimeError, match="killed"):
            run_command([*TRAIN, "--out", str(tmp_path / "killed")])
    assert run_command([*TRAIN, "--out", str(tmp_path / "killed")]) == 0
    name = Path("checkpoints", "step-00000044-finetune", "model.safetensors")
    one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert len(lines(tmp_path / "killed", "rollback")) == 1


def test_a_run_that_does_not_recover_gives_up_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inject(monkeypatch, SITES["loss is nan"], lambda trainer: trainer.progress.step >= 24)
    out = tmp_path / "run"
    assert run_command([*TRAIN, "--guard.rollbacks", "2", "--guard.in_a_row", "3", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    error = said.splitlines()[-1]
    assert "3 steps in a row went wrong, the last 27 (stage pretrain, loss nan" in error
    assert "went back to" in error and "2 times" in error and "try a lower lr" in error and "Traceback" not in said
    assert [line["returns"] for line in lines(out, "rollback")] == [1, 2]
    assert (out / "checkpoints" / "step-00000020").is_dir()


def test_with_nothing_saved_yet_it_gives_up_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inject(monkeypatch, SITES["loss is nan"], lambda _: True)
    assert run_command([*TRAIN, "--out", str(tmp_path / "run")]) == 1
    assert "no checkpoint was written yet; try a lower lr" in capsys.readouterr().err


def judged(sentry: Sentry, *pairs: tuple[float, float]) -> list[bool]:
    return [bool(sentry.judge(torch.tensor(loss), torch.tensor(norm))) for loss, norm in pairs]


def test_what_is_far_from_usual_is_found_by_median_and_spread() -> None:
    random = torch.Generator().manual_seed(0)
    usual = [(math.exp(0.3 * float(torch.randn((), generator=random))), 1.0) for _ in range(200)]
    sentry = Sentry(Guard(spike=10.0), CPU)
    assert not any(judged(sentry, *usual))
    assert judged(sentry, (5.0, 1.0), (30.0, 1.0), (1.0, 30.0), (1.0, 1.0)) == [False, True, True, False]
    noisy = Sentry(Guard(spike=10.0), CPU)
    wide = [(math.exp(3 * float(torch.randn((), generator=random))), 1.0) for _ in range(64)]
    judged(noisy, *wide)
    assert judged(noisy, (30.0, 1.0)) == [False]  # above ten times the median, and within the spread
    assert judged(Sentry(Guard(spike=None), CPU), *usual, (1e9, 1.0), (math.nan, 1.0)) == [False] * 201 + [True]


def test_it_needs_to_know_what_is_usual_and_forgets_it_with_the_stage() -> None:
    sentry = Sentry(Guard(), CPU)
    assert not any(judged(sentry, *[(1.0, 1.0)] * (LEAST - 1), (1e9, 1.0)))
    assert judged(sentry, *[(1.0, 1.0)] * LEAST, (1e9, 1.0))[-1]
    copy = Sentry(Guard(), CPU)
    copy.restore(sentry.tensors())
    assert judged(copy, (1e9, 1.0)) == [True]
    sentry.restart()
    assert judged(sentry, (1e9, 1.0)) == [False]
    copy.restore({})
    assert judged(copy, (1e9, 1.0)) == [False]


def test_infinite_gradients_of_fp16_are_its_scalers_business() -> None:
    sentry = Sentry(Guard(), CPU)
    assert not sentry.judge(torch.tensor(1.0), torch.tensor(math.inf), overflows=True)
    assert sentry.judge(torch.tensor(math.nan), torch.tensor(1.0), overflows=True)


def test_healthy() -> None:
    assert healthy({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int64)}, {"c": torch.zeros(1)})
    assert not healthy({"a": torch.ones(3)}, {"c": torch.tensor([1.0, math.nan])})
    assert not healthy({"a": torch.tensor([math.inf])})


@pytest.mark.slow
def test_a_nan_at_step_100_costs_no_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--model.width", "64", "--depth", "5", "--pretrain.budget.steps", "300", "--finetune.budget.steps", "300"]
    minutes = ["--pretrain.budget.minutes", "none", "--finetune.budget.minutes", "none"]
    found: dict[str, float] = {}
    for name in ("without", "with"):
        with monkeypatch.context() as patch:
            if name == "with":
                inject(patch, SITES["a gradient is nan"], lambda trainer: trainer.progress.step == 99)
            out = tmp_path / name
            assert run_command(["train", "digits", "--recipe", "digits", *sizes, *minutes, "--threads", "1", "--out", str(out)]) == 0
        found[name] = lines(out, "heldout")[-1]["loss"]
    (skipped,) = lines(tmp_path / "with", "skipped")
    assert skipped["step"] == 100 and len(skipped["images"]) == 128
    assert found["with"] == pytest.approx(found["without"], rel=0.02)
