"""Averages of any length, as a person meets them: `maskdm ema-sweep`, `sample --ema`, and what training leaves for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from maskdm.cli import run_command
from maskdm.errors import UserError
from maskdm.evaluation import FeatureNetwork
from maskdm.runs import sweep
from maskdm.runs.store import load_pipeline, reconstruct_ema
from maskdm.sampling import MaskDMPipeline

TINY = [
    "--model.width", "16", "--depth", "1", "--heads", "2", "--threads", "1", "--precision", "fp32",
    "--pretrain.budget.steps", "6", "--finetune.budget.steps", "4", "--pretrain.batch", "8", "--finetune.batch", "8",
    "--intervals.save", "2", "--intervals.evaluate", "5", "--intervals.sample", "5", "--sampling.steps", "2", "--sampling.num", "4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path_factory.getbasetemp() / "maskdm-cache"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    out = tmp_path / "run"
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(out), *TINY]) == 0
    return out


def test_ema_sweep_measures_each_length_and_saves_the_best(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["ema-sweep", str(finished), "--sigma-rel", "0.05,0.1,0.2", "--num", "40", "--save"]) == 0
    said = capsys.readouterr().out
    found = json.loads((finished / "ema_sweep.json").read_text())
    assert [point["sigma_rel"] for point in found["points"]] == [0.05, 0.1, 0.2]
    assert (found["measure"], found["stage"], found["step"], found["provenance"]["num_images"]) == ("heldout-loss", "finetune", 10, 40)
    best = min(found["points"], key=lambda point: point["value"])
    assert found["best"] == best["sigma_rel"] and f"best: sigma_rel {best['sigma_rel']:g}" in said
    for point in found["points"]:
        assert point["interval"][0] < point["value"] < point["interval"][1]
        assert point["difference"] == pytest.approx(point["value"] - found["ordinary"]["value"])
        assert point["difference_interval"][0] <= point["difference"] <= point["difference_interval"][1]
    assert found["beats_ordinary"] == (best["difference_interval"][1] < 0)
    assert found["ordinary"]["checkpoint"].endswith("step-00000010-finetune")
    assert [each["step"] for each in found["snapshots"]] == [7, 8, 9, 10]
    pipeline = MaskDMPipeline.from_pretrained(finished / f"model-ema-{best['sigma_rel']:g}")
    weights, origin = reconstruct_ema(finished, best["sigma_rel"])
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.unet.state_dict().items())
    assert "average of sigma_rel" in origin and "from 4 snapshots" in origin


def test_only_averages_of_one_step_are_judged_against_each_other(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["ema-sweep", str(finished), "--sigma-rel", "0.1", "--num", "40"]
    assert run_command(command) == 0
    assert "the average that training kept" in capsys.readouterr().out
    for step in (9, 10):
        (finished / "snapshots" / "finetune" / f"step-{step:08}.safetensors").rename(finished / f"{step}")
    assert run_command(command) == 0
    found = json.loads((finished / "ema_sweep.json").read_text())
    assert found["step"] == found["ordinary"]["step"] == 8 and found["ordinary"]["checkpoint"].endswith("step-00000008")
    assert found["beats_ordinary"] is not None
    for step in (9, 10):
        (finished / f"{step}").rename(finished / "snapshots" / "finetune" / f"step-{step:08}.safetensors")
    shutil.rmtree(finished / "checkpoints" / "step-00000010-finetune")
    capsys.readouterr()
    assert run_command(command) == 0
    found, lines = json.loads((finished / "ema_sweep.json").read_text()), capsys.readouterr().out.splitlines()
    assert (found["step"], found["ordinary"]["step"], found["beats_ordinary"]) == (10, 8, None)
    assert lines[1].split()[:2] == ["0.1", "10"] and lines[2].split()[:3] == ["as", "trained", "8"]
    assert "no checkpoint is of the same step" in lines[3]


def test_the_average_of_a_stored_length_is_the_one_tracked(finished: Path) -> None:
    for stage, step in (("pretrain", 6), ("finetune", 10)):
        powers = load_file(finished / "checkpoints" / f"step-{step:08}-{stage}" / "powers.safetensors")
        weights, _ = reconstruct_ema(finished, 0.1, stage)
        assert len(weights) * 2 == len(powers)
        for name, value in weights.items():
            torch.testing.assert_close(value, powers[f"0.1/{name}"], rtol=2**-10, atol=1e-6)


def test_samples_of_another_average(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["sample", str(finished), "--out", str(tmp_path / "a"), "--num", "1", "--ema", "0.25"]) == 0
    assert "average of sigma_rel 0.25 at step 10" in capsys.readouterr().err
    trained, long = (load_pipeline(finished, sigma_rel=length)[0].unet.state_dict() for length in (None, 0.25))
    expected = reconstruct_ema(finished, 0.25)[0]
    assert all(torch.equal(value, expected[name]) for name, value in long.items())
    assert not all(torch.equal(value, trained[name]) for name, value in long.items())
    assert run_command(["sample", str(finished), "--out", str(tmp_path / "x"), "--ema", "0.5"]) == 2
    assert "above 0 and up to 0.288" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--weights raw and --ema 0\.1 both given; name one"):
        load_pipeline(finished, "raw", 0.1)


def test_a_sweep_without_what_it_needs_is_refused_by_name(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra, message in (
        (["--stage", "finetun"], "has pretrain, finetune; did you mean finetune?"),
        (["--sigma-rel", "0.1,0.5"], "sigma_rel is 0.5"),
        (["--num", "1"], "too few to measure"),
    ):
        assert run_command(["ema-sweep", str(finished), *extra]) == 2
        assert message in capsys.readouterr().err
    shutil.rmtree(finished / "snapshots" / "finetune")
    assert reconstruct_ema(finished, 0.1)[1].startswith(str(finished / "snapshots" / "pretrain"))
    shutil.rmtree(finished / "snapshots")
    for command in (["ema-sweep", str(finished)], ["sample", str(finished), "--out", "x", "--ema", "0.1"]):
        assert run_command(command) == 2
        assert "has no snapshots of averages; train with --ema.snapshots 8" in capsys.readouterr().err
    assert not (finished / "ema_sweep.json").exists()


def test_a_run_begun_by_an_older_version_goes_on_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["train", "digits", "--recipe", "digits", "--out", str(out), *TINY]
    assert run_command([*command, "--ema.snapshots", "0"]) == 0
    assert not (out / "snapshots").exists()
    for checkpoint in (out / "checkpoints").iterdir():  # as 0.1.0 wrote them
        plain = json.loads((checkpoint / "manifest.json").read_text())
        del plain["powers"]
        (checkpoint / "manifest.json").write_text(json.dumps(plain))
    config = yaml.safe_load((out / "config.yaml").read_text())
    del config["ema"]["snapshots"], config["ema"]["sigma_rel"], config["tracking"]
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    again = ["train", "digits", "--out", str(out), "--finetune.budget.steps", "8", "--fork"]
    assert run_command(again) == 0
    assert "no averages for snapshots (an older version" in capsys.readouterr().err
    weights, origin = reconstruct_ema(out, 0.05)
    assert "step 14, from 4 snapshots" in origin
    assert all(torch.isfinite(value).all() for value in weights.values())


class Means(FeatureNetwork):
    """The images' pixels, averaged in pairs of rows."""

    def embed(self, images: Tensor) -> Tensor:
        return images.float().unflatten(2, (4, 2)).mean(dim=3).flatten(1) / 255

    def scores(self, images: Tensor) -> None:
        return None


def test_a_sweep_by_kernel_distance(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sweep, "choose_network", lambda *_: Means("means", "0", 32, 0, "none", 64))
    command = ["ema-sweep", str(finished), "--measure", "kernel-distance", "--sigma-rel", "0.05,0.2"]
    assert run_command([*command, "--num", "20"]) == 0
    found = json.loads((finished / "ema_sweep.json").read_text())
    provenance = found["provenance"]
    assert (provenance["num_samples"], provenance["num_reference"], provenance["features"]) == (20, 1438, "means")
    for point in [*found["points"], found["ordinary"]]:
        assert point["interval"][0] < point["value"] < point["interval"][1]
    assert found["beats_ordinary"] is None and all(point["difference_interval"] is None for point in found["points"])
    assert found["best"] == min(found["points"], key=lambda point: point["value"])["sigma_rel"]
    assert run_command([*command, "--num", "5"]) == 2
    assert "needs at least 10 samples" in capsys.readouterr().err


def test_a_stage_that_ends_early_leaves_a_last_snapshot(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", "digits", "--recipe", "digits", "--out", str(out), *TINY, "--finetune.budget.steps", "100", "--ema.snapshots", "4"]
    patience = ["--evaluation.patience", "1", "--finetune.lr", "3", "--finetune.warmup", "0", "--intervals.evaluate", "1"]
    assert run_command([*command, *patience]) == 0
    last = json.loads((out / "run.json").read_text())["stages"][1]["steps"]
    assert last < 25  # before the first of the four was due
    assert [path.name for path in (out / "snapshots" / "finetune").iterdir()] == [f"step-{6 + last:08}.safetensors"]
