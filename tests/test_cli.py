"""The command line as a person meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import maskdm
from maskdm.cli import run_command, split_settings
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


def test_help_is_there_and_imports_nothing_heavy() -> None:
    code = """
import sys, maskdm.cli
for verb in ([], ["train"]):
    maskdm.cli.run_command([*verb, "--help"])
print({"torch", "numpy", "diffusers", "PIL"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    for text in ("train", "sample", "evaluate", "report", "--stages.pretrain.mask.ratio", "share of the patches hidden", "--dry-run"):
        assert text in done.stdout


def test_version_and_module() -> None:
    done = subprocess.run([sys.executable, "-m", "maskdm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"maskdm {maskdm.__version__}"


def test_completion() -> None:
    done = subprocess.run([sys.executable, "-m", "maskdm", "--tyro-print-completion", "bash"], capture_output=True, text=True, check=True)
    assert "evaluate" in done.stdout and "complete" in done.stdout


def test_settings_are_told_from_options() -> None:
    line = split_settings(
        ["train", "--image-size", "32", "here", "--out=x", "--compile", "--no-stratified", "--clip=none", "--fork", "--recipe", "digits"]
    )
    assert line.rest == ["train", "here", "--out=x", "--fork", "--recipe", "digits"]
    assert line.settings == [("image-size", "32"), ("compile", "true"), ("stratified", "false"), ("clip", "none")]


def bad_inputs(path: Path) -> dict[str, tuple[list[str], str]]:
    (path / "empty").mkdir()
    (path / "broken").mkdir()
    (path / "broken" / "one.png").write_text("no image")
    (path / "file").write_text("x")
    (path / "full").mkdir()
    (path / "full" / "thing.txt").write_text("x")
    (path / "bad.yaml").write_text("data: {imagesize: 3}")
    out = ["--out", str(path / "out")]
    return {
        "misspelt setting": (["train", "digits", *out, "--mask.rattio", "0.5"], "did you mean mask.ratio?"),
        "missing folder": (["train", str(path / "absent"), *out], "absent"),
        "misspelt name": (["train", "digit", *out], "did you mean digits?"),
        "empty folder": (["train", str(path / "empty"), *out], "empty"),
        "one broken image": (["train", str(path / "broken"), *out], "broken"),
        "odd side": (["train", "digits", *out, "--image-size", "33"], "use --image-size 32"),
        "size and patch": (["train", "digits", *out, "--image-size", "33", "--patch", "4"], "image_size 33 is not a multiple of patch 4"),
        "flow": (["train", "digits", *out, "--recipe", "digits", "--schedule", "flow"], "does not fit the rectified flow"),
        "guidance": (["train", "digits", *out, "--no-conditional", "--guidance", "3"], "guidance needs a model trained with classes"),
        "empty mask": (["train", "digits", *out, "--mask.ratio", "0.01"], "hides nothing"),
        "odd size": (["train", "digits", *out, "--image-size", "\u00b2"], "--image-size"),
        "recipe": (["train", "digits", *out, "--recipe", "digit"], "did you mean digits?"),
        "both": (["train", "digits", *out, "--recipe", "digits", "--config", "x"], "name one"),
        "config": (["train", "digits", *out, "--config", str(path / "bad.yaml")], "data.imagesize"),
        "no config": (["train", "digits", *out, "--config", str(path / "none.yaml")], "none.yaml"),
        "out is a file": (["train", "digits", "--out", str(path / "file")], "is a file"),
        "out is not a run": (["train", "digits", "--out", str(path / "full")], "not a run's"),
        "init": (["train", "digits", *out, "--init", str(path / "absent")], "absent"),
        "no out": (["train", "digits"], "--out"),
        "no verb": (["trian", "digits"], "trian"),
        "not a run": (["sample", str(path / "full"), *out], "not the directory of a run"),
        "not a number": (["sample", str(path), *out, "--num", "many"], "--num"),
        "scheduler": (["sample", str(path), *out, "--scheduler", "ddmi"], "--scheduler"),
        "report": (["report", str(path / "empty")], "run.json"),
        "no report": (["report"], "name the directory of a run"),
        "comparison": (["report", str(path / "empty"), str(path / "full")], "run.json"),
        "report of one": (["report", str(path / "empty"), *out], "--out is for the page that compares"),
        "tracker": (["train", "digits", *out, "--tracking", "wandbb"], "did you mean wandb?"),
        "sweep": (["ema-sweep", str(path / "full")], "not the directory of a run"),
        "lengths": (["ema-sweep", str(path / "full"), "--sigma-rel", "0.1;0.2"], "lengths with commas between"),
    }


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (arguments, message) in bad_inputs(tmp_path).items():
        code = run_command(arguments)
        error = capsys.readouterr().err
        assert code == 2, (name, error)
        errors = [line for line in error.splitlines() if line.startswith("maskdm: error: ")]
        assert len(errors) == 1 and error.splitlines()[-1] == errors[0], (name, error)
        assert message in errors[0], (name, error)
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_work_for_one_process_is_refused_to_several(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(["data", "digits"]) == 2
    assert "data is work for one process; start it without torchrun" in capsys.readouterr().err


def test_a_run_leaves_what_it_promises(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {p.name for p in finished.iterdir()} >= {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "samples.png",
        "masks.png",
        "report.html",
        "model",
    }
    info = json.loads((finished / "run.json").read_text())
    assert info["status"] == "finished"
    assert [(s["name"], s["hidden"], s["steps"], s["images"]) for s in info["stages"]] == [
        ("pretrain", 0.5, 6, 48),
        ("finetune", 0.0, 4, 32),
    ]
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {
        "step-00000004",
        "step-00000006-pretrain",
        "step-00000008",
        "step-00000010-finetune",
    }
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {line["event"] for line in lines} == {"stage", "train", "heldout", "best", "sample"}
    assert [(line["step"], line["seen"]) for line in lines if line["event"] == "heldout"] == [(5, 40), (6, 48), (10, 32)]
    assert info["data"]["num_broken"] == 0
    pipeline = MaskDMPipeline.from_pretrained(finished / "model")
    average = load_file(finished / "checkpoints" / "step-00000010-finetune" / "average.safetensors")
    assert all(torch.equal(value, average[name]) for name, value in pipeline.unet.state_dict().items())
    capsys.readouterr()
    assert run_command(["train", "digits", "--recipe", "digits", "--out", str(finished), *TINY]) == 0
    assert "finished already" in capsys.readouterr().out


def test_changed_settings_are_refused_by_name_unless_forked(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["train", "digits", "--out", str(finished)]
    assert run_command([*again, "--finetune.budget.steps", "7"]) == 2
    assert "stages.finetune.budget.steps: 4 -> 7" in capsys.readouterr().err
    first = json.loads((finished / "run.json").read_text())["command"]
    assert run_command([*again, "--finetune.budget.steps", "7", "--fork"]) == 0
    info, page = (finished / name for name in ("run.json", "report.html"))
    assert json.loads(info.read_text())["stages"][1]["steps"] == 7
    assert json.loads(info.read_text())["command"].endswith("--finetune.budget.steps 7 --fork")  # the first one would be refused now
    said = page.read_text()
    assert f"At step 10 <code>--fork</code> changed stages.finetune.budget.steps: 4 -&gt; 7; begun by <code>{first}</code>" in said
    assert run_command(["train", *again[1:], "--finetune.budget.steps", "7", "--fork"]) == 0  # what the page gives goes on
    assert [json.loads(x)["changed"] for x in (finished / "metrics.jsonl").read_text().splitlines() if '"fork"' in x] == [
        ["stages.finetune.budget.steps: 4 -> 7"]
    ]
    assert len(list(finished.glob("config-before-*.yaml"))) == 1
    assert run_command([*again, "--model.width", "32", "--fork"]) == 2
    assert "model.width: 16 -> 32, which cannot change in a run" in capsys.readouterr().err
    assert run_command([*again, "--stages", "[{name: finetune, budget: {steps: 10}}]", "--fork"]) == 2
    assert "has the stages pretrain, finetune" in capsys.readouterr().err


def test_what_fails_before_the_first_step_or_after_the_last_is_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no space left")

    out = tmp_path / "run"
    command = ["train", "digits", "--recipe", "digits", "--out", str(out), *TINY]
    judged = ["--evaluation.samples", "10", "--evaluation.features", f"onnx:{tmp_path / 'absent.onnx'}"]
    assert run_command([*command, *judged]) == 2
    info = json.loads((out / "run.json").read_text())
    assert info["status"] == "failed" and "absent.onnx" in info["error"]
    assert "absent.onnx" in (out / "report.html").read_text()
    monkeypatch.setattr("maskdm.runs.observe.save_pipeline", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        run_command([*command, "--fork"])
    info = json.loads((out / "run.json").read_text())
    assert (info["status"], info["error"], info["stages"][1]["steps"]) == ("failed", "no space left", 4)
    assert "no space left" in (out / "report.html").read_text()


def test_other_data_and_damage_are_refused_by_name(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "other.npy", np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8))
    assert run_command(["train", str(tmp_path / "other.npy"), "--out", str(finished)]) == 2
    assert "was trained on digits" in capsys.readouterr().err
    damaged = finished / "checkpoints" / "step-00000010-finetune" / "average.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert run_command(["sample", str(finished), "--out", str(tmp_path / "s")]) == 2
    assert "average.safetensors is damaged" in capsys.readouterr().err
    assert run_command(["train", "digits", "--out", str(finished), "--finetune.budget.steps", "9", "--fork"]) == 0
    said = capsys.readouterr().err
    assert "average.safetensors is damaged (size or checksum differs): set aside" in said and "step-00000008 (step 8)" in said
    assert run_command(["sample", str(finished), "--num", "1", "--steps", "1", "--out", str(tmp_path / "s")]) == 0


def test_a_run_goes_on_where_the_same_images_were_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Onto a cluster's own disk, say: files have other times there, and their folder another name."""
    images, out = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8), ["--out", str(tmp_path / "run")]
    here, there = tmp_path / "here.npy", tmp_path / "there.npy"
    np.save(here, images)
    assert run_command(["train", str(here), *out, *TINY, "--patch", "2"]) == 0
    np.save(there, images)
    os.utime(there, (0, 0))
    capsys.readouterr()
    assert run_command(["train", str(there), *out]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert run_command(["train", str(there), *out, "--finetune.budget.steps", "6", "--fork"]) == 0
    np.save(there, 255 - images)
    assert run_command(["train", str(there), *out]) == 2
    assert "is other data, has changed since" in capsys.readouterr().err
    np.savez(tmp_path / "classes.npz", x=images, y=np.arange(20) % 2)  # by classes other images would be held out
    assert run_command(["train", str(tmp_path / "classes.npz"), *out]) == 2
    assert "is other data, has changed since" in capsys.readouterr().err


def test_samples_have_stable_names_and_do_not_depend_on_the_batch(finished: Path, tmp_path: Path) -> None:
    common = ["--num", "5", "--steps", "4", "--seed", "3", "--labels", "7", "2"]
    for name, extra in (("a", ["--batch", "5"]), ("b", ["--batch", "2"]), ("c", ["--scheduler", "unipc"])):
        assert run_command(["sample", str(finished), "--out", str(tmp_path / name), *common, *extra]) == 0
    pixels = {name: [np.asarray(Image.open(tmp_path / name / f"sample-{i:06}.png")).astype(int) for i in range(5)] for name in "abc"}
    assert all(abs(a - b).max() <= 1 for a, b in zip(pixels["a"], pixels["b"], strict=True))
    assert any(abs(a - c).max() > 1 for a, c in zip(pixels["a"], pixels["c"], strict=True))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["grid.png", *(f"sample-{i:06}.png" for i in range(5))]
    assert run_command(["sample", str(finished), "--out", str(tmp_path / "d"), "--labels", "eleven"]) == 2


def test_init_prints_the_weight_report(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = tmp_path / "few.npz"
    random = np.random.default_rng(0)
    np.savez(arrays, x=random.integers(0, 255, (30, 16, 16, 3), dtype=np.uint8), y=np.arange(30) % 3)
    code = run_command(
        [
            "train",
            str(arrays),
            "--out",
            str(tmp_path / "tuned"),
            "--init",
            str(finished),
            "--finetune.budget.steps",
            "2",
            "--finetune.batch",
            "4",
            "--finetune.warmup",
            "0",
            "--num",
            "4",
            "--sampling.steps",
            "2",
        ]
    )
    said = capsys.readouterr().err
    assert code == 0, said
    for line in (
        "resized: class_embedding.weight (10 -> 3 classes: 3 known by name, 0 new)",
        "resized: patch_embedding.weight (1 -> 3 channels)",
    ):
        assert line in said
    assert {each["fate"] for each in json.loads((tmp_path / "tuned" / "run.json").read_text())["init"]} == {
        "loaded",
        "resized",
    }


def test_a_run_cut_short_before_its_first_checkpoint_starts_as_it_was_told(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    (out / "samples").mkdir(parents=True)  # as a kill leaves it between the directory and its first files
    (out / "run.json").write_text("{}")
    command = ["train", "digits", "--recipe", "digits", "--out", str(out), "--init", str(finished), *TINY]
    assert run_command(command) == 0
    whole = load_file(out / "checkpoints" / "step-00000010-finetune" / "model.safetensors")
    shutil.rmtree(out / "checkpoints")
    info = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(info | {"status": "running"}))
    capsys.readouterr()
    assert run_command(command) == 0
    assert "weights from" in capsys.readouterr().err
    again = load_file(out / "checkpoints" / "step-00000010-finetune" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_init_of_another_target_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "digits", "--recipe", "digits", "--out", str(tmp_path / "x"), "--init", str(finished), *TINY]
    assert run_command([*command, "--target", "eps"]) == 2
    assert "was trained with diffusion.target v, this run has eps; use --target v" in capsys.readouterr().err


def test_dry_run_prints_the_configuration_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", "digits", "--out", str(tmp_path / "x"), "--dry-run", "--seed", "5"]) == 0
    said = capsys.readouterr()
    plain = yaml.safe_load(said.out)
    assert plain["seed"] == 5 and plain["data"]["image_size"] == 8 and plain["data"]["channels"] == 1
    assert "stage pretrain: mask patch" in said.err and "image size 8 x 8" in said.err
    assert not (tmp_path / "x").exists()
    (tmp_path / "config.yaml").write_text(said.out)
    assert run_command(["train", "digits", "--out", str(tmp_path / "x"), "--dry-run", "--config", str(tmp_path / "config.yaml")]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == plain


def test_data_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cats", "dogs & co"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "d" / name / f"{i}.png")
    (tmp_path / "d" / "cats" / "bad.png").write_text("x")
    assert run_command(["data", str(tmp_path / "d")]) == 0
    said = capsys.readouterr().out
    for text in (
        "images: 7",
        "20 x 30 (6)",
        "cats (3), dogs & co (3)",
        "broken, skipped: 1",
        "bad.png",
        "exact duplicates",
        "--max-broken",
    ):
        assert text in said


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "maskdm", *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


LONGER = [*TINY, "--pretrain.budget.steps", "60", "--finetune.budget.steps", "40", "--intervals.save", "7"]


@pytest.mark.slow
def test_killed_and_restarted_equals_undisturbed(tmp_path: Path) -> None:
    arguments = ["train", "digits", "--recipe", "digits", *LONGER]
    assert run_command([*arguments, "--out", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    process = start([*arguments, "--out", str(killed)])
    wait_for(killed / "checkpoints" / "step-00000007", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (killed / "snapshots" / "pretrain").mkdir(parents=True, exist_ok=True)
    (killed / "snapshots" / "pretrain" / "step-00000059.safetensors").write_text("of a step that is done again, and half written")
    process = start([*arguments, "--out", str(killed)])
    wait_for(killed / "checkpoints" / "step-00000060-pretrain", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() in (130, 0)  # 0 where it was through before the signal came
    assert run_command([*arguments, "--out", str(killed)]) == 0
    for file in ("model", "average", "optimizer", "powers"):
        expected, got = (
            load_file(run / "checkpoints" / "step-00000100-finetune" / f"{file}.safetensors") for run in (tmp_path / "whole", killed)
        )
        assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    files = [{p.relative_to(run): p.read_bytes() for p in run.rglob("snapshots/*/*")} for run in (tmp_path / "whole", killed)]
    assert len(files[0]) == 16 and files[0] == files[1]

    def losses(run: Path) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if line["event"] in ("train", "heldout")]

    assert losses(killed) == losses(tmp_path / "whole")


def test_evaluate_writes_metrics_with_what_they_rest_on(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["evaluate", str(finished), "--num", "60"]) == 0
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["num_samples"] == 60 and len(metrics["stages"]) == 2 and metrics["train_seconds"] > 0
    assert 0 <= metrics["class_accuracy"] <= 1 and metrics["class_accuracy_heldout"] > 0.9
    assert metrics["frechet_distance"] > metrics["frechet_distance_heldout"]  # ten steps of training draw no digits
    assert metrics["provenance"]["steps"] == 2 and metrics["provenance"]["checkpoint"].endswith("(averaged)")
    assert (finished / "neighbours.png").is_file()
    assert "FID" not in capsys.readouterr().out + (finished / "report.html").read_text()


def test_report_compares_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"status": "running"}')
    monkeypatch.chdir(tmp_path)
    assert run_command(["report", "a", "b"]) == run_command(["report", "b", "a", "--out", "page.html"]) == run_command(["report", "a"]) == 0
    assert capsys.readouterr().out.split() == ["compare.html", "page.html", "a/report.html"]
    assert all((tmp_path / file).is_file() for file in ("compare.html", "page.html", "a/report.html"))
