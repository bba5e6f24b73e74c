"""Several runs on one page: from files written by hand to sentences, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_helpers import heldout, make_run
from test_report import HOSTILE, Page, _card

from maskdm.errors import UserError
from maskdm.report import compare_runs, write_report
from maskdm.report.figures import first_reach, flatten, names
from maskdm.report.state import gain, read_runs

SECTIONS = ["verdict", "figures", "loss", "time", "settings", "speed"]
SLOW, FAST = heldout([(10, 0.8), (20, 0.4), (30, 0.2)]), heldout([(10, 0.4), (20, 0.2), (30, 0.1)])
SAMPLER = {"scheduler": "ddim", "steps": 50, "eta": 0.0, "guidance": 1.0, "data_hash": "d" * 64}


def measured(**changes: Any) -> dict[str, Any]:
    """metrics.json, with `hash` for the features' and any other key as it stands, or of the provenance."""
    provenance = SAMPLER | {key: value for key, value in changes.items() if key in SAMPLER}
    measures = {
        "num_samples": 500,
        "reference": "10 of 10 training images",
        "kernel_distance": 0.02,
        "kernel_distance_interval": [0.01, 0.03],
    }
    measures |= {"frechet_distance": 1.5, "precision": 0.9, "copies": {"share": 0.01, "share_interval": [0.002, 0.03]}}
    rest = {key: value for key, value in changes.items() if key not in (*SAMPLER, "hash")}
    return measures | rest | {"features": {"name": "self", "hash": changes.get("hash", "feed")}, "provenance": provenance}


def words(*runs: Path) -> str:
    out = runs[0].parent / "compare.html"
    assert compare_runs(runs, out) == out
    return Page(out.read_text(encoding="utf-8")).words.replace("\u202f", " ")


def compared(*runs: Path) -> Page:
    return Page(compare_runs(runs, runs[0].parent / "compare.html").read_text(encoding="utf-8"))


def test_the_verdict_is_time_to_the_other_runs_loss(tmp_path: Path) -> None:
    said = words(make_run(tmp_path / "slow", SLOW), make_run(tmp_path / "fast", FAST))
    assert "slow and fast" in said and "2 runs of maskdm, on 1 437 images of digits (8 \u00d7 8)." in said
    assert "fast has the lowest final held-out loss: 0.1." in said
    assert "fast reaches slow's best held-out loss (0.2) in 67 % of slow's time: 20 s against 30 s." in said
    chance = "One run each: a difference between two runs may be chance; repeat them with other seeds to know."
    assert said.index(chance) > said.index("67 %")


@pytest.mark.parametrize(
    ("line", "level", "when"),
    [
        ([(10, 1.0), (20, 0.5)], 0.75, 15.0),
        ([(10, 1.0), (20, 2.0), (30, 0.5)], 0.75, 25.0),  # the best so far stays at 1 until 20
        ([(10, 1.0), (20, 0.5), (30, 0.9)], 0.5, 20.0),
        ([(10, 0.4)], 0.5, 10.0),  # nothing is known of what came before
        ([(10, 1.0)], 0.5, None),
        ([], 0.5, None),
    ],
)
def test_first_time_at_a_loss(line: list[tuple[float, float]], level: float, when: float | None) -> None:
    assert first_reach([(float(x), y) for x, y in line], level) == (when if when is None else pytest.approx(when))


def test_a_rise_at_the_end_counts_by_when_the_loss_was_first_reached(tmp_path: Path) -> None:
    rises = heldout([(10, 0.8), (20, 0.2), (30, 0.5)])
    said = words(make_run(tmp_path / "rises", rises), make_run(tmp_path / "fast", FAST))
    assert "reaches rises's best held-out loss (0.2) in 100 % of rises's time: 20 s against 20 s" in said


def test_what_the_first_measurement_decides_is_a_bound(tmp_path: Path) -> None:
    early, late = heldout([(10, 0.1), (20, 0.05)]), heldout([(10, 0.8), (20, 0.1), (30, 0.3)])
    said = words(make_run(tmp_path / "late", late), make_run(tmp_path / "early", early))
    assert "early reaches late's best held-out loss (0.1) in at most 50 % of late's time: 10 s against 20 s." in said
    worn = make_run(tmp_path / "worn", heldout([(10, 0.02), (20, 0.5)]))  # its best is better than all of the winner's
    assert "early has not reached worn's best held-out loss (0.02)." in words(tmp_path / "early", worn)


def test_other_weights_to_begin_with_are_told_of(tmp_path: Path) -> None:
    tuned, scratch = make_run(tmp_path / "tuned", FAST, config="init: runs/old\n"), make_run(tmp_path / "scratch", SLOW)
    sentence = "tuned started from other weights (runs/old); the training behind those is not counted."
    assert sentence in words(scratch, tuned)
    assert "other weights" not in words(tuned, make_run(tmp_path / "like", SLOW, config="init: runs/old\n"))
    alone = Page(write_report(tuned).read_text(encoding="utf-8")).words
    assert "; it started from other weights (runs/old), and the training behind those is not counted." in alone
    assert "other weights" not in Page(write_report(scratch).read_text(encoding="utf-8")).words


def test_images_are_counted_over_all_stages(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "a", SLOW)])
    assert run.heldout_by_images() == [(1000.0, 0.8), (2000.0, 0.4), (3000.0, 0.2)]
    (exact,) = read_runs([make_run(tmp_path / "c", [*SLOW[:3], SLOW[3] | {"seen": 2048}, *SLOW[4:]])])  # measured after the last record
    assert exact.heldout_by_images() == [(1000.0, 0.8), (2048.0, 0.4), (3048.0, 0.2)]
    (blind,) = read_runs([make_run(tmp_path / "b")])  # its records do not count images
    assert blind.heldout() and blind.heldout_by_images() == []
    assert [gain(run, stage) for stage in run.stages] == [(3.0, 0.75), (1.0, 1.0)]  # 900 over 300 images/s, ideal 4


def test_arithmetic_is_an_axis_where_all_runs_know_theirs(tmp_path: Path) -> None:
    masked, whole = _card()["stages"]
    known = [masked | {"flops": 12800e6}, whole | {"flops": 12800e9}]  # an image costs 1e6, then 1e9
    first, second = make_run(tmp_path / "a", SLOW, stages=known), make_run(tmp_path / "b", SLOW)
    assert read_runs([first])[0].heldout_by_flops() == [(1e9, 0.8), (2e9, 0.4), (2e9 + 1e12, 0.2)]
    assert read_runs([second])[0].heldout_by_flops() == []
    assert "Against arithmetic" not in words(first, second)
    third = make_run(tmp_path / "c", FAST, stages=known)
    assert "Against arithmetic" in words(first, third) and "TFLOP" in words(first, third)


def test_figures_stand_side_by_side_with_their_intervals(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", SLOW, measured(), flops=1.5e13)
    said = words(first, make_run(tmp_path / "b", FAST, measured(kernel_distance=0.07)))
    assert "0.020.01 to 0.030.070.01 to 0.03" in said and "1 %0.2 % to 3 %" in said
    assert "15 T" in said and "2 437" not in said and "0.2best 0.2" in said
    assert "does not compare" not in said and "differ (" not in said
    assert "Recall" not in said  # measured in neither


@pytest.mark.parametrize(
    ("changes", "sentence", "num_marked"),
    [
        ({"hash": "beef"}, "Feature networks differ (a: feed; b: beef)", 4),
        ({"data_hash": "e" * 64}, "The measured data differ (a: dddddddddddd; b: eeeeeeeeeeee)", 4),
        ({"reference": "5 of 10 training images"}, "Reference images differ (a: 10 of 10 training images; b: 5 of 10 training images)", 4),
        ({"num_samples": 50}, "Numbers of samples differ (a: 500; b: 50)", 3),  # the kernel distance is unbiased
        ({"steps": 10}, "Sampler settings (steps) differ (a: 50; b: 10)", 0),
        ({"guidance": 2.0}, "Sampler settings (guidance) differ", 0),
        ({"eta": 1.0}, "Sampler settings (eta) differ", 0),
        ({"scheduler": "dpm++"}, "Sampler settings (scheduler) differ", 0),
    ],
)
def test_what_does_not_compare_is_said_and_marked(tmp_path: Path, changes: dict[str, Any], sentence: str, num_marked: int) -> None:
    said = words(make_run(tmp_path / "a", SLOW, measured()), make_run(tmp_path / "b", FAST, measured(**changes)))
    assert sentence in said
    assert said.count("does not compare") == num_marked


def test_losses_on_different_data_are_not_raced(tmp_path: Path) -> None:
    data = {"name": "cats", "content_hash": "other", "train": 90, "heldout": 10, "height": 8, "width": 8}
    said = words(make_run(tmp_path / "a", SLOW), make_run(tmp_path / "b", FAST, data=data))
    assert "Held-out losses do not compare: the runs differ in images and held-out images." in said
    assert "reaches" not in said and "1 437 images of digits (8 \u00d7 8) and 90 images of cats" in said


def test_times_on_different_machines_are_named(tmp_path: Path) -> None:
    said = words(make_run(tmp_path / "a", SLOW), make_run(tmp_path / "b", FAST, environment={"device": "cuda", "gpu": "H100"}))
    assert "their times do not compare" in said and "Training timedoes not compare" in said


def test_settings_that_differ_and_no_others(tmp_path: Path) -> None:
    config = "seed: 0\nstages:\n- name: one\n  lr: 0.1\n- name: two\n  lr: {}\nlist: [1, 2]\n"
    said = words(make_run(tmp_path / "a", config=config.format(0.2)), make_run(tmp_path / "b", config=config.format(0.3)))
    assert "stages.two.lr0.20.3" in said and "stages.one" not in said and "seed" not in said.split("Settings that differ")[-1]
    assert flatten({"a": [{"b": None}, {"b": []}]}) == {"a.0.b": "none", "a.1.b": "[]"}
    broken = words(make_run(tmp_path / "c", config="a: [}"), make_run(tmp_path / "d", config="a: 1\n"))
    assert "No settings are known of c" in broken


def test_the_slider_shows_each_run_at_the_same_share_of_its_time(tmp_path: Path) -> None:
    short = [{"event": "train", "step": 1, "seconds": 8.0, "loss": 1.0}, {"event": "sample", "step": 1, "file": "samples/only.png"}]
    page = compared(make_run(tmp_path / "long"), make_run(tmp_path / "short", short))
    frames = [each for each in page.all("div") if "data-caption" in each]
    assert len(frames) == 5 and ["hidden" in frame for frame in frames] == [True] * 4 + [False]
    assert frames[-1]["data-caption"] == "100\u202f% of each run's time so far"
    alts = [image["alt"] for image in page.all("img")]
    assert len(alts) == 6 and alts[-1] == "Samples of short at step 1, 8.0\u202fs"  # the short run has one grid, at its end
    assert page.words.count("short: no samples yet") == 4


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.json", "config.yaml", "samples"])
def test_each_file_may_be_absent(tmp_path: Path, name: str) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (first / name).rename(tmp_path / "away")
    said = words(first, second)
    assert "Traceback" not in said and "None" not in said and "nan" not in said
    (second / name).rename(tmp_path / "gone")
    lost = {"metrics.jsonl": {"loss", "time"}, "samples": {"time"}}.get(name, set())
    shown = compared(first, second).sections
    assert shown == [section for section in SECTIONS if section not in lost]


def test_running_failed_and_nearly_empty_runs(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "run.json").write_text('{"status": 3, "stages": "x", "data": [1], "flops": NaN}')
    failed = make_run(tmp_path / "failed", SLOW, status="failed", error="loss is not finite at step 300")
    running = make_run(tmp_path / "running", FAST, status="running")
    said = words(bare, failed, running)
    assert "bare, failed and running" in said and "failed: loss is not finite at step 300" in said
    assert "running reaches failed's best held-out loss (0.2 until it failed)" in said and "loss: 0.1 so far." in said
    assert "No held-out loss was measured for bare." in said and "Samples of bare are not measured yet" in said
    two = tmp_path / "two"
    two.mkdir()
    (two / "run.json").write_text('{"version": "0"}')
    assert compared(bare, two).sections == ["verdict", "figures", "settings"]


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place) for place in ("x/seed0", "y/seed0", "y/z/seed1")]
    assert [run.label for run in read_runs(runs)] == ["x/seed0", "y/seed0", "seed1"]


def test_whatever_comes_from_files_is_escaped(tmp_path: Path) -> None:
    stages = [{"name": HOSTILE, "mask": HOSTILE, "batch": HOSTILE, "images_per_second": 3.0}]
    measures = measured(hash=HOSTILE, reference=HOSTILE)
    first = make_run(
        tmp_path / "a & <b>", SLOW, measures, json.dumps({HOSTILE: HOSTILE}), error=HOSTILE, stages=stages, data={"name": HOSTILE}
    )
    page = compared(first, make_run(tmp_path / "plain", FAST, measured()))
    assert len(page.all("script")) == 1 and page.words.count(HOSTILE) >= 8 and "a & <b>" in page.words


def test_nothing_comes_from_outside(tmp_path: Path) -> None:
    out = compare_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")], tmp_path / "c.html")
    source = out.read_text(encoding="utf-8")
    assert "http://" not in source and "https://" not in source and "default-src 'none'" in source
    assert Page(source).sections == SECTIONS and not list(tmp_path.glob(".c.html*"))


def test_what_is_no_comparison(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "a"), tmp_path / "compare.html"
    with pytest.raises(UserError, match="two or more runs"):
        compare_runs([run], out)
    with pytest.raises(UserError, match=r"has no run.json; is it a run directory"):
        compare_runs([run, tmp_path], out)
    with pytest.raises(UserError, match="given twice"):
        compare_runs([run, tmp_path / "b" / ".." / "a"], out)
    with pytest.raises(UserError, match="not a place for a file"):
        compare_runs([run, make_run(tmp_path / "c")], tmp_path / "absent" / "x.html")
    (tmp_path / "c" / "run.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON object"):
        compare_runs([run, tmp_path / "c"], out)
    assert not out.exists()


def test_curves_of_one_colour_differ_in_their_strokes_not_in_their_contrast(tmp_path: Path) -> None:
    out = compare_runs([make_run(tmp_path / f"run{index}", SLOW) for index in range(7)], tmp_path / "c.html")
    page = Page(out.read_text(encoding="utf-8"))
    strokes = [str(line["style"]) for line in page.all("polyline") if line["class"] == "curve"][:7]
    assert strokes == ["stroke-dasharray: none"] * 5 + ["stroke-dasharray: 8 5"] * 2
    keys = [str(span["style"]) for span in page.all("span") if "style" in span][:7]
    assert ["dashed" in key for key in keys] == [False] * 5 + [True] * 2
    assert not any("opacity" in str(attributes.get("style")) for _, attributes in page.tags)


def test_lists_in_words() -> None:
    assert [names(["a", "b", "c"][:num]) for num in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_no_figure_is_said_to_compare_where_the_features_differ(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", measures=measured())
    assert "the kernel distance does" in words(first, make_run(tmp_path / "b", measures=measured(num_samples=900)))
    assert "the kernel distance does" not in words(first, make_run(tmp_path / "c", measures=measured(num_samples=900, hash="beef")))
