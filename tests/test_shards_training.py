"""Training on shards: each image once an epoch, by any number of processes, through kills, servers that fail, and losses."""

from __future__ import annotations

import json
import shutil
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import settings, write_digits
from shard_helpers import faulty_server, files_of
from test_distributed import finish, processes_of, wait_for

from maskdm.cli import run_command
from maskdm.config import Budget, Config, Data, PatchMask, Stage, UViTConfig
from maskdm.data import Feed, Latents, Loader, ShardLoader, make_loader, open_source, pack, prepare, shards
from maskdm.data.remote import Remote
from maskdm.data.shards import ShardDataset
from maskdm.engine import Trainer
from maskdm.engine.ranks import Ranks, pieces_of
from maskdm.errors import UserError
from maskdm.models import build

SETTINGS = settings(channels=1)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "REMOTE", Remote(timeout=2.0, tries=20, pause=0.001))
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """103 digits in eleven shards, two of them alike."""
    folder = tmp_path_factory.mktemp("shards")
    source = open_source(str(write_digits(tmp_path_factory.mktemp("digits"), 103)))
    pack(source, SETTINGS, folder / "out", 10)
    return folder / "out"


def opened(location: str, data: Data = SETTINGS) -> ShardDataset:
    found = prepare(open_source(location), data, Path("unused"))
    assert isinstance(found, ShardDataset)
    return found


def read_by(dataset: ShardDataset, rows: np.ndarray, ranks: int, parts: tuple[tuple[int, int], ...], batch: int = 12) -> list[int]:
    """Rows of the batches of some steps, each part by fresh loaders, which know their position alone; pixels are compared."""
    seen: list[int] = []
    for first, last in parts:
        loaders = [ShardLoader(dataset, rows, seed=3) for _ in range(ranks)]
        for rank, loader in enumerate(loaders):
            part = Ranks(rank, ranks).part(batch)
            loader.begin(0, batch, part)
            for step in range(first, last):
                found = loader.batch(step * batch + part.start, len(part))
                seen += found.rows.tolist()
                assert np.array_equal(found.images.numpy().transpose(0, 2, 3, 1), dataset.images[found.rows.numpy()])
    return seen


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_image_comes_once_an_epoch_in_any_number_of_processes(packed: Path, ranks: int) -> None:
    dataset = opened(str(packed), replace(SETTINGS, shuffle=30))
    training, heldout = dataset.split(0.07, seed=0)
    assert len(training) == 96 and not set(training) & set(heldout)
    seen = read_by(dataset, training, ranks, ((0, 3), (3, 4), (4, 16)))
    assert sorted(seen) == sorted([*training.tolist()] * 2)


def test_each_image_comes_once_over_a_faulty_server(packed: Path) -> None:
    with faulty_server(files_of(packed, "/s"), stall=0.3) as (address, requests):
        dataset = opened(f"{address}/s", replace(SETTINGS, shuffle=48))
        before = len(requests)
        seen = read_by(dataset, np.arange(103), 1, ((0, 3), (3, 8)))
        assert sorted({*seen}) == sorted(seen) and len(seen) == 96
    assert before < len(requests)


def test_processes_read_their_own_part_alone(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened(str(packed), replace(SETTINGS, shuffle=1000))
    asked: list[int] = []
    read = dataset.reader.read
    monkeypatch.setattr(dataset.reader, "read", lambda rows: (asked.extend(rows.tolist()), read(rows))[1])
    loader = ShardLoader(dataset, np.arange(96), seed=0)
    loader.begin(0, 12, range(4))
    mine = [row for step in range(8) for row in loader.batch(step * 12, 4).rows.tolist()]
    assert len(mine) == 32 and sorted(mine) == sorted({*asked} & {*mine})
    assert len({*asked}) <= 32 + 32  # the rest: of the epoch after, read ahead


def test_windows_are_read_ahead_and_left_behind(packed: Path) -> None:
    dataset = opened(str(packed), replace(SETTINGS, shuffle=24))
    loader = ShardLoader(dataset, np.arange(96), seed=0)
    loader.begin(0, 12, range(12))
    for step in range(20):
        loader.batch(step * 12, 12)
        held = sum(len(future.result()) for _, future in loader._windows.values())
        assert held <= 3 * 24


def test_a_feed_of_shards_reads_the_next_piece_of_its_process(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    loader = make_loader(opened(str(packed)), np.arange(103), 0)
    asked: list[tuple[int, int]] = []
    batch = loader.batch
    monkeypatch.setattr(loader, "batch", lambda position, count: (asked.append((position, count)), batch(position, count))[1])
    feed = Feed(loader, CPU)
    feed.read_ahead()
    pieces = pieces_of(Ranks(1, 3).part(13), 2)
    expected = make_loader(opened(str(packed)), np.arange(103), 0)
    expected.begin(0, 13, range(13))
    for step in range(4):
        feed.begin(0, 13, pieces)
        for piece in pieces:
            found = feed.batch(step * 13 + piece.start, len(piece))
            assert torch.equal(found.images, expected.batch(step * 13 + piece.start, len(piece)).images)
    feed.rows(0, 13, 0)  # what was read ahead is there, and forgotten
    assert asked == [(step * 13 + piece.start, len(piece)) for step in range(4) for piece in pieces] + [(4 * 13 + 4, 2)]
    assert isinstance(make_loader(prepare(open_source("digits"), SETTINGS, packed.parent / "cache"), np.arange(9), 0), Loader)


# --- losses ---


def copied(packed: Path, to: Path) -> Path:
    to.mkdir()
    for path in packed.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_lost_shards_and_images_are_replaced_and_named(packed: Path, tmp_path: Path) -> None:
    folder = copied(packed, tmp_path / "out")
    (folder / "000002.tar").unlink()
    body = bytearray((folder / "000005.tar").read_bytes())
    body[600:610] = b"x" * 10
    (folder / "000005.tar").write_bytes(body)
    dataset = opened(str(folder), settings(channels=1, max_broken=0.12))
    loader = ShardLoader(dataset, np.arange(103), seed=3)
    loader.begin(0, 12, range(12))
    found = [row for step in range(9) for row in loader.batch(step * 12, 12).rows.tolist()]
    order = loader.indices_at(0, 9 * 12).tolist()
    gone = {*range(20, 30), 50}
    assert all(a == b for a, b in zip(order, found, strict=True) if a not in gone) and not {*found} & gone
    losses = loader.news()
    assert [(loss.name, loss.images) for loss in sorted(losses, key=lambda each: each.name)] == [("000002.tar", 10), ("000005.tar#0", 1)]
    assert "No such file" in losses[0].reason + losses[1].reason and loader.news() == []
    again = ShardLoader(dataset, np.arange(103), seed=3)
    again.begin(0, 12, range(12))
    assert [row for step in range(9) for row in again.batch(step * 12, 12).rows.tolist()] == found
    assert np.array_equal(dataset.images[np.array([21, 5, 50])], dataset.images[np.array([5, 5, 5])])
    with pytest.raises(UserError, match=r"1 of 1 images asked for .*000002.tar.* nothing can stand in"):
        dataset.images[np.array([25])]


def test_too_many_losses_end_the_run_by_name(packed: Path, tmp_path: Path) -> None:
    folder = copied(packed, tmp_path / "out")
    (folder / "000002.tar").write_bytes(b"cut off")
    loader = ShardLoader(opened(str(folder)), np.arange(103), seed=3)
    loader.begin(0, 12, range(12))
    with pytest.raises(UserError, match=r"10 of 103 images .*000002.tar: ends before byte.*--max-broken 0.1"):
        [loader.batch(step * 12, 12) for step in range(9)]
    with pytest.raises(UserError, match="10 of 103 images"):
        loader.dataset.images[np.array([20, 3])]
    other = ShardLoader(opened(str(folder)), np.arange(103), seed=3)
    with pytest.raises(UserError, match=r"000002.tar"):  # another process has found it
        other.admit(loader.news())


# --- runs ---


def config(location: str) -> Config:
    return Config(
        data=replace(SETTINGS, source=location),
        model=UViTConfig(width=16, depth=3, heads=2, patch=2),
        stages=(
            Stage("one", Budget(steps=6), PatchMask(0.5), batch=12, lr=1e-2),
            Stage("two", Budget(steps=6), batch=8, lr=1e-2, accumulate=2),
        ),
    )


def test_a_run_on_shards_goes_on_bit_for_bit_by_its_position(packed: Path) -> None:
    def trainer() -> Trainer:
        torch.manual_seed(0)
        dataset = opened(str(packed), replace(SETTINGS, shuffle=30))
        made = config(str(packed))
        return Trainer(made, make_loader(dataset, np.arange(103), 0), build(made.model, made.data, 0), CPU, "fp32")

    whole = trainer()
    assert len(list(whole.run())) == 12

    stopped = trainer()
    for step in stopped.run():
        if step.number == 9:
            break
    tensors = {file: {name: value.clone() for name, value in group.items()} for file, group in stopped.tensors().items()}
    resumed = trainer()
    resumed.restore(tensors, json.loads(json.dumps(stopped.numbers())))
    assert [step.number for step in resumed.run()] == [10, 11, 12]
    for name, value in whole.tensors()["model"].items():
        assert torch.equal(value, resumed.tensors()["model"][name])


ARGUMENTS = [
    "--model.width", "16", "--depth", "3", "--heads", "2", "--patch", "2", "--image-size", "8", "--threads", "1", "--precision", "fp32",
    "--pretrain.budget.minutes", "none", "--finetune.budget.minutes", "none",
    "--pretrain.budget.steps", "4", "--finetune.budget.steps", "4", "--pretrain.batch", "9", "--finetune.batch", "9",
    "--intervals.log", "2", "--intervals.save", "2", "--sampling.steps", "2",
    "--sampling.num", "4", "--heldout", "0.2", "--tracking", "none", "--ema.snapshots", "0",
]  # fmt: skip


def events(out: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == name]


def test_the_command_trains_on_a_url_and_says_what_is_lost(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = files_of(packed, "/s")
    del files["/s/000004.tar"]
    out = tmp_path / "run"
    with faulty_server(files, stall=0.3) as (address, _):
        assert run_command(["train", f"{address}/s", "--out", str(out), "--max-broken", "0.1", "--shuffle", "32", *ARGUMENTS]) == 0
        assert "000004.tar cannot be read" in " ".join(capsys.readouterr().err.split())
        (lost,) = events(out, "lost")
        assert (lost["what"], lost["name"], lost["images"]) == ("shard", "000004.tar", 10) and "404" in lost["reason"]
        assert events(out, "heldout") and json.loads((out / "run.json").read_text())["data"]["count"] == 103
    assert run_command(["train", str(packed), "--out", str(out), "--max-broken", "0.1", "--shuffle", "32", *ARGUMENTS]) == 0
    assert "nothing to do" in capsys.readouterr().out  # the same shards elsewhere are the same data
    refused = ["train", str(packed), "--out", str(tmp_path / "none"), "--shuffle", "0"]
    assert run_command(refused) == 2 and "data.shuffle is 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_verbs_take_shards(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And those that measure end by name where an image is lost, as figures would rest on what stands in."""
    shutil.copytree(packed, tmp_path / "shards")
    out, data = tmp_path / "run", str(tmp_path / "shards")
    assert run_command(["train", data, "--out", str(out), *ARGUMENTS]) == 0
    assert run_command(["plan", data, *ARGUMENTS]) == 0
    assert run_command(["sample", str(out), "--num", "2", "--steps", "2", "--out", str(tmp_path / "samples")]) == 0
    measure = ["evaluate", str(out), "--num", "20", "--steps", "2", "--features", "self"]
    assert run_command(measure) == 0
    sizes = [
        "--width",
        "16",
        "--depth",
        "2",
        "--heads",
        "2",
        "--image-size",
        "8",
        "--num",
        "20",
        "--heldout",
        "0.2",
        "--sampling.steps",
        "2",
    ]
    batches = ["--pretrain.batch", "8", "--finetune.batch", "8", "--pretrain.warmup", "1"]
    compare = [
        "compare",
        data,
        "--recipe",
        "digits",
        "--budget",
        "48images",
        "--seeds",
        "1",
        "--arms",
        "whole,patch-50@60",
        *sizes,
        *batches,
    ]
    assert run_command([*compare, "--out", str(tmp_path / "compared")]) == 0
    capsys.readouterr()
    (tmp_path / "shards" / "000003.tar").unlink()
    shutil.rmtree(tmp_path / "cache")
    assert run_command(measure) == 2
    assert "000003.tar" in (said := capsys.readouterr().err) and "nothing can stand in" in said and "Traceback" not in said


TOLD = """
import json, os, zlib
from maskdm.data import ShardLoader
batch = ShardLoader.batch
def told(self, position, count):
    found = batch(self, position, count)
    with open(f"{os.environ['TOLD']}/{os.environ['RANK']}-{os.getpid()}", "a") as file:
        file.write(json.dumps([position, found.rows.tolist(), [zlib.crc32(image.numpy().tobytes()) for image in found.images]]) + chr(10))
    return found
ShardLoader.batch = told
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_processes_over_a_faulty_server_killed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image of an epoch exactly once, its own pixels, and the same at a position whenever it is computed."""
    told, out = tmp_path / "told", tmp_path / "run"
    told.mkdir()
    monkeypatch.setenv("TOLD", str(told))
    pack(open_source(str(write_digits(tmp_path / "digits", 300))), SETTINGS, tmp_path / "out", 30)
    (tmp_path / "tell.py").write_text(TOLD)
    changes = ["--shuffle", "90", "--heldout", "0.1", "--pretrain.budget.steps", "45", "--finetune.budget.steps", "15"]
    with faulty_server(files_of(tmp_path / "out", "/s"), stall=0.3) as (address, requests):
        command = ["train", f"{address}/s", "--out", str(out), *ARGUMENTS, *changes]

        def begin() -> list[subprocess.Popen[str]]:
            return processes_of(3, command, str(tmp_path / "cache"), f"exec(open({str(tmp_path / 'tell.py')!r}).read())")

        for step in (8, 22):
            processes = begin()
            wait_for(out, step, processes, limit=400)
            for process in processes:
                process.kill()
            finish(processes)
        ended = finish(begin(), timeout=600)
        assert all(code == 0 for code, _, _ in ended), ended
        assert len(requests) > 100
    assert len({*told.iterdir()}) == 9 and [line["step"] for line in events(out, "resume")]
    there = opened(str(tmp_path / "out"))
    sums = [zlib.crc32(np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes()) for image in there.images[np.arange(300)]]
    at: dict[int, list[int]] = {}
    for file in told.iterdir():
        for position, rows, pixels in map(json.loads, file.read_text().splitlines()):
            assert at.setdefault(position, rows) == rows and pixels == [sums[row] for row in rows]
    assert not events(out, "lost") and len(events(out, "resume")) == 2
    training, _ = there.split(0.1, 0)
    assert len(training) == 270 and sorted(at) == list(range(0, 60 * 9, 3))
    for first, last in ((0, 270), (270, 540)):  # an epoch; and what the second stage, of the same batch, begins afresh, after half of one
        rows = [row for position in range(first, last, 3) for row in at[position]]
        whole = sorted(rows) == training.tolist()
        assert whole if first == 0 else len({*rows[:135]}) == len({*rows[135:]}) == 135


def test_latents_of_shards_are_read_from_the_cache(packed: Path) -> None:
    dataset = opened(str(packed))
    values = np.zeros((len(dataset), 1, 3, 4, 4), dtype=np.float16)
    loader = make_loader(replace(dataset, latents=Latents(values, (0.0,) * 3, (1.0,) * 3)), np.arange(20), 0)
    assert not loader.streams and loader.batch(0, 5).images.shape == (5, 1, 3, 4, 4)
