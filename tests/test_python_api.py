"""`maskdm.train` and `maskdm.Run`: what the command line does, in Python, from notebooks and threads."""

from __future__ import annotations

import builtins
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import maskdm
from maskdm.api import _check, assignments
from maskdm.cli import run_command, split_settings
from maskdm.config import BlockMask, Budget, Stage
from maskdm.errors import UserError
from maskdm.recipes import recipe
from maskdm.runs import Display
from maskdm.runs.train import stop_requests
from maskdm.settings import leaves, override

TINY: dict[str, Any] = {
    "recipe": "digits", "width": 16, "depth": 2, "heads": 2, "threads": 1, "precision": "fp32", "sampling__steps": 2, "sampling__num": 4,
    "pretrain__budget__steps": 2, "finetune__budget__steps": 2, "pretrain__batch": 8, "finetune__batch": 8, "tracking": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path_factory.getbasetemp() / "maskdm-cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> maskdm.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDM_CACHE", str(tmp_path_factory.getbasetemp() / "maskdm-cache"))
        return maskdm.train("digits", tmp_path_factory.mktemp("api") / "run", quiet=True, **TINY)


def test_importing_is_light_and_names_are_listed() -> None:
    code = "import sys, maskdm; assert not {'torch', 'diffusers', 'PIL'} & set(sys.modules); print(*dir(maskdm))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(found) == sorted(maskdm.__all__)


def test_a_run_is_what_the_command_makes(run: maskdm.Run, tmp_path: Path) -> None:
    command = json.loads((run.path / "run.json").read_text())["command"]
    words = shlex.split(command)
    assert words[:2] == ["maskdm", "train"] and "--finetune.budget.steps" in words
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert run_command(words[1:]) == 0
    theirs, ours = (path / "model" / "unet" / "diffusion_pytorch_model.safetensors" for path in (tmp_path / "again", run.path))
    assert theirs.read_bytes() == ours.read_bytes()
    assert run.metrics[0]["event"] == "stage" and run.metrics[-1]["step"] == 4
    assert maskdm.train("digits", run, quiet=True, **TINY) == run == maskdm.Run(str(run.path), quiet=True)
    assert (run._repr_png_() or b"").startswith(b"\x89PNG")


def test_images_are_those_of_the_command(run: maskdm.Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--num", "3", "--seed", "5", "--steps", "3", "--labels", "3", "1", "--guidance", "2", "--scheduler", "unipc"]
    assert run_command(["sample", str(run.path), "--out", str(tmp_path), *options]) == 0
    capfd.readouterr()
    images = run.sample(3, seed=5, steps=3, labels=[3, "1"], guidance=2.0, scheduler="unipc")
    assert capfd.readouterr() == ("", "")
    for number, image in enumerate(images):
        with Image.open(tmp_path / f"sample-{number:06}.png") as file:
            assert np.array_equal(np.asarray(file), np.asarray(image))
    alike = run.sample(2, labels=3, steps=2)
    assert [a.tobytes() for a in alike] == [b.tobytes() for b in run.sample(2, labels="3", steps=2)]


def test_pipeline_evaluate_and_export(run: maskdm.Run, tmp_path: Path) -> None:
    averaged, raw = (run.pipeline(weights).unet.state_dict() for weights in ("ema", "raw"))
    assert any(not averaged[name].equal(raw[name]) for name in raw)
    figures = run.evaluate(num=20, steps=2)
    assert figures["num_samples"] == 20 and figures == json.loads((run.path / "metrics.json").read_text())
    out = run.export(tmp_path / "model", licence="mit")
    assert "license: mit" in (out / "README.md").read_text()
    for name, kept in (("a", range(40)), ("b", range(20, 60))):
        (tmp_path / name).mkdir()
        for number in kept:
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / name / f"{number}.png")
    found = maskdm.evaluate_images(tmp_path / "a", tmp_path / "b", quiet=True)
    assert found["num_samples"] == 40 and found["frechet_distance"] > 0


def test_settings_are_those_of_the_command_line() -> None:
    given: dict[str, Any] = {
        "image_size": (16, 32), "channels": 3, "pretrain__mask": BlockMask(0.75, 2), "stages__finetune__lr": 1e-5,
        "flip": 0.5, "data__conditional": False, "finetune__budget__minutes": None, "init": Path("a b"), "heldout": np.float32(0.25),
    }  # fmt: skip
    words = ["--image-size", "16x32", "--channels", "3", "--pretrain.mask", "{kind: block, ratio: 0.75, size: 2}"]
    words += [
        "--stages.finetune.lr",
        "1e-5",
        "--flip",
        "0.5",
        "--data.conditional",
        "false",
        "--init",
        "a b",
        "--heldout",
        "0.25",
        "--finetune.budget.minutes",
        "none",
    ]
    base = recipe("digits", "digits")
    assert override(base, assignments(given)) == override(base, split_settings(words).settings)
    stages = [Stage("one", Budget(steps=3), BlockMask(0.5, 2)), Stage("two", Budget(minutes=2.0))]
    assert override(base, assignments({"stages": stages})).stages == tuple(stages)


def test_no_setting_has_a_name_with_two_underscores_or_of_a_parameter() -> None:
    import inspect

    parameters = {name for each in (maskdm.train, maskdm.compare) for name in inspect.signature(each).parameters} - {"settings"}
    for leaf in leaves(recipe("digits", "digits")):
        assert "__" not in leaf.path and leaf.path not in parameters


def test_bad_input_is_the_error_of_the_command_line(run: maskdm.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", "digits", "--out", str(tmp_path / "a"), "--recipe", "digits", "--mask.ratoi", "0.5"]) == 2
    said = capsys.readouterr().err.removeprefix("maskdm: error: ").strip()
    with pytest.raises(UserError) as raised:
        maskdm.train("digits", tmp_path / "a", recipe="digits", mask__ratoi=0.5)
    assert str(raised.value) == said and maskdm.UserError is UserError and not (tmp_path / "a").exists()
    assert raised.value._render_traceback_() == [f"UserError: {said}"]
    for wrong, words in (
        (lambda: maskdm.Run(tmp_path / "none"), "none is not there"),
        (lambda: run.sample(0), "must be at least 1"),
        (lambda: run.sample(1, labels="eleven"), "'eleven' is no class"),
        (lambda: _check("scheduler", "unpic", ("ddim", "unipc")), "scheduler is 'unpic'; give one of ddim, unipc; did you mean unipc?"),
        (lambda: run.export(run.path), "is the run itself"),
        (lambda: maskdm.train("digits", run, **TINY | {"width": 32}), "model.width"),
    ):
        with pytest.raises(UserError) as raised:
            wrong()
        assert words in str(raised.value)


# --- interrupts and threads ---------------------------------------------------------------------------------------


def test_an_interrupt_saves_restores_the_handlers_and_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskdm.runs.observe import Observer

    before, settings = signal.getsignal(signal.SIGINT), TINY | {"finetune__budget__steps": 30}
    after = Observer.after

    def interrupted(self: Observer, step: Any, bar: Any) -> None:
        after(self, step, bar)
        if step.number == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Observer, "after", interrupted)
        with pytest.raises(maskdm.Interrupted, match="stopped by SIGINT at step 8 and saved"):
            maskdm.train("digits", tmp_path / "run", quiet=True, **settings)
    assert signal.getsignal(signal.SIGINT) is before
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    run = maskdm.train("digits", tmp_path / "run", quiet=True, **settings)
    assert [r["step"] for r in run.metrics if r["event"] == "resume"] == [8] and run.metrics[-1]["step"] == 32


def test_another_thread_may_train(tmp_path: Path) -> None:
    found: list[object] = []

    def work() -> None:
        try:
            found.append(maskdm.train("digits", tmp_path / "run", quiet=True, **TINY))
        except BaseException as error:
            found.append(error)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], maskdm.Run) and signal.getsignal(signal.SIGTERM) is before


def test_a_handler_that_is_not_pythons_is_put_back_as_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, Any]] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: calls.append((number, handler)))
    with stop_requests() as asked:
        assert asked == []
    assert [handler for _, handler in calls[3:]] == [signal.SIG_DFL] * 3


# --- in a notebook ------------------------------------------------------------------------------------------------


class ZMQInteractiveShell:
    """What rich knows a notebook by."""


def test_a_notebook_has_one_line_of_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter's kernel does
    monkeypatch.setattr("maskdm.runs.display.NOTEBOOK_SECONDS", 0.0)
    display = Display()
    figures = {"images_per_second": 10.0, "share_of_ceiling": 0.5, "data_wait": 0.0, "memory": 2.0**30, "loss": 0.5}
    with display.training() as bar:
        for share in (0.25, 0.5):
            bar.update("pretrain", share, int(100 * share), 1.0, figures)
        display.note("a note")
        bar.update("pretrain", 1.0, 100, 1.0, figures)
    display.note("the end")
    said = capsys.readouterr()
    lines = said.out.split("\n")
    assert said.err == "" and lines[0].count("\r") == 2 and "step 50" in lines[0]
    assert lines[1] == "a note" and "step 100" in lines[2] and lines[3:] == ["the end", ""]
    quiet = Display(quiet=True)
    with quiet.counting("drawing") as count:
        count(1, 2)
    quiet.note("nothing")
    assert capsys.readouterr() == ("", "")
