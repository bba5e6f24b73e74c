"""Slower proofs, by `make test-slow`."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maskdm.cli import run_command

pytestmark = pytest.mark.slow

LONG = ["--pretrain.budget.minutes", "none", "--finetune.budget.minutes", "none", "--intervals.evaluate", "500"]


def test_the_digits_recipe_learns_digits(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert run_command(["train", "digits", "--recipe", "digits", "--out", out]) == 0
    assert run_command(["evaluate", out, "--num", "1000"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["class_accuracy"] >= 0.95
    assert metrics["frechet_distance"] <= 1.5 * metrics["frechet_distance_heldout"]
    assert metrics["train_seconds"] < 300


def test_five_random_kills_change_nothing(tmp_path: Path) -> None:
    sizes = ["--model.width", "64", "--pretrain.budget.steps", "200", "--finetune.budget.steps", "100", "--intervals.save", "25"]
    arguments = ["train", "digits", "--recipe", "digits", *sizes, "--pretrain.batch", "32", "--finetune.batch", "32"]
    assert run_command([*arguments, "--out", str(tmp_path / "whole")]) == 0
    killed = [*arguments, "--out", str(tmp_path / "killed")]
    chance = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-m", "maskdm", *killed], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(5, 12))
        process.kill()
        process.wait()
    assert run_command(killed) == 0
    for file in ("model", "average", "optimizer"):
        name = Path("checkpoints", "step-00000300-finetune", f"{file}.safetensors")
        expected, got = load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name)
        assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_short_chaos_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.chaos", "--kills", "10", "--work", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == found["survived"] == 12 and found["mismatches"] == 0


@pytest.mark.parametrize(("count", "copies"), [(20, True), (1700, False)])
def test_a_model_that_memorised_is_told_from_one_that_did_not(
    count: int, copies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.datasets import load_digits

    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    pixels = np.asarray(load_digits().images)[np.random.default_rng(0).permutation(1797)[:count]]
    np.save(tmp_path / "images.npy", (pixels * (255 / 16)).round().astype(np.uint8)[..., None])
    settings = ["--heldout", "0.5" if copies else "0.1", "--model.width", "128", "--depth", "6", "--heads", "4", "--no-conditional"]
    steps = ["--pretrain.budget.steps", "100", "--finetune.budget.steps", "2500", "--pretrain.batch", "64", "--finetune.batch", "64"]
    out = tmp_path / "run"
    assert run_command(["train", str(tmp_path / "images.npy"), "--recipe", "digits", "--out", str(out), *settings, *steps, *LONG]) == 0
    assert run_command(["evaluate", str(out), "--num", "300"]) == 0
    found = json.loads((out / "metrics.json").read_text())
    assert ("It copies" in " ".join(found["verdicts"])) == copies, found["verdicts"]
    assert (found["copies"]["share"] > 0.3) == copies
    assert (found["denoising"]["gap_interval"][0] > 0.1 * found["denoising"]["train"]) == copies


COMPILED = """
import torch
from benchmarks.ours import OurStep
from maskdm.config import DiTConfig, NoMask, PatchMask, UViTConfig

for model in (DiTConfig(32, 2, 2, 2), UViTConfig(32, 3, 2, 2)):
    for mask in (PatchMask(0.5), NoMask()):
        losses = []
        for compiled in (False, True):
            torch.manual_seed(0)  # of the weights
            steps = OurStep(model, 8, 8, mask, "fp32", torch.device("cpu"), compiled).trainer.run()
            losses.append(torch.stack([next(steps).loss.detach() for _ in range(4)]))
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
counters = torch._dynamo.utils.counters
print(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
"""


def test_a_compiled_step_is_the_eager_one_and_each_network_is_one_graph_a_mask() -> None:
    """In a process of its own, as users have it: the checks of shapes in tests are what torch.compile cannot see through."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "0"]
