"""Several processes train as one does; none waits for one that is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskdm.cli import run_command
from maskdm.engine import checkpoint
from maskdm.engine.ranks import Ranks, first_host, pieces_of

STEPS = 50
TRAIN = [
    "train", "digits", "--recipe", "digits", "--model.width", "16", "--depth", "1", "--heads", "2", "--threads", "1", "--precision", "fp32",
    "--pretrain.budget.minutes", "none", "--finetune.budget.minutes", "none", "--intervals.log", "1", "--intervals.save", "20",
    "--intervals.evaluate", "25", "--intervals.sample", "25", "--sampling.steps", "2", "--sampling.num", "5",
    "--pretrain.batch", "9", "--finetune.batch", "9", "--pretrain.budget.steps", "30", "--finetune.budget.steps", "20",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def start(world: int, out: Path, cache: str, *more: str, code: str | None = None) -> list[subprocess.Popen[str]]:
    """The processes of a run, as torchrun would start them; `code` runs before it."""
    return processes_of(world, [*TRAIN, "--out", str(out), *more], cache, code)


def processes_of(world: int, arguments: list[str], cache: str, code: str | None = None) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASKDM_CACHE": cache, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    shared |= {"LOCAL_WORLD_SIZE": str(world), "GOMP_SPINCOUNT": "1000"}
    main = f"import sys; from maskdm.cli import run_command; {code or 'pass'}\nsys.exit(run_command({arguments!r}))"
    return [
        subprocess.Popen(
            [sys.executable, "-c", main],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    try:
        found = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def lines(out: Path, event: str = "train") -> list[dict[str, Any]]:
    written = (out / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in written[: written.rfind("\n") + 1].splitlines()]  # the last line may be half there
    return [line for line in found if line["event"] == event]


def wait_for(out: Path, step: int, processes: list[subprocess.Popen[str]], limit: float = 90) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if (out / "metrics.jsonl").is_file() and any(line["step"] >= step for line in lines(out)):
            return
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    ((code, _, said),) = finish(start(1, out, cache))
    assert code == 0, said
    return out


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one_does(world: int, alone: Path, tmp_path: Path, cache: str) -> None:
    out = tmp_path / "run"
    ended = finish(start(world, out, cache))  # nine images a batch: shares of unequal size
    assert [code for code, _, _ in ended] == [0] * world, ended
    assert "samples" in ended[0][1] and all(text == "" for _, text, _ in ended[1:])
    one, several = lines(alone), lines(out)
    assert [line["step"] for line in several] == list(range(1, STEPS + 1))
    for a, b in zip(one, several, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["images"] == a["images"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    for a, b in zip(lines(alone, "heldout"), lines(out, "heldout"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    assert json.loads((out / "run.json").read_text())["environment"]["processes"] == world
    assert (out / "samples.png").is_file() and (out / "model").is_dir()


@pytest.mark.slow
def test_several_processes_share_samples_and_their_measurement(alone: Path, tmp_path: Path, cache: str) -> None:
    measured = []
    for world in (1, 3):
        out, draw = tmp_path / str(world), ["--steps", "3", "--precision", "fp32", "--num"]
        drawn = finish(processes_of(world, ["sample", str(alone), "--out", str(out), *draw, "2"], cache))  # fewer images than processes
        assert [(code, bool(text)) for code, text, _ in drawn] == [(0, True), *[(0, False)] * (world - 1)], drawn
        found = out / "found.json"
        ended = finish(processes_of(world, ["evaluate", str(alone), *draw, "50", "--out", str(found)], cache))
        assert [(code, bool(text)) for code, text, _ in ended] == [(0, True), *[(0, False)] * (world - 1)], ended
        measured.append(json.loads(found.read_text())["frechet_distance"])
    for name in ("sample-000000.png", "sample-000001.png", "grid.png"):
        one, three = (np.asarray(Image.open(tmp_path / world / name)).astype(int) for world in "13")
        assert np.abs(one - three).max() <= 1
    assert measured[1] == pytest.approx(measured[0], rel=1e-3)


@pytest.mark.slow
def test_without_the_mean_of_the_gradients_it_would_not(alone: Path, tmp_path: Path, cache: str) -> None:
    """The defect of the published code: each process goes by its own gradients."""
    no_mean = (
        "import maskdm.engine.trainer as t; t.DistributedDataParallel = lambda network, **_: network; "
        "t.Trainer._unshared = lambda self: t.contextlib.nullcontext()"
    )
    out = tmp_path / "run"
    ended = finish(start(2, out, cache, code=no_mean))
    assert [code for code, _, _ in ended] == [0, 0], ended
    apart = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(lines(alone), lines(out), strict=True)]
    assert max(apart) > 1e-3


@pytest.mark.slow
def test_one_process_goes_on_with_the_run_of_two(alone: Path, tmp_path: Path, cache: str) -> None:
    out = tmp_path / "run"
    both = start(2, out, cache)
    wait_for(out, 22, both)
    for process in both:
        process.send_signal(signal.SIGTERM)
    ended = finish(both)
    assert [code for code, _, _ in ended] == [130, 130] and "the same command resumes" in ended[0][2]
    ((code, _, said),) = finish(start(1, out, cache))
    assert code == 0, said
    for a, b in zip(lines(alone), lines(out), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.slow
def test_when_one_is_killed_the_other_ends_and_says_so_and_the_run_resumes(alone: Path, tmp_path: Path, cache: str) -> None:
    out = tmp_path / "run"
    both = start(2, out, cache)
    wait_for(out, 22, both)
    both[1].kill()
    started = time.monotonic()
    code, _, said = finish(both, 60)[0]
    assert time.monotonic() - started < 60 and code == 1
    assert "process 1 on" in said and "no sign of life" in said and "the same command resumes" in said and "Traceback" not in said
    ended = finish(start(2, out, cache))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert [line["step"] for line in lines(out)] == list(range(1, STEPS + 1))
    assert lines(out)[-1]["loss"] == pytest.approx(lines(alone)[-1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_torchrun_begins_again_by_itself(alone: Path, tmp_path: Path, cache: str) -> None:
    out = tmp_path / "run"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--max-restarts",
        "1",
        "--nproc-per-node",
        "2",
        "-m",
        "maskdm",
    ]
    agent = subprocess.Popen(
        [*torchrun, *TRAIN, "--out", str(out)],
        env=os.environ | {"MASKDM_CACHE": cache, "GOMP_SPINCOUNT": "1000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(out, 22, [agent])
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    trainers = [int(child) for child in children if "maskdm" in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(trainers) == 2
    os.kill(trainers[1], signal.SIGKILL)
    ((code, _, said),) = finish([agent], 240)
    assert code == 0 and "resuming from" in said, said
    assert [line["step"] for line in lines(out)] == list(range(1, STEPS + 1))
    assert lines(out)[-1]["loss"] == pytest.approx(lines(alone)[-1]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stops", ["the process", "its main thread"])
def test_when_one_hangs_the_others_end_within_a_minute(stops: str, tmp_path: Path, cache: str) -> None:
    out = tmp_path / "run"
    hang = (
        "import os, time, maskdm.engine.trainer as t; g = t.Trainer._gradients; "
        "due = lambda self: os.environ['RANK'] == '1' and self.progress.step == 22; "
        "t.Trainer._gradients = lambda self, *a: (due(self) and time.sleep(999), g(self, *a))[1]"
    )
    both = start(2, out, cache, code=hang if stops == "its main thread" else None)
    wait_for(out, 22, both)
    started = time.monotonic()
    if stops == "the process":
        both[1].send_signal(signal.SIGSTOP)
    said = both[0].communicate(timeout=75)[1]
    assert time.monotonic() - started < 60 and both[0].returncode == 1
    assert ("no sign of life" if stops == "the process" else "nothing moves") in said and "process 1" in said and "Traceback" not in said
    if stops == "the process":
        both[1].kill()
    _, _, its = finish(both)[1]
    if stops == "its main thread":
        assert "nothing moves" in its and "in <lambda>" in its  # the stack shows where


@pytest.mark.slow
def test_a_network_cut_over_processes_trains_as_a_whole_one(alone: Path, tmp_path: Path, cache: str) -> None:
    out = tmp_path / "run"
    cut = start(3, out, cache, "--shard", "true")
    wait_for(out, 22, cut)
    for process in cut:
        process.send_signal(signal.SIGTERM)
    ended = finish(cut)
    assert [code for code, _, _ in ended] == [130] * 3, ended
    for path in (out / "checkpoints").iterdir():
        names = sorted(file.name for file in path.iterdir())
        assert len(names) == 5 and names[0] == "manifest.json" and all(name.endswith(".safetensors") for name in names[1:])  # no pickle
    ended = finish(start(2, out, cache, "--shard", "true"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert [line["step"] for line in lines(out)] == list(range(1, STEPS + 1))
    for event in ("train", "heldout"):
        for a, b in zip(lines(alone, event), lines(out, event), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    assert (out / "samples.png").is_file()
    drawn = tmp_path / "drawn"
    assert run_command(["sample", str(out), "--num", "2", "--steps", "2", "--out", str(drawn)]) == 0
    theirs = checkpoint.load(alone / "checkpoints" / "step-00000050-finetune").tensors
    ours = checkpoint.load(out / "checkpoints" / "step-00000050-finetune").tensors
    assert ours.keys() == theirs.keys() and all(ours[file].keys() == theirs[file].keys() for file in ours)
    assert all((ours["average"][name] - value).abs().max() < 1e-3 for name, value in theirs["average"].items())


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)])
def test_a_cut_network_goes_on_whole_and_a_whole_one_cut(worlds: tuple[int, int], alone: Path, tmp_path: Path, cache: str) -> None:
    out = tmp_path / "run"
    first = start(worlds[0], out, cache, "--shard", "true")
    wait_for(out, 22, first)
    for process in first:
        process.send_signal(signal.SIGTERM)
    finish(first)
    ended = finish(start(worlds[1], out, cache, "--shard", "true"))
    assert [code for code, _, _ in ended] == [0] * worlds[1], ended
    for a, b in zip(lines(alone), lines(out), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_cut_network_learns_in_bf16_and_in_pieces(alone: Path, tmp_path: Path, cache: str) -> None:
    out = tmp_path / "run"
    pieces = ["--pretrain.accumulate", "3", "--finetune.accumulate", "3"]
    ended = finish(start(2, out, cache, "--shard", "true", "--precision", "bf16", *pieces))
    assert [code for code, _, _ in ended] == [0, 0], ended
    for a, b in zip(lines(alone), lines(out), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.03)


@pytest.mark.slow
def test_a_batch_too_small_is_refused(tmp_path: Path, cache: str) -> None:
    ended = finish(start(2, tmp_path / "run", cache, "--finetune.batch", "1"))
    assert [code for code, _, _ in ended] == [2, 2]
    assert "stages.finetune.batch 1 leaves some of 2 processes without an image" in ended[0][2]


@pytest.mark.parametrize(("count", "world"), [(9, 2), (9, 4), (8, 8), (7, 3)])
def test_shares_are_all_of_it_once(count: int, world: int) -> None:
    parts = [Ranks(rank, world).part(count) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(count)) and max(map(len, parts)) - min(map(len, parts)) <= 1
    pieces = pieces_of(parts[0], 2)
    assert [i for piece in pieces for i in piece] == list(parts[0]) and all(len(piece) for piece in pieces)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("gpu[03-07,09]", "gpu03"), ("a1,b2", "a1"), ("n[1,3]-ib", "n1-ib"), ("rack2-gpu[12-13],x", "rack2-gpu12")],
)
def test_the_first_of_slurms_machines(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_srun_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    from maskdm.engine import ranks

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    told = {
        "STEP_NUM_TASKS": "8",
        "PROCID": "5",
        "LOCALID": "1",
        "STEP_NODELIST": "gpu[1-2]",
        "JOB_ID": "123",
        "STEP_TASKS_PER_NODE": "4(x2)",
    }
    with monkeypatch.context() as patch:
        for name, value in told.items():
            patch.setenv(f"SLURM_{name}", value)
        before = dict(os.environ)
        ranks._read_slurm()
        found = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")}
        for name in set(os.environ) - set(before):
            del os.environ[name]
    assert list(found.values()) == ["8", "5", "1", "gpu1", "20123", "4"]
