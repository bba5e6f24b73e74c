"""`maskdm plan`: what it measures is compared with training in benchmarks/plan.py; here, what it says of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskdm.cli import run_command
from maskdm.config import Config, NoMask
from maskdm.data import Dataset
from maskdm.engine import available_memory, peak_memory, reset_peak_memory
from maskdm.models import DiT
from maskdm.recipes import recipe
from maskdm.runs import forecast
from maskdm.runs.forecast import StageForecast, advise
from maskdm.settings import override

SMALL = ["--model.width", "32", "--depth", "2", "--heads", "2", "--pretrain.batch", "16", "--finetune.batch", "8"]
BUDGETS = [
    "--pretrain.budget.minutes",
    "none",
    "--finetune.budget.minutes",
    "none",
    "--pretrain.budget.steps",
    "40",
    "--finetune.budget.images",
    "100",
]


def stage(name: str = "pretrain", **changes: object) -> StageForecast:
    plain = StageForecast(name, "patch, 50%", 64, 1, 128, 100, 6400, 0.1, 10.0, 2**30, 640.0, 0.5, 2.0, 2.1)
    return replace(plain, **changes)  # type: ignore[arg-type]


def config(side: int = 64, patch: int = 4) -> Config:
    base = recipe("cifar10", "x")
    return replace(base, data=replace(base.data, image_size=(side, side)), model=replace(base.model, patch=patch))


def test_a_plan_says_what_a_run_takes_and_begins_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "SECONDS", 0.2)
    out = tmp_path / "figures" / "plan.json"
    command = ["plan", "digits", "--recipe", "digits", *SMALL, *BUDGETS, "--price-per-hour", "3600", "--out", str(out)]
    assert run_command(command) == 0
    said = capsys.readouterr().out
    found = json.loads(out.read_text())
    masked, whole = found["stages"]
    assert masked["steps"] == 40 and whole["steps"] == 13 and whole["images"] == 104
    assert masked["seconds"] == pytest.approx(40 * masked["step_seconds"])
    assert masked["images_per_second"] == pytest.approx(16 / masked["step_seconds"])
    assert masked["speedup"] == pytest.approx(masked["images_per_second"] / whole["images_per_second"])
    assert masked["ideal_speedup"] > 1 and whole["speedup"] is None
    assert found["seconds"] == pytest.approx(masked["seconds"] + whole["seconds"])
    assert found["cost"] == pytest.approx(found["seconds"] + found["other_seconds"])
    assert 0 < found["memory"] < found["memory_available"]
    assert "masking will not pay here: an image has only 16 tokens" in said and "stage pretrain" in said
    assert not {path.name for path in tmp_path.iterdir()} - {"cache", "figures"}


def test_without_a_whole_stage_one_is_measured_to_compare_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(forecast, "SECONDS", 0.2)
    out = tmp_path / "plan.json"
    assert run_command(["plan", "digits", "--recipe", "digits", *SMALL, *BUDGETS, "--finetune.mask", "patch", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert len(found["stages"]) == 2 and all(each["speedup"] > 0 for each in found["stages"]) and found["cost"] is None


@pytest.mark.parametrize("wrong", [["--price-per-hour", "-1"], ["--no-such-setting", "1"], ["--recipe", "nothing"]])
def test_bad_input_is_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "digits", *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_does_not_fit_is_computed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of 100 + 10 per image: of 64 images, 16 fit in 300 / 0.85."""
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(forecast, "SECONDS", 0.2)
    batches: list[int] = []
    plain = forecast._trainer  # pyright: ignore[reportPrivateUsage]

    def trainer(config: Config, stage: object, *rest: object) -> object:
        batches.append(stage.batch)  # type: ignore[attr-defined]
        return plain(config, stage, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(forecast, "_trainer", trainer)
    monkeypatch.setattr(forecast, "peak_memory", lambda _: 100 + 10 * batches[-1])
    monkeypatch.setattr(forecast, "available_memory", lambda _: round(300 / forecast.ROOM))
    out = tmp_path / "plan.json"
    arguments = [
        "plan",
        "digits",
        "--recipe",
        "digits",
        *SMALL,
        *BUDGETS,
        "--pretrain.batch",
        "64",
        "--finetune.batch",
        "16",
        "--out",
        str(out),
    ]
    assert run_command(arguments) == 0
    found = json.loads(out.read_text())
    assert [each["pieces"] for each in found["stages"]] == [4, 1]
    assert any("4 pieces of 16 images (--stages.pretrain.accumulate 4)" in line for line in found["advice"])


@pytest.mark.parametrize(
    ("side", "images", "stages", "expected"),
    [
        (16, 10_000, (stage(), stage("whole", speedup=None)), "only 16 tokens"),
        (64, 100, (stage(),), "100 images are few"),
        (64, 10_000, (stage(speedup=1.1),), "only 1.10x faster"),
        (64, 10_000, (stage(),), "recommended: patch masking at 50%"),
        (128, 10_000, (stage(),), "recommended: patch masking at 75%"),
        (64, 10_000, (stage(speedup=1.5),), "try --stages.pretrain.batch 96"),
        (64, 10_000, (stage(speedup=None),), "masking could pay here"),
        (64, 10_000, (stage(pieces=4),), "4 pieces of 16 images"),
    ],
)
def test_advice(side: int, images: int, stages: tuple[StageForecast, ...], expected: str) -> None:
    assert any(expected in line for line in advise(config(side), images, stages))


def test_no_gain_is_not_recommended() -> None:
    said = " ".join(advise(config(16), 10_000, (stage(),)))
    assert "will not pay" in said and "recommended" not in said


def test_the_peak_of_memory_is_of_what_came_since() -> None:
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory(cpu) - before > 48 << 20
    del block
    assert available_memory(cpu) > 64 << 20


def test_what_is_advised_can_be_given(tmp_path: Path) -> None:
    """Flags in the advice are settings of the run that it is about."""
    base = config(16)
    masked = tuple(stage(each.name, pieces=4) for each in base.stages)
    flags = re.findall(r"--(stages[\w.]+) (\w+)", " ".join(advise(base, 100, masked)))
    assert [name.rpartition(".")[2] for name, _ in flags] == ["mask", "mask", "accumulate", "accumulate"]
    changed = override(base, flags)
    assert all(isinstance(each.mask, NoMask) and each.accumulate == 4 for each in changed.stages)


def test_what_evaluations_and_samples_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 30 whole images a second a forward pass of an image is 1/90 s."""
    base = recipe("cifar10", "x")
    base = replace(base, intervals=replace(base.intervals, evaluate=50, sample=0), sampling=replace(base.sampling, num=9, steps=10))
    monkeypatch.setattr(Dataset, "split", lambda *_: (np.arange(47_500), np.arange(2_500)))
    dataset = Dataset(np.zeros((2, 4, 4, 3), dtype=np.uint8), None, (), "", "", (), (), Path("x"))
    whole = forecast._Measured(1.0, 0, 1, 30)  # pyright: ignore[reportPrivateUsage]
    seconds = forecast._other_seconds(base, dataset, (stage(steps=60), stage(steps=60)), whole)  # pyright: ignore[reportPrivateUsage]
    evaluations, grids, last = 2 + 2, 2, 50 + 6
    assert seconds == pytest.approx((evaluations * 2 * 256 * 8 + (grids * 9 + last) * 10) / 90)


def test_a_directory_is_no_file_for_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "digits", "--recipe", "digits", "--out", str(tmp_path)]) == 2
    assert "is a directory; name a JSON file" in capsys.readouterr().err


def test_memory_that_runs_out_is_said_once_a_stage_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    plain = DiT.denoise

    def denoise(self: DiT, patches: torch.Tensor, *rest: Any) -> torch.Tensor:
        if self.training and len(patches) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(self, patches, *rest)

    monkeypatch.setattr(DiT, "denoise", denoise)
    run = tmp_path / "run"
    quick = ["--sampling.num", "2", "--sampling.steps", "2", "--tracking", "none", "--ema.snapshots", "0"]
    assert run_command(["train", "digits", "--recipe", "digits", *SMALL, *BUDGETS, *quick, "--out", str(run)]) == 0
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [(e["stage"], e["step"], e["pieces"], e["images"]) for e in events if e["event"] == "memory"]
    assert told == [("pretrain", 1, 4, 4), ("finetune", 41, 2, 4)]
    figures = next(e for e in events if e["event"] == "train")
    assert 0 < figures["share_of_ceiling"] < 2 and figures["tokens_per_second"] > 0 and figures["memory"] > 0
    assert 0 <= figures["data_wait"] < 1


def test_memory_that_never_suffices_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denoise(self: DiT, *_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(DiT, "denoise", denoise)
    assert run_command(["train", "digits", "--recipe", "digits", *SMALL, "--tracking", "none", "--out", str(tmp_path / "run")]) == 1
    assert "memory ran out, with one image at a time too" in capsys.readouterr().err.splitlines()[-1]
