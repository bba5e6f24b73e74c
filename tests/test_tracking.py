"""Trackers: TensorBoard is read back; wandb and trackio run where they are installed, and a recording stand-in runs always."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskdm.config import DiTConfig, Optimizer, TrackerName
from maskdm.engine import make_optimizer
from maskdm.errors import UserError
from maskdm.evaluation import denoising_loss
from maskdm.models import build
from maskdm.recipes import recipe
from maskdm.runs import Display, Diverged, TrainRequest, train
from maskdm.runs.directory import RunDirectory
from maskdm.tracking import BINS, Histogram, Tracker, Trackers, histogram, network_histograms, require

IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
SHAPE = Histogram(np.arange(BINS, dtype=np.float64), np.linspace(-1.0, 1.0, BINS + 1), 3.0, 5.0)

STAND_IN = """
class Thing:
    def __init__(self, *values, **named):
        self.values, self.named = values, named

Image = Histogram = Html = Markdown = Settings = Thing
calls = []

class Run:
    def log(self, values, step=None):
        calls.append(("log", values, step))
    def define_metric(self, *values, **named):
        calls.append(("define_metric", values, named))
    def finish(self):
        calls.append(("finish",))

def init(**named):
    print("hello from a server")
    calls.append(("init", named))
    return Run()

def finish():
    calls.append(("finish",))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules wandb and trackio that record what they are told."""
    place = tmp_path / "packages"
    place.mkdir()
    for name in ("wandb", "trackio"):
        (place / f"{name}.py").write_text(STAND_IN)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(place))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def calls(name: str) -> list[Any]:
    return sys.modules[name].calls


def open_all(folder: Path, *names: TrackerName, step: int = 0) -> tuple[Trackers, list[tuple[str, str]]]:
    failures: list[tuple[str, str]] = []
    folder.mkdir(exist_ok=True)
    return Trackers(names, folder, step, {"seed": 1}, lambda name, error: failures.append((name, error))), failures


def tell_everything(trackers: Trackers) -> None:
    trackers.scalars({"train/loss": 0.5, "train/lr": 1e-3}, 3)
    trackers.image("samples", IMAGE, 4)
    trackers.histogram("weights/blocks.0", SHAPE, 4)
    trackers.text("config", "a: <1>", 4)


# --- TensorBoard, read back ---


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "images": 0, "histograms": 0, "scalars": 0})
    return accumulator.Reload()


def test_tensorboard_is_read_back(tmp_path: Path) -> None:
    trackers, failures = open_all(tmp_path, "tensorboard")
    tell_everything(trackers)
    trackers.close()
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(3, 0.5)]
    assert [(e.step, e.height, e.width) for e in found.Images("samples")] == [(4, 4, 6)]
    value = found.Histograms("weights/blocks.0")[0].histogram_value
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (-1, 1, BINS * (BINS - 1) / 2, 3, 5)
    assert [count for count in value.bucket if count] == list(range(1, BINS))
    assert "a: &lt;1&gt;" in str(found.Tensors("config/text_summary")[0].tensor_proto)
    assert failures == [] and not (tmp_path / "tracking.json").exists()


def test_steps_that_are_done_again_are_purged(tmp_path: Path) -> None:
    for start, value in ((0, 1.0), (2, 2.0)):
        trackers, _ = open_all(tmp_path, "tensorboard", step=start)
        for step in range(start + 1, 5):
            trackers.scalars({"loss": value}, step)
        trackers.close()
        time.sleep(1.1)  # event files are read in the order of the second in their names
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


# --- wandb and trackio ---


@pytest.mark.usefixtures("stand_in")
def test_adapters_say_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trackers, failures = open_all(tmp_path / "run 1", "wandb", "trackio")
    tell_everything(trackers)
    trackers.close()
    assert failures == []
    identity = json.loads((tmp_path / "run 1" / "tracking.json").read_text())["id"]
    wandb, trackio = calls("wandb"), calls("trackio")
    begun = wandb[0][1]
    assert (begun["project"], begun["name"], begun["id"], begun["resume"], begun["mode"]) == (
        "maskdm",
        "run 1",
        identity,
        "allow",
        "offline",
    )
    assert begun["config"] == {"seed": 1} and begun["dir"] == str(tmp_path / "run 1")
    assert ("define_metric", ("*",), {"step_metric": "step"}) in wandb
    assert wandb[3][1] == {"train/loss": 0.5, "train/lr": 1e-3, "step": 3}
    assert [set(each[1]) for each in wandb[4:7]] == [{"samples", "step"}, {"weights/blocks.0", "step"}, {"config", "step"}]
    assert trackio[0][1]["name"] == f"run 1-{identity}" and trackio[0][1]["resume"] == "allow"
    assert trackio[1] == ("log", {"train/loss": 0.5, "train/lr": 1e-3}, 3)
    for found in (wandb[4:7], trackio[2:5]):
        image, shape, text = (each[1][name] for each, name in zip(found, ("samples", "weights/blocks.0", "config"), strict=True))
        assert image.values[0] is IMAGE and shape.named["np_histogram"] == (SHAPE.counts, SHAPE.edges)
        assert "a: " in text.values[0]
    assert wandb[-1] == trackio[-1] == ("finish",)
    said = capsys.readouterr()
    assert said.out.count("hello") == said.err.count("hello") == 1  # what trackio prints is moved out of the results' way


@pytest.mark.usefixtures("stand_in")
def test_a_resumed_run_is_the_same_run_there(tmp_path: Path) -> None:
    for _ in range(2):
        open_all(tmp_path / "run", "wandb", "trackio")[0].close()
    for name, key in (("wandb", "id"), ("trackio", "name")):
        assert len({each[1][key] for each in calls(name) if each[0] == "init"}) == 1
    open_all(tmp_path / "other", "wandb")
    assert len({each[1]["id"] for each in calls("wandb") if each[0] == "init"}) == 2
    (tmp_path / "run" / "tracking.json").write_text("{")  # damaged: a new run there, rather than none
    assert open_all(tmp_path / "run", "wandb")[1] == []


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("variables", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({}, "machine api.wandb.ai login user password key", "online"),
        ({}, "machine elsewhere.org login user password key", "offline"),
        ({"WANDB_BASE_URL": "https://elsewhere.org"}, "machine elsewhere.org login user password key", "online"),
        ({}, "not a netrc file", "offline"),
        ({"WANDB_API_KEY": "k"}, "", "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "", "disabled"),
        ({"WANDB_MODE": "online"}, "", "online"),
    ],
)
def test_wandb_is_offline_unless_the_user_is_logged_in(
    variables: dict[str, str], netrc: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    open_all(tmp_path / "run", "wandb")
    assert calls("wandb")[0][1]["mode"] == mode


# the packages themselves, each in a process of its own: they keep servers and threads, and warn of much


def run_for_real(name: TrackerName, folder: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    code = (
        "from pathlib import Path; import sys; sys.path[:0] = [sys.argv[1]]; import test_tracking as t;"
        "trackers, failures = t.open_all(Path(sys.argv[2]), sys.argv[3]); t.tell_everything(trackers); trackers.close();"
        "assert failures == [], failures"
    )
    environment = os.environ | {"TRACKIO_DIR": str(folder / "store"), "WANDB_MODE": "offline"}
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder), name]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_wandb_itself_offline(tmp_path: Path) -> None:
    run_for_real("wandb", tmp_path)
    identity = json.loads((tmp_path / "tracking.json").read_text())["id"]
    (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{identity}")
    stored = (folder / f"run-{identity}.wandb").read_bytes()
    assert [name for name in (b"train/loss", b"weights/blocks.0", b"samples", b"config") if name not in stored] == []
    assert len(list(folder.glob("files/media/images/samples_*.png"))) == 1


def test_trackio_itself(tmp_path: Path) -> None:
    run_for_real("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "store" / "maskdm.db") as base:
        rows = " ".join(str(row) for row in base.execute("select * from metrics"))
    assert [name for name in ("train/loss", "weights/blocks.0", "samples", "config") if name not in rows] == []


# --- failing ---


class Failing:
    """A tracker whose server goes away."""

    def __init__(self) -> None:
        self.told = 0

    def scalars(self, values: Any, step: int) -> None:
        self.told += 1
        raise ConnectionError("no route\nto host")

    image = histogram = text = scalars

    def close(self) -> None:
        raise AssertionError("it was dropped")


def test_one_that_fails_is_named_once_and_dropped(tmp_path: Path) -> None:
    trackers, failures = open_all(tmp_path, "tensorboard")
    failing = Failing()
    assert isinstance(failing, Tracker)
    trackers._open["wandb"] = failing
    for step in range(3):
        trackers.scalars({"loss": 1.0}, step)
    trackers.close()
    assert failures == [("wandb", "ConnectionError: no route to host")] and failing.told == 1
    assert [e.step for e in events(tmp_path).Scalars("loss")] == [0, 1, 2]
    trackers.scalars({"loss": 1.0}, 9)  # closed: told to nobody
    assert not trackers


def test_histograms_that_cannot_be_computed_are_given_up_and_the_trackers_kept(tmp_path: Path) -> None:
    trackers, failures = open_all(tmp_path, "tensorboard")

    def fail() -> dict[str, Histogram]:
        raise TypeError("no float64 here")

    for step in range(2):
        trackers.histograms(fail, step)
        trackers.scalars({"loss": 1.0}, step)
    trackers.histograms(lambda: {"weights/a": SHAPE}, 2)
    trackers.close()
    assert failures == [("histograms", "TypeError: no float64 here")]
    assert [e.step for e in events(tmp_path).Scalars("loss")] == [0, 1] and events(tmp_path).Tags()["histograms"] == []
    trackers.histograms(fail, 3)  # nobody is left: nothing is computed
    assert len(failures) == 1


TINY = (
    ("model.width", "16"), ("depth", "1"), ("heads", "2"), ("threads", "1"), ("precision", "fp32"), ("pretrain.batch", "8"),
    ("pretrain.budget.steps", "3"), ("finetune.budget.steps", "2"), ("finetune.batch", "8"), ("log", "1"), ("evaluate", "2"),
    ("sampling.steps", "1"), ("sampling.num", "2"),
)  # fmt: skip


def tracked_run(out: Path, tracking: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[dict[str, Any]]:
    monkeypatch.setenv("MASKDM_CACHE", str(cache))
    train(TrainRequest("digits", out, recipe="digits", settings=(*TINY, ("tracking", tracking))), "maskdm train", Display())
    return [json.loads(line) for line in RunDirectory(out).metrics_log.read_text().splitlines()]


@pytest.mark.usefixtures("stand_in")
def test_a_run_outlives_its_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import wandb  # pyright: ignore

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb.Run, "log", fail)
    import trackio  # pyright: ignore

    monkeypatch.setattr(trackio, "init", fail)
    lines = tracked_run(tmp_path / "run", "wandb,trackio", monkeypatch, tmp_path)
    failed = [line for line in lines if line["event"] == "tracker"]
    assert [(line["name"], line["step"], line["state"]) for line in failed] == [("trackio", 0, "dropped"), ("wandb", 0, "dropped")]
    assert all("No space left" in line["error"] for line in failed)
    assert RunDirectory(tmp_path / "run").info()["status"] == "finished"
    told = "OSError: [Errno 28] No space left on device"
    assert f"tracking: wandb failed ({told}) and is left out from here on" in capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"<b>Tracking:</b> wandb failed at step 0 and was left out from there on ({told})." in page


def test_a_run_tells_figures_pictures_and_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked_run(tmp_path / "run", "tensorboard", monkeypatch, tmp_path)
    found = events(tmp_path / "run")
    tags = found.Tags()
    assert [e.step for e in found.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert {"train/lr", "train/grad_norm", "train/images_per_second", "heldout/loss"} <= set(tags["scalars"])
    assert [e.step for e in found.Images("samples")] == [3, 5]
    assert {"weights/blocks.0", "weights/patch_embedding", "updates (log10)/blocks.0"} <= set(tags["histograms"])
    assert [e.step for e in found.Histograms("weights/blocks.0")] == [2, 3, 4, 5]
    assert "config/text_summary" in tags["tensors"]


@pytest.mark.usefixtures("stand_in")
def test_every_tracker_is_closed_when_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskdm.engine.trainer.learning_rate", lambda *_: float("nan"))
    with pytest.raises(Diverged):
        tracked_run(tmp_path / "run", "wandb", monkeypatch, tmp_path)
    assert calls("wandb")[-1] == ("finish",)


def test_a_package_that_is_not_there_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(UserError, match=r"--tracking wandb needs a package .*pip install 'maskdm\[track\]'"):
        tracked_run(tmp_path / "run", "tensorboard,wandb", monkeypatch, tmp_path)
    assert not (tmp_path / "run").exists()
    require(("tensorboard",))


# --- histograms ---


def test_a_histogram_counts_every_finite_value() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0], [2.0, float("nan"), float("inf")]])
    found = histogram(values)
    assert found is not None
    expected, edges = np.histogram([0.0, 1.0, 2.0, 2.0], bins=BINS)
    np.testing.assert_array_equal(found.counts, expected)
    np.testing.assert_allclose(found.edges, edges)
    assert (found.total, found.squares) == (5.0, 9.0)
    alike = histogram(torch.full((7,), 0.25))
    assert alike is not None and alike.counts.sum() == 7 and alike.edges[0] < 0.25 < alike.edges[-1]
    assert histogram(torch.tensor([float("nan")])) is None


class OnMetal(torch.Tensor):
    """A tensor of a device without float64, as Apple's GPUs are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.double:
            raise TypeError("the MPS framework doesn't support float64")
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else found


def test_nothing_is_widened_on_a_device_without_float64() -> None:
    found = histogram(torch.arange(5.0).as_subclass(OnMetal))
    assert found is not None and (found.total, found.squares) == (10.0, 30.0)
    config = recipe("digits", "x")
    model = build(DiTConfig(width=16, depth=1, heads=2, patch=4), config.data, 0)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    loss = denoising_loss(model, config.diffusion, images, None)
    assert denoising_loss(model, config.diffusion, images.as_subclass(OnMetal), None).loss == loss.loss
    assert loss.errors.dtype == torch.float64


def test_updates_are_what_the_optimizer_did() -> None:
    torch.manual_seed(0)
    model = build(DiTConfig(width=16, depth=2, heads=2, patch=4), recipe("digits", "x").data, 0)
    optimizer = make_optimizer(model, Optimizer(weight_decay=0.0), 1e-2)
    assert not any(name.startswith("updates") for name in network_histograms(model, optimizer.param_groups, optimizer.state))
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    found = network_histograms(model, optimizer.param_groups, optimizer.state)
    names = {name.partition("/")[2] for name in found}
    assert {"blocks.0", "blocks.1"} <= names and len(found) == 2 * len(names)
    for block in names:
        members = [(n, p) for n, p in model.named_parameters() if n == block or n.startswith(f"{block}.")]
        changes = torch.cat([(p.detach() - before[n]).abs().flatten() for n, p in members])
        expected = changes[changes > 1e-6].log10()  # below, the difference of two fp32 numbers says nothing
        updates, weights = found[f"updates (log10)/{block}"], found[f"weights/{block}"]
        assert weights.counts.sum() == updates.counts.sum() == len(changes)
        assert updates.edges[-1] == pytest.approx(float(expected.max()), abs=0.02)
        middles = (updates.edges[1:] + updates.edges[:-1]) / 2
        assert updates.total / len(changes) == pytest.approx(float((updates.counts * middles).sum()) / len(changes), abs=0.1)
        assert updates.total / len(changes) == pytest.approx(float(expected.mean()), abs=0.1)
