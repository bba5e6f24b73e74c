"""`maskdm evaluate` as a person meets it, and the evaluation during training."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maskdm.cli import run_command
from maskdm.data import Dataset
from maskdm.evaluation import DenoisingLoss, FeatureNetwork
from maskdm.recipes import recipe
from maskdm.runs import observe, sweep
from maskdm.runs import watch as runs_watch
from maskdm.runs.directory import RunDirectory
from maskdm.runs.sets import natural_labels

TINY = [
    "--model.width", "16", "--depth", "1", "--heads", "2", "--threads", "1", "--precision", "fp32", "--sampling.steps", "2",
    "--pretrain.budget.steps", "4", "--finetune.budget.steps", "8", "--pretrain.batch", "8", "--finetune.batch", "8",
    "--intervals.save", "3", "--intervals.evaluate", "2", "--intervals.sample", "50", "--sampling.num", "4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path_factory.getbasetemp() / "maskdm-cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDM_CACHE", str(tmp_path_factory.getbasetemp() / "maskdm-cache"))
        out = tmp_path_factory.mktemp("evaluated") / "run"
        assert run_command(["train", "digits", "--recipe", "digits", "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of digits, by class; four images of the first are also in the second."""
    from sklearn.datasets import load_digits

    pixels, classes = (np.asarray(part) for part in load_digits(return_X_y=True))
    path = tmp_path_factory.mktemp("folders")
    for name, rows in (("a", range(300)), ("b", range(296, 700))):
        for row in rows:
            place = path / name / str(classes[row])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels[row].reshape(8, 8) * (255 / 16)).round().astype(np.uint8)).save(place / f"{row}.png")
    return path / "a", path / "b"


class Pixels(FeatureNetwork):
    """The images' pixels themselves."""

    def embed(self, images: Tensor) -> Tensor:
        return images.float().flatten(1) / 255


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_two_folders(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folders
    out = tmp_path / "found.json"
    assert run_command(["evaluate", "--images", str(a), "--data", str(b), "--features", "self", "--out", str(out)]) == 0
    found, said = read(out), capsys.readouterr().out
    for name in ("frechet_distance", "kernel_distance", "precision", "recall"):
        low, high = found[f"{name}_interval"]
        assert low <= found[name] <= high
    assert found["num_samples"] == 300 and found["num_reference"] == 404
    assert 4 <= found["copies"]["count"] <= 8
    assert {row["name"] for row in found["copies"]["worst"][:4]} == {
        str(path.relative_to(b)) for path in b.rglob("*.png") if int(path.stem) < 300
    }
    assert found["class_accuracy"] > 0.8
    assert found["provenance"]["images_hash"] != found["provenance"]["data_hash"]
    assert found["provenance"]["image_size"] == [8, 8]
    assert found["features"]["hash"]
    assert "FID" not in said and "fid" not in found
    assert "Frechet distance" in said and "near-copies of real images" in said
    with Image.open(tmp_path / "found.copies.png") as picture:
        assert picture.width > 16 * 8


def test_a_run_is_measured_and_every_evaluation_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--weights", "best", "--guidance", "2", "--out", str(tmp_path / "again.json")]):
        assert run_command(["evaluate", str(run), "--num", "40", "--steps", "2", *options]) == 0
    assert "new real images" in capsys.readouterr().out
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["provenance"]["guidance"] for line in lines] == [1.0, 2.0]
    assert read(run / "metrics.json") == lines[1] == read(tmp_path / "again.json")
    carried = lines[0]["provenance"] | lines[0]["features"]
    for key in (
        "checkpoint",
        "weights",
        "weights_hash",
        "scheduler",
        "steps",
        "eta",
        "seed",
        "data_hash",
        "hash",
        "preprocessing",
        "created",
    ):
        assert carried[key] is not None, key
    assert (lines[0]["provenance"]["weights"], lines[1]["provenance"]["weights"]) == ("ema", "best")
    assert lines[0]["denoising"]["levels"][0]["gap_interval"]
    assert lines[0]["verdicts"]
    for name in ("neighbours.png", "copies.png", "denoising.png"):
        with Image.open(run / name) as picture:
            assert picture.width > 100
    assert "<html" in (run / "report.html").read_text()


def test_classes_are_asked_for_as_often_as_the_training_images_have_them() -> None:
    config = recipe("digits", "digits")
    labels = np.repeat([0, 1, 2, *range(3, 43)], [500, 301, 99, *[1] * 40])
    dataset = Dataset(np.zeros((len(labels), 1, 1, 1), np.uint8), labels, tuple(map(str, range(43))), "", "", (), (), Path())
    every = np.arange(len(labels))
    drawn = natural_labels(config, dataset, every, len(labels))
    assert drawn is not None and np.bincount(drawn).tolist() == np.bincount(labels).tolist()
    for num in range(10, len(labels), 50):  # a beginning, and the rare classes together, are about like the whole
        for group in ([0], [1], [2], range(3, 23), range(3, 43)):
            expected = num * np.isin(labels, group).mean()
            assert abs(np.isin(drawn[:num], group).sum() - expected) < 4, (num, group)
    few = natural_labels(config, dataset, every[:801], 7)
    assert few is not None and np.bincount(few).tolist() == [4, 3]
    plain = replace(config, data=replace(config.data, conditional=False))
    assert natural_labels(plain, dataset, every, 7) is None


def test_unbalanced_data_are_measured_with_samples_as_unbalanced(
    tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine digits of one class to one of another: by every command that measures samples."""
    data, out = tmp_path / "data", tmp_path / "run"
    for name, count in (("0", 27), ("1", 3)):
        (data / name).mkdir(parents=True)
        for file in sorted((folders[0] / name).iterdir())[:count]:
            (data / name / file.name).write_bytes(file.read_bytes())
    asked: list[tuple[str, list[int]]] = []

    def recorded(module: ModuleType) -> None:
        true = module.draw_images

        def draw(pipeline: Any, settings: Any, indices: range, labels: list[int], *rest: Any) -> Any:
            asked.append((module.__name__.rpartition(".")[2], np.bincount(labels, minlength=2).tolist()))
            return true(pipeline, settings, indices, labels, *rest)

        monkeypatch.setattr(module, "draw_images", draw)

    for module in (sys.modules["maskdm.runs.evaluate"], observe, sweep):
        recorded(module)
    for module in (runs_watch, sweep):
        monkeypatch.setattr(module, "choose_network", lambda *_: Pixels("pixels", "0", 64, 0, "none", 64))
    settings = ["--heldout", "0", "--evaluation.samples", "20", "--intervals.evaluate", "8", "--sampling.num", "3"]
    assert run_command(["train", str(data), "--recipe", "digits", "--out", str(out), *TINY, *settings]) == 0
    assert ("observe", [18, 2]) in asked
    assert run_command(["ema-sweep", str(out), "--measure", "kernel-distance", "--num", "10", "--sigma-rel", "0.1"]) == 0
    assert run_command(["evaluate", str(out), "--num", "30"]) == 0
    assert [each for each in asked if each[0] != "observe"] == [("sweep", [9, 1])] * 2 + [("evaluate", [27, 3])]
    for file in ("metrics.json", "ema_sweep.json"):
        assert read(out / file)["provenance"]["classes"] == "as in the training images"


def test_samples_are_drawn_once_and_a_killed_evaluation_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["maskdm.runs.evaluate"]
    drawn: list[range] = []
    true = module.draw_images

    def counted(pipeline: Any, settings: Any, indices: range, *rest: Any) -> Any:
        if len(drawn) == 1 and indices.start == 256:
            raise KeyboardInterrupt
        drawn.append(indices)
        return true(pipeline, settings, indices, *rest)

    monkeypatch.setattr(module, "draw_images", counted)
    command = ["evaluate", str(run), "--num", "300", "--steps", "1", "--seed", "5"]
    assert run_command(command) == 130
    drawn.append(range(0))
    assert run_command(command) == 0
    assert drawn == [range(256), range(0), range(256, 300)]
    assert run_command(command) == 0
    assert len(drawn) == 3


@pytest.mark.slow
def test_two_processes_find_what_one_does(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["evaluate", str(run), "--num", "520", "--steps", "1", "--seed", "6"]
    found, torchrun = [], ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "maskdm", "--"]
    for name, start in (("one", ["-m", "maskdm"]), ("two", torchrun)):
        monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / name))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        done = subprocess.run(
            [sys.executable, *start, *command, "--out", str(tmp_path / f"{name}.json")], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("metrics:") == 1
        found.append(read(tmp_path / f"{name}.json"))
    for key in ("frechet_distance", "kernel_distance", "precision", "recall"):
        assert found[0][key] == pytest.approx(found[1][key], rel=0.05, abs=0.02)
    assert found[0]["provenance"]["weights_hash"] == found[1]["provenance"]["weights_hash"]


def test_bad_requests_are_one_line(run: Path, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = map(str, folders)
    (tmp_path / "few").mkdir()
    for number in range(2):
        Image.new("L", (8, 8), number).save(tmp_path / "few" / f"{number}.png")
    for arguments, message in {
        (): "give either",
        (str(run), "--images", a, "--data", b): "give either",
        ("--images", a): "without --data",
        ("--images", a, "--data", str(tmp_path / "absent")): "absent",
        ("--images", str(tmp_path / "few"), "--data", b): "at least 10 samples, here 2",
        ("--images", a, "--data", b, "--out", str(tmp_path / "no" / "x.json")): "no folder",
        ("--images", a, "--data", b, "--weights", "best"): "leave it out with --images",
        ("--images", a, "--data", b, "--features", "onxx:file"): "onnx",
        ("--images", a, "--data", b, "--image-size", "big"): "--image-size",
        (str(run), "--num", "3"): "--num is 3",
        (str(run), "--num-reference", "3"): "--num-reference is 3",
        (str(run), "--data", a): "is not the data",
    }.items():
        assert run_command(["evaluate", *arguments]) == 2, arguments
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("maskdm: error: ") and message in error[-1], (arguments, error)


# --- during training ------------------------------------------------------------------------------------------------


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["event"] == name]


def test_the_best_weights_are_those_of_the_lowest_held_out_loss(run: Path) -> None:
    measured = events(run, "heldout")
    assert len(measured) == 6
    best = min(measured, key=lambda event: event["loss"])
    kept = read(run / "best" / "manifest.json")
    assert (kept["step"], kept["value"]) == (best["step"], best["loss"])
    assert events(run, "best")[-1]["step"] == best["step"]
    assert all(event["train_loss"] > 0 and len(event["train_levels"]) == 8 for event in measured)
    info = RunDirectory(run).info()
    masked, whole = (n * (8 * 256 + 6 * 16 * 64) + 4 * n**2 * 16 + 12 * 256 for n in (8, 16))
    assert info["flops"] == pytest.approx(3 * (4 * 8 * masked + 8 * 8 * whole))


def test_a_kernel_distance_is_measured_and_can_choose_the_best(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["--evaluation.samples", "20", "--evaluation.measure", "kernel-distance", "--intervals.evaluate", "4"]
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(out), *TINY, *settings]) == 0
    measured = events(out, "evaluate")
    assert [event["step"] for event in measured] == [4, 8, 12]
    assert all(event["kernel_distance_interval"][0] < event["kernel_distance"] for event in measured)
    assert read(out / "best" / "manifest.json")["value"] == min(event["kernel_distance"] for event in measured)


def test_a_stage_ends_when_nothing_gets_better(tmp_path: Path) -> None:
    out = tmp_path / "run"
    still = ["--pretrain.lr", "1e-12", "--finetune.lr", "1e-12", "--evaluation.patience", "2"]
    settings = [*TINY, "--pretrain.budget.steps", "30", "--finetune.budget.steps", "30"]
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(out), *settings, *still]) == 0
    assert [(event["stage"], event["since"]) for event in events(out, "early_stop")] == [("pretrain", 2), ("finetune", 2)]
    stages = RunDirectory(out).info()["stages"]
    assert all(stage["ended_early"] and stage["done"] and stage["steps"] < 30 for stage in stages)
    assert (out / "checkpoints" / f"step-{stages[0]['steps']:08}-pretrain").is_dir()
    assert (out / "model").is_dir()


def test_a_stage_that_patience_ended_goes_on_under_another_budget_or_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    still = ["--pretrain.lr", "1e-12", "--finetune.lr", "1e-12", "--evaluation.patience", "2"]
    settings = [*TINY, "--pretrain.budget.steps", "30", "--finetune.budget.steps", "30"]
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(out), *settings, *still]) == 0
    again = ["train", "digits", "--out", str(out)]

    def state() -> tuple[list[int], bool]:
        stages = RunDirectory(out).info()["stages"]
        return [stage["steps"] for stage in stages], stages[1]["ended_early"]

    (pretrain, ended), early = state()
    assert early and ended < 30
    assert run_command([*again, "--sampling.num", "5", "--fork"]) == 0
    assert state() == ([pretrain, ended], True)
    assert run_command([*again, "--finetune.budget.steps", "40", "--fork"]) == 0  # two more evaluations without a better one
    assert state() == ([pretrain, ended + 4], True)
    with monkeypatch.context() as patch:  # killed before its first checkpoint, the fork goes on by the plain command
        patch.setattr(runs_watch.Watch, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_command([*again, "--evaluation.patience", "none", "--intervals.save", "50", "--fork"]) == 130
    assert run_command(again) == 0
    assert state() == ([pretrain, 40], False)


@pytest.mark.slow
def test_stopping_and_the_best_survive_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskdm.runs.watch import Watch

    settings = [*TINY, "--evaluation.patience", "3", "--finetune.lr", "0.3", "--finetune.budget.steps", "30"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(whole), *settings]) == 0
    true, calls = Watch.evaluate, list[int]()

    def killed(self: Watch, step: Any) -> dict[str, float]:
        calls.append(step.number)
        if len(calls) in (3, 6):
            raise KeyboardInterrupt
        return true(self, step)

    monkeypatch.setattr(Watch, "evaluate", killed)
    codes = [run_command(["train", "digits", "--recipe", "digits", "--out", str(cut), *settings]) for _ in range(3)]
    assert codes == [130, 130, 0]
    for name in ("best", "early_stop", "heldout"):
        kept = [[(event["step"], event.get("loss"), event.get("value")) for event in events(each, name)] for each in (whole, cut)]
        assert kept[0] == kept[1], name
    assert read(whole / "best" / "manifest.json") == read(cut / "best" / "manifest.json")


def test_an_evaluation_that_is_not_a_number_is_no_better_and_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter(value for loss in (0.3, -float("inf"), 0.25, float("nan"), 0.3, 0.28) for value in (loss, 0.1))  # 0.1: of training images
    last = [0.0]

    def measured(*_: object, first: int) -> DenoisingLoss:
        """Of a batch; the batches of a measurement are alike."""
        last[0] = next(losses) if first == 0 else last[0]
        return DenoisingLoss(torch.full((2, 8), last[0]))

    monkeypatch.setattr(runs_watch, "denoising_loss", measured)
    out = tmp_path / "run"
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(out), *TINY]) == 0
    assert [(event["step"], event["value"]) for event in events(out, "not_finite")] == [(4, "-inf"), (8, "nan")]
    assert [(event["step"], event["value"]) for event in events(out, "best")] == [(2, pytest.approx(0.3)), (6, 0.25)]
    watch = read(out / "checkpoints" / "step-00000012-finetune" / "manifest.json")["meter"]["watch"]
    assert (watch["stage_best"], watch["since"]) == (0.25, 3)


def test_figures_that_do_not_compare_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork to another network, or other sampling, begins anew with the best; one to other grids does not."""
    monkeypatch.setattr(runs_watch, "choose_network", lambda spec, *_: Pixels(spec, spec, 64, 0, "none", 64))
    out = tmp_path / "run"
    settings = ["--evaluation.samples", "20", "--evaluation.measure", "kernel-distance", "--intervals.evaluate", "50"]
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(out), *TINY, *settings]) == 0
    command, steps = ["train", "digits", "--out", str(out), "--fork"], 8
    for changed, expected in (
        (["--sampling.num", "2"], []),
        (["--evaluation.features", "other"], ["features"]),
        (["--evaluation.samples", "10"], ["samples"]),
        (["--sampling.steps", "1"], ["sampling"]),
        (["--evaluation.measure", "heldout-loss"], ["classes", "features", "measure", "preprocessing", "samples", "sampling"]),
    ):
        before, steps = read(out / "best" / "manifest.json"), steps + 1
        assert run_command([*command, "--finetune.budget.steps", str(steps), *changed]) == 0
        afresh = [event for event in events(out, "afresh") if event["step"] == steps + 3]
        differ = [sorted(key for key in each["before"] if each["before"][key] != each["now"].get(key)) for each in afresh]
        assert differ == ([expected] if expected else [])
        after = read(out / "best" / "manifest.json")
        assert after["step"] == steps + 4 if expected else after == before or after["value"] < before["value"]


def test_patience_and_measure_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, message in {
        ("--patience", "0"): "evaluation.patience is 0",
        ("--patience", "2", "--intervals.evaluate", "0"): "intervals.evaluate is 0",
        ("--patience", "2", "--heldout", "0"): "data.heldout is 0",
        ("--evaluation.samples", "3"): "evaluation.samples is 3",
        ("--evaluation.measure", "kernel-distance"): "evaluation.samples is 0",
        ("--evaluation.measure", "fid"): "heldout-loss",
        ("--evaluation.samples", "20", "--evaluation.features", "onxx:f"): "onnx",
    }.items():
        assert run_command(["train", "digits", "--recipe", "digits", "--out", str(tmp_path / "x"), *settings]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
