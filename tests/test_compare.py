"""`maskdm compare` on real digits, with budgets in images so that the same command gives the same figures."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm import runs
from maskdm.cli import run_command, split_settings
from maskdm.config import NoMask, Stage
from maskdm.engine import Machine, Trainer
from maskdm.errors import UserError
from maskdm.recipes import recipe
from maskdm.runs.compare import Cost, _affordable, _Judge, _Ruler
from maskdm.runs.compare_results import Contest, summarize
from maskdm.runs.contestant import Contestant
from maskdm.settings import to_yaml

SMALL = [
    *("--width", "32", "--depth", "2", "--heads", "2", "--num", "20", "--sampling.steps", "3"),
    *("--pretrain.batch", "16", "--finetune.batch", "16", "--pretrain.warmup", "1", "--heldout", "0.05"),
]


def command(out: Path, *more: str, seeds: int = 2) -> list[str]:
    return ["compare", "digits", "--recipe", "digits", "--budget", "640images", "--seeds", str(seeds), "--out", str(out), *SMALL, *more]


TURNS = 10


@pytest.fixture(autouse=True, scope="module")
def _few_turns() -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["maskdm.runs.compare"], "SLICES", TURNS)
        yield


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
    assert found["features"]["name"].startswith("self") and found["heldout_images"] == 32  # of 90: more would cost more than the training
    first, second = masked["stages"]
    assert (first["mask"], first["batch"], second["mask"]) == ("patch, 50%", 16, "none") and first["lr"] == second["lr"]
    assert first["ideal_speedup"] > 2 and 0.2 < first["speedup"] < 5
    assert "images per second" not in found["verdicts"][0]["text"]


@pytest.mark.parametrize(
    ("budget", "images"), [("60s", 32), ("20m", 109), ("5Mimages", 256), ("30kimages", 112), ("1e12flops", 32), ("4e13flops", 45)]
)
def test_measuring_costs_about_a_fifth_of_the_training_at_most(budget: str, images: int) -> None:
    """One image is measured, at eight noise levels and without a backward pass, for a fifth of the cost of training on 13, in 20 turns."""
    module = sys.modules["maskdm.runs.compare"]
    base, machine = recipe("cifar10", "nowhere"), Machine(torch.device("cpu"), "two cores", 2, "fp32", 8e10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLICES", 20)
        assert _affordable(base, Cost.parse(budget), machine) == min(images, 256)


def test_two_arms_that_are_the_same_show_no_difference(done: tuple[Path, dict[str, Any]]) -> None:
    _, found = done
    same = next(verdict for verdict in found["verdicts"] if verdict["arm"] == "again")
    assert same["text"].startswith("no difference:") and same["speedup"] == same["low"] == same["high"] == 1
    assert same["loss_difference"] == same["distance_difference"] == 0
    curves = found["curves"]
    assert [[r["loss"] for r in seed] for seed in curves["again"]] == [[r["loss"] for r in seed] for seed in curves["whole"]]
    assert curves["whole"][0][-1]["loss"] != curves["whole"][1][-1]["loss"]  # seeds differ
    assert [len(seed) for seed in curves["whole"]] == [TURNS, TURNS]


def test_run_again_it_measures_nothing_twice_and_says_the_same(done: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    out, found = done
    for name in ("save", "training", "conclude"):
        monkeypatch.setattr(Contestant, name, lambda *_, name=name: pytest.fail(f"{name}: nothing is left to do"))
    assert run_command(command(out, "--arms", "whole,again=whole,patch-50@60")) == 0
    assert json.loads((out / "compare.json").read_text()) == found


def test_a_comparison_that_was_stopped_goes_on_to_the_same_end(
    done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, left = tmp_path / "cmp", Contestant.advance, 14

    def advance(self: Contestant, trainer: Trainer, unit: str, until: float, stop: list[str], loss: Any) -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            real(self, trainer, unit, until - 16, stop, loss)  # in the midst of a turn
            stop.append("SIGTERM")
        return real(self, trainer, unit, until, stop, loss)

    monkeypatch.setattr(Contestant, "advance", advance)
    some = command(out, "--arms", "whole,patch-50@60", seeds=1)
    assert run_command(some) == 130
    assert run_command(some) == 0
    found = json.loads((out / "compare.json").read_text())
    for name, seeds in found["curves"].items():
        assert [[r["loss"] for r in seed] for seed in seeds] == [[r["loss"] for r in done[1]["curves"][name][0]]]
    assert found["verdicts"][0]["low"] is None and "one seed" in found["verdicts"][0]["text"]
    assert found["arms"]["whole"]["loss_interval"] == [None, None]


def test_a_seed_run_apart_is_the_same_and_few_images_are_measured_against_others(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    arms = ("--arms", "whole,patch-50@60")
    assert run_command(command(tmp_path / "apart", *arms, "--first-seed", "1", seeds=1)) == 0
    apart = json.loads((tmp_path / "apart" / "compare.json").read_text())
    for name, seeds in apart["curves"].items():
        assert [r["loss"] for r in seeds[0]] == [r["loss"] for r in done[1]["curves"][name][1]]
        assert apart["specs"][name] == done[1]["specs"][name]
    assert apart["finals"]["whole"][0]["reference"] == f"{apart['training_images']} of {apart['training_images']} training images"
    assert run_command(command(tmp_path / "few", *arms, "--data.limit", "60", seeds=1)) == 0
    few = json.loads((tmp_path / "few" / "compare.json").read_text())
    others = apart["training_images"] - 60
    assert few["training_images"] == 60 and few["finals"]["whole"][0]["reference"] == f"{others} of {others} images not trained on"


def test_intervals_of_shares_stay_within_what_shares_can_be(tmp_path: Path) -> None:
    """Student's half width of two seeds, 0.9 and 1, is 0.64."""
    record = {"seconds": 1.0, "flops": 1.0, "images": 1.0, "steps": 50, "loss": 0.1, "pieces": 1}
    finals = [
        {"precision": 0.9, "recall": 0.1, "frechet_distance": 1.0, "copies": {"share": 0.0}},
        {"precision": 1.0, "recall": 0.0, "frechet_distance": 2.0, "copies": {"share": 0.1}},
    ]
    records = [[record], [record]]
    contest = Contest({"whole": records, "other": records}, {"whole": finals, "other": finals[::-1]}, "seconds")
    summarize(contest, {}, tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())
    arm, verdict = found["arms"]["whole"], found["verdicts"][0]
    assert verdict["precision_difference_interval"] == verdict["copies_difference_interval"] == [-1.0, 1.0]
    assert verdict["distance_difference_interval"] == [pytest.approx(-12.706, abs=1e-3), pytest.approx(12.706, abs=1e-3)]
    assert arm["precision_interval"] == [pytest.approx(0.95 - 0.05 * 12.706, abs=1e-3), 1.0]
    assert arm["copies_interval"] == arm["recall_interval"] == [0.0, pytest.approx(0.05 + 0.05 * 12.706, abs=1e-3)]
    assert arm["distance_interval"][1] == pytest.approx(1.5 + 0.5 * 12.706, abs=1e-3)  # a distance has no upper end


def contest(steps: int, ends: list[float], decaying: frozenset[str] = frozenset()) -> Contest:
    """`other` falls to `ends`, a value a seed; `whole` to 0.1. Both on 50 samples, of which none is precise."""

    def records(end: float) -> list[dict[str, Any]]:
        points = ((1.0, 0.3), (2.0, (0.3 + end) / 2), (3.0, end))
        return [{"seconds": s, "flops": s, "images": s, "steps": steps, "loss": loss, "pieces": 1} for s, loss in points]

    final = {"precision": 0.0, "precision_interval": [0.0, 0.07], "denoising": {"heldout": 0.1}}
    finals = {"whole": [final] * len(ends), "other": [final | {"denoising": {"heldout": end}} for end in ends]}
    return Contest({"whole": [records(0.1)] * len(ends), "other": list(map(records, ends))}, finals, "seconds", decaying)


def test_what_is_no_verdict_has_no_figure(tmp_path: Path) -> None:
    """A falling rate, or hardly a step: the speed-up would be read by whoever reads compare.json alone."""
    falling, one = (contest(50, ends, frozenset({"other"})) for ends in ([0.08, 0.081], [0.08]))
    texts = (
        (falling, "other and whole: a learning rate falls, so only the ends compare; at the end its loss better by 0.0195 ("),
        (one, "other and whole: a learning rate falls, so only the ends compare; of one seed they show nothing; repeat"),
        (contest(9, [0.08, 0.081]), "no verdict on other and whole: 9 steps are too few"),
    )
    for each, text in texts:
        summarize(each, {}, tmp_path)
        verdict = json.loads((tmp_path / "compare.json").read_text())["verdicts"][0]
        assert verdict["text"].startswith(text) and (verdict["speedup"], verdict["low"], verdict["high"]) == (None, None, None)
    summarize(contest(50, [0.08, 0.081]), {}, tmp_path)
    assert json.loads((tmp_path / "compare.json").read_text())["verdicts"][0]["speedup"] > 1


def test_seeds_that_agree_are_not_certain_of_a_share(tmp_path: Path) -> None:
    summarize(contest(50, [0.08, 0.081]), {}, tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["arms"]["whole"]["precision_interval"] == [0.0, pytest.approx(0.07 / 2**0.5)]
    verdict = found["verdicts"][0]
    assert verdict["precision_difference_interval"] == pytest.approx([-0.07 / 2**0.5, 0.07 / 2**0.5])
    summarize(contest(50, [0.08]), {}, tmp_path)
    assert json.loads((tmp_path / "compare.json").read_text())["verdicts"][0]["precision_difference_interval"] == [None, None]


def test_another_comparison_in_the_same_place_is_refused(done: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = done
    assert run_command(command(out, "--arms", "whole,again=patch-50")) == 2
    assert "holds another comparison (arm again: " in capsys.readouterr().err
    assert run_command(command(out, "--arms", "whole,again=whole,patch-50@60", "--pretrain.lr", "1e-4")) == 2
    assert "holds another comparison (arm whole: " in capsys.readouterr().err
    assert run_command(command(out, "--arms", "whole,again=whole", "--weight_decay", "0.5")) == 2
    assert "optimizer.weight_decay" in capsys.readouterr().err


def test_arms_and_seeds_can_be_added_and_samples_counted_anew(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, found = done
    mine = tmp_path / "cmp"
    shutil.copytree(out, mine)
    assert run_command(command(mine, "--arms", "patch-50@60,views4@60", "--num", "21", seeds=1)) == 0
    added = json.loads((mine / "compare.json").read_text())
    assert list(added["arms"]) == ["patch-50@60", "views4@60"] and added["curves"]["patch-50@60"] == found["curves"]["patch-50@60"][:1]
    assert set(json.loads((mine / "request.json").read_text())["arms"]) == {"whole", "again", "patch-50@60", "views4@60"}
    final = json.loads((mine / "arms" / "patch-50@60" / "seed-0" / "final.json").read_text())
    assert final["asked"]["num"] == 21 and final["num_samples"] == 21


def test_budgets_in_seconds_are_spent_alike_whatever_the_clock_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which a masked step takes half as long as a whole one; evaluation, saving and rehearsing are not on it."""
    plain = Trainer.step

    def step(self: Trainer, stage: Stage, done: Any, budget: Any, *more: Any) -> Any:
        before = done.seconds
        result = plain(self, stage, done, budget, *more)
        done.seconds = before + (1.0 if isinstance(stage.mask, NoMask) else 0.5)
        return replace(result, seconds=self.progress.seconds)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(_Judge, "measure", lambda *_: {})
    out = tmp_path / "cmp"
    assert run_command(["compare", "digits", "--recipe", "digits", "--budget", "40s", "--seeds", "1", "--out", str(out), *SMALL]) == 0
    found = json.loads((out / "compare.json").read_text())
    assert [r["seconds"] for r in found["curves"]["whole"][0]] == pytest.approx([40 / TURNS * (i + 1) for i in range(TURNS)], abs=0.1)
    assert found["arms"]["whole"]["steps"] == 40 and found["arms"]["maskdm"]["steps"] == 40 + 10
    assert found["arms"]["maskdm"]["time"] == pytest.approx(40.0, abs=0.1)


def test_other_data_under_the_same_name_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, random = tmp_path / "photos", np.random.default_rng(0)
    data.mkdir()
    for number in range(80):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(data / f"{number}.png")
    out = tmp_path / "cmp"
    line = ["compare", str(data), "--recipe", "digits", "--budget", "48images", "--seeds", "1", "--out", str(out), *SMALL]
    line += ["--heldout", "0.5", "--pretrain.batch", "1", "--finetune.batch", "1", "--conditional", "false"]
    monkeypatch.setattr(_Judge, "measure", lambda *_: {})
    assert run_command(line) == 0
    Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(data / "new.png")
    assert run_command(line) == 2
    assert "holds another comparison (data_hash" in capsys.readouterr().err


def test_a_setting_that_could_do_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("finetune.lr", "1e-4"), ("pretrain.budget.steps", "5"), ("intervals.save", "7"), ("pretrain.decay", "cosine")):
        line = ["compare", "digits", "--recipe", "digits", "--budget", "1s", "--out", str(tmp_path / "cmp"), f"--{name}", value]
        assert run_command(line) == 2
        assert f"--{name} has no part in a comparison" in capsys.readouterr().err


def test_an_arm_that_diverged_is_said_so_and_costs_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _Ruler.measure

    def measure(self: Any, trainer: Trainer) -> dict[str, Any]:
        found = real(self, trainer)
        return found | {"loss": math.nan} if trainer.config.stages[0].name == "1-maskdm" else found

    monkeypatch.setattr(_Ruler, "measure", measure)
    out = tmp_path / "cmp"
    assert run_command(command(out, seeds=1)) == 0
    found = json.loads((out / "compare.json").read_text())
    assert "a loss of maskdm is not a number" in found["verdicts"][0]["text"]
    assert found["arms"]["maskdm"]["images"] < 200 < found["arms"]["whole"]["images"]


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
        (["--budget", "9h", "--features", "foo"], "no feature network is called 'foo'"),  # before nine hours of training
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
