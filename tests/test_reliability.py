"""What a broken disk, a second process or a signal may cost a run: nothing but the steps since the last checkpoint."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from maskdm.cli import run_command
from maskdm.engine import checkpoint
from maskdm.errors import UserError
from maskdm.runs.directory import RunDirectory, held

TINY = [
    "--model.width", "16", "--depth", "1", "--heads", "2", "--threads", "1", "--precision", "fp32",
    "--pretrain.budget.steps", "6", "--finetune.budget.steps", "4", "--pretrain.batch", "8", "--finetune.batch", "8",
    "--intervals.log", "1", "--intervals.save", "2", "--intervals.evaluate", "5", "--intervals.sample", "5",
    "--sampling.steps", "2", "--sampling.num", "4",
]  # fmt: skip
TRAIN = ["train", "digits", "--recipe", "digits", *TINY]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path_factory.getbasetemp() / "maskdm-cache"))


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(folder, f"step-{step:08}", {"model": {"w": torch.full((3,), float(step))}}, {"step": step})


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / "step-00000010-finetune" / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "train"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path / "model.safetensors", 10),
    "flipped": lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1] + b"\x00"),
    "absent": lambda path: (path / "model.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"format": 2, "fil'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6)
    for name in ("step-00000006", "step-00000004"):
        DAMAGE[damage](tmp_path / name)
    found, wrong = checkpoint.load_latest(tmp_path)
    assert found is not None and found.numbers == {"step": 2} and torch.equal(found.tensors["model"]["w"], torch.full((3,), 2.0))
    assert [error.path.name for error in wrong] == ["step-00000006", "step-00000004"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-step-00000004", "damaged-step-00000006", "step-00000002"]


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_again(tmp_path: Path) -> None:
    save(tmp_path, 2)
    DAMAGE["cut"](tmp_path / "step-00000002")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        checkpoint.load_latest(tmp_path)
    assert (tmp_path / "step-00000002").is_dir()
    assert checkpoint.load_latest(tmp_path / "nowhere") == (None, [])


def test_one_of_another_version_is_refused_not_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    manifest = tmp_path / "step-00000004" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load_latest(tmp_path)
    assert manifest.is_file()


def test_a_kill_between_the_two_moves_that_replace_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)
    moves: list[Any] = []
    move = os.replace

    def one_move(source: Any, target: Any) -> None:
        if moves:
            raise KeyboardInterrupt
        moves.append(source)
        move(source, target)

    monkeypatch.setattr(os, "replace", one_move)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, "step-00000002", {"model": {"w": torch.zeros(3)}}, {"step": 2})
    monkeypatch.undo()
    assert not (tmp_path / "step-00000002").exists()
    found, wrong = checkpoint.load_latest(tmp_path)
    assert found is not None and found.tensors["model"]["w"][0] == 2 and not wrong
    save(tmp_path, 4)
    checkpoint.rotate(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_what_the_disk_refuses_leaves_the_one_before_and_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        save(tmp_path, 4)
    assert raised.value.errno == errno.ENOSPC and [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow), pytest.param(errno.EROFS, marks=pytest.mark.slow)]
)
def test_a_disk_that_is_full_for_a_while_costs_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([*TRAIN, "--out", str(tmp_path / "whole")]) == 0
    sync, calls = checkpoint.sync, [0]

    def sometimes(path: Path) -> None:
        calls[0] += 1
        if 10 <= calls[0] < 60:
            raise OSError(number, os.strerror(number), str(path))
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", sometimes)
    monkeypatch.setattr("maskdm.runs.directory.sync", sometimes)
    capsys.readouterr()
    code = run_command([*TRAIN, "--out", str(tmp_path / "faulty")])
    said = capsys.readouterr().err
    assert calls[0] > 10 and "the run goes on" in said
    if code != 0:  # the fault outlasted the run
        assert code == 1 and "the same command goes on" in said and "Traceback" not in said
        calls[0] = 1000
        assert run_command([*TRAIN, "--out", str(tmp_path / "faulty")]) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "faulty"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "faulty")


def test_lines_that_the_disk_refuses_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    run = RunDirectory(tmp_path)
    run.say = said.append
    run.log("train", 1, loss=1.0)
    flush = RunDirectory.flush

    def full(self: RunDirectory) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunDirectory, "flush", full)
    run.log("train", 2, loss=2.0)
    run.log("train", 3, loss=3.0)
    monkeypatch.setattr(RunDirectory, "flush", flush)
    run.log("train", 4, loss=4.0)
    assert losses(tmp_path) == [(n, float(n)) for n in (1, 2, 3, 4)]
    assert [line.split(" (")[0] for line in said] == ["cannot write metrics.jsonl", "metrics.jsonl: can be written again"]
    run.say = None
    monkeypatch.setattr(RunDirectory, "flush", full)
    with pytest.raises(OSError, match="No space"):
        run.log("train", 5, loss=5.0)


def test_the_second_process_in_a_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run_command([*TRAIN, "--out", str(out)]) == 0
    more = [*TRAIN, "--finetune.budget.steps", "6", "--fork", "--out", str(out)]
    with held(out):
        before = (out / "run.json").read_text()
        assert run_command(more) == 2
        assert f"{out} is in use by another process, it seems {os.getpid()} on " in capsys.readouterr().err
        assert (out / "run.json").read_text() == before
    assert run_command(more) == 0


def test_a_run_that_was_never_begun_leaves_no_directory(tmp_path: Path) -> None:
    assert run_command([*TRAIN, "--init", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_sigusr1_saves_and_the_same_command_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*TRAIN, "--pretrain.budget.steps", "100000", "--intervals.save", "100000", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "maskdm", *command], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and not (out / "metrics.jsonl").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped by SIGUSR1" in said and "the same command resumes" in said
    assert len(checkpoint.names(out / "checkpoints")) == 1
