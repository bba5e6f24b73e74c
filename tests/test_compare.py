"""`maskdm compare` on real digits, with budgets in images so that the same command gives the same figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from maskdm import runs
from maskdm.cli import run_command, split_settings
from maskdm.errors import UserError
from maskdm.recipes import recipe
from maskdm.runs.compare import Contestant, Cost
from maskdm.settings import to_yaml

SMALL = [
    *("--width", "32", "--depth", "2", "--heads", "2", "--num", "20", "--sampling.steps", "3"),
    *("--pretrain.batch", "16", "--finetune.batch", "16", "--pretrain.warmup", "1", "--finetune.warmup", "1"),
]


def command(out: Path, *more: str, seeds: int = 2) -> list[str]:
    return ["compare", "digits", "--recipe", "digits", "--budget", "640images", "--seeds", str(seeds), "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("compare") / "cmp"
    assert run_command(command(out, "--arms", "whole,again=whole,patch-50@60")) == 0
    return out, json.loads((out / "compare.json").read_text())


def test_every_arm_has_its_figures_with_intervals(done: tuple[Path, dict[str, Any]]) -> None:
    out, found = done
    assert list(found["arms"]) == ["whole", "again", "patch-50@60"]
    for arm in found["arms"].values():
        for name in ("time", "flops", "images", "loss", "distance", "precision", "recall"):
            low, high = arm[f"{name}_interval"]
            assert low <= arm[name] <= high and arm["seeds"] == 2
    whole, masked = found["arms"]["whole"], found["arms"]["patch-50@60"]
    assert whole["images"] == masked["images"] == 640  # 40 steps of 16, wherever a stage ends
    assert masked["flops"] == pytest.approx(whole["flops"] * (0.4 + 0.6 * 0.5), rel=0.05)
    assert (out / "compare.png").stat().st_size > 10_000
    assert (out / "arms" / "whole" / "seed-1" / "samples.png").is_file()
    assert found["features"]["name"].startswith("self")


def test_two_arms_that_are_the_same_show_no_difference(done: tuple[Path, dict[str, Any]]) -> None:
    _, found = done
    same = next(verdict for verdict in found["verdicts"] if verdict["arm"] == "again")
    assert same["text"].startswith("no difference:") and same["speedup"] == same["low"] == same["high"] == 1
    assert same["loss_difference"] == same["distance_difference"] == 0
    curves = found["curves"]
    assert [[r["loss"] for r in seed] for seed in curves["again"]] == [[r["loss"] for r in seed] for seed in curves["whole"]]
    assert curves["whole"][0][-1]["loss"] != curves["whole"][1][-1]["loss"]  # seeds differ
    assert [len(seed) for seed in curves["whole"]] == [20, 20]


def test_run_again_it_measures_nothing_twice_and_says_the_same(done: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    out, found = done
    monkeypatch.setattr(Contestant, "save", lambda self: pytest.fail("nothing is left to train"))
    assert run_command(command(out, "--arms", "whole,again=whole,patch-50@60")) == 0
    assert json.loads((out / "compare.json").read_text()) == found


def test_a_comparison_that_was_stopped_goes_on_to_the_same_end(
    done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, left = tmp_path / "cmp", Contestant.advance, 30

    def advance(self: Contestant, unit: str, until: float, stop: list[str]) -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            real(self, unit, until - 16, stop)  # in the midst of a turn
            stop.append("SIGTERM")
        return real(self, unit, until, stop)

    monkeypatch.setattr(Contestant, "advance", advance)
    some = command(out, "--arms", "whole,patch-50@60", seeds=1)
    assert run_command(some) == 130
    assert run_command(some) == 0
    found = json.loads((out / "compare.json").read_text())
    for name, seeds in found["curves"].items():
        assert [[r["loss"] for r in seed] for seed in seeds] == [[r["loss"] for r in done[1]["curves"][name][0]]]
    assert found["verdicts"][0]["low"] is None and "one seed" in found["verdicts"][0]["text"]
    assert found["arms"]["whole"]["loss_interval"] == [None, None]


def test_another_comparison_in_the_same_place_is_refused(done: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = done
    assert run_command(command(out, "--arms", "whole,maskdm")) == 2
    assert "holds another comparison (arms whole,again=whole,patch-50@60 -> whole,maskdm)" in capsys.readouterr().err
    assert run_command(command(out, "--arms", "whole,again=whole,patch-50@60", "--finetune.lr", "1e-4")) == 2
    assert "finetune.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "--budget is 'soon'; give a time such as 60s"),
        (["--budget", "0s"], "give more than nothing"),
        (["--budget", "1s", "--seeds", "0"], "--seeds is 0"),
        (["--budget", "1s", "--num", "3"], "--num is 3"),
        (["--budget", "1s", "--arms", "whole"], "at least two"),
        (["--budget", "1s", "--heldout", "0"], "held-out images are too few"),
        (["--budget", "1s", "--init", "run"], "name the arm that starts from a run"),
        (["--budget", "1s", "--init", "elsewhere"], "elsewhere is not there"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(recipe("digits", "digits")))
    (tmp_path / "run" / "run.json").write_text("{}")
    assert run_command(["compare", "digits", "--recipe", "digits", "--out", str(tmp_path / "cmp"), *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("maskdm: error:")


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    request = runs.CompareRequest(runs.TrainRequest("digits", tmp_path, "digits"), "1s")
    with pytest.raises(UserError, match="holds files that are not a comparison's"):
        runs.compare(request, runs.Display(quiet=True))


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [("60s", "seconds", 60), ("10m", "seconds", 600), ("1.5h", "seconds", 5400), ("1e17flops", "flops", 1e17), ("2Gflops", "flops", 2e9),
     ("500images", "images", 500), ("2Mimages", "images", 2e6), ("3kimages", "images", 3000)],
)  # fmt: skip
def test_budgets(text: str, unit: str, amount: float) -> None:
    cost = Cost.parse(text)
    assert cost.unit == unit and math.isclose(cost.amount, amount)


def test_its_own_options_are_not_taken_for_settings() -> None:
    line = split_settings(["compare", "d", "--budget", "1m", "--arms=a,b", "--seeds", "2", "--lr", "1"], ("--budget", "--arms", "--seeds"))
    assert line.settings == [("lr", "1")] and line.rest == ["compare", "d", "--budget", "1m", "--arms=a,b", "--seeds", "2"]
