"""What single parts of a run's page say, from files written by hand."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_helpers import make_run
from test_report import Page, _events, _measures, _picture

from maskdm.evaluation.verdicts import OVERFITTING
from maskdm.report import write_report
from maskdm.report.charts import histogram, whisker
from maskdm.report.images import FRAMES, allowance, picture
from maskdm.report.page import NUM_COLORS, number, percent, scaled

LEVELS = [{"t": 62.5, "train": 0.5, "heldout": 0.6, "gap": 0.1, "gap_interval": [0.05, 0.15]}]
DENOISING = {"num_images": [1000, 359], "train": 0.2, "heldout": 0.25, "gap": 0.05, "gap_interval": [0.04, 0.06], "levels": LEVELS}


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def words(run: Path) -> str:
    return page_of(run).words.replace("\u202f", " ")


def in_order(said: str, *parts: str) -> bool:
    """Whether the parts stand in the text one after the other."""
    for part in parts:
        _, found, said = said.partition(part)
        if not found:
            return False
    return True


@pytest.mark.parametrize("key", ["kernel_distance", "frechet_distance"])
def test_the_distance_to_look_at_comes_first_and_stands_at_the_top(tmp_path: Path, key: str) -> None:
    said = words(make_run(tmp_path / "a", measures=_measures() | {"headline": key}))
    both = {"kernel_distance": "Kernel distance", "frechet_distance": "Frechet distance"}
    other = next(name for each, name in both.items() if each != key)
    assert in_order(said[said.index("Measure") :], both[key], other)
    assert in_order(said, "In short", f"{both[key]}{0.002 if key == 'kernel_distance' else 1}", "How good is it?")


def test_the_bias_of_few_images_is_told(tmp_path: Path) -> None:
    halves = {"frechet_distance_halves": 0.9, "frechet_distance_halves_count": 250}
    said = words(make_run(tmp_path / "a", measures=_measures() | halves | {"frechet_distance_infinity": 0.6}))
    assert "two halves of the real ones (250 images each) are 0.9 apart" in said and "would be about 0.6 with endless images" in said
    assert "two halves" not in words(make_run(tmp_path / "b"))


def test_a_fid_is_named_so_at_the_top_too(tmp_path: Path) -> None:
    measures = _measures() | {"headline": "frechet_distance"}
    assert "FID" not in words(make_run(tmp_path / "a", measures=measures))
    said = words(make_run(tmp_path / "b", measures=measures | {"fid": 1.0}))
    assert in_order(said, "In short", "FID1", "How good is it?", "FID1")


def test_the_worst_class_comes_first_with_its_interval_drawn(tmp_path: Path) -> None:
    classes = [{"name": name, "num_samples": 9, "kernel_distance": far} for name, far in (("near", 0.1), ("far", 0.9))]
    classes[1]["kernel_distance_interval"] = [0.8, 1.0]
    page = page_of(make_run(tmp_path / "a", measures=_measures() | {"classes": classes}))
    assert in_order(page.words[page.words.index("Class by class") :], "far", "near")
    assert len([svg for svg in page.all("svg") if svg.get("class") == "whisker"]) == 2


def test_overfitting_is_shown_level_by_level(tmp_path: Path) -> None:
    said = words(make_run(tmp_path / "a", measures=_measures() | {"denoising": DENOISING}))
    assert "All levels0.20.250.050.04 to 0.06" in said and "t = 62.50.50.60.10.05 to 0.15" in said
    assert f"above {OVERFITTING:.0%}".replace("%", " %") in said  # the limit of the verdict above
    assert "level by level" not in words(make_run(tmp_path / "b"))


def test_copies_are_told_with_their_calibration_and_how_they_were_seen(tmp_path: Path) -> None:
    measures = _measures()
    measures["copies"] |= {"features_ratio": 0.4, "features_ratio_interval": [0.3, 0.5]}
    said = words(make_run(tmp_path / "a", measures=measures))
    assert "Suspected near-copies3 %2 % to 5 %0.1 %0 % to 0.4 %" in said
    assert "Nearest training image, in features0.40.3 to 0.51" in said and "in pixels" not in said
    assert "cat/17.png0.125pixels, mirrored, shifted by 0, 1" in said


def test_a_run_measured_before_copies_were_counted_keeps_its_neighbours(tmp_path: Path) -> None:
    old = {"nearest_train": {"features_ratio": 0.9}, "kernel_distance": {"value": 1.0, "standard_error": 0.1}, "frechet_distance": 2.0}
    page = page_of(make_run(tmp_path / "a", measures=old))
    assert "copies" in page.sections and "colour" not in page.sections
    assert any("nearest" in str(image["alt"]) for image in page.all("img"))


def test_colour_tells_how_far_histograms_are_apart(tmp_path: Path) -> None:
    measures = _measures()
    measures["colour"]["histogram_distance"] = [{"channel": "red", "samples": 7.5, "halves": 0.4}]
    assert "7.5 of 255 apart; real halves: 0.4" in words(make_run(tmp_path / "a", measures=measures))


def test_speed_over_time_is_drawn(tmp_path: Path) -> None:
    events = [event | {"images_per_second": 100.0} if event["event"] == "train" else event for event in _events()]
    drawn = [svg["aria-label"] for svg in page_of(make_run(tmp_path / "a", events)).all("svg") if svg.get("aria-label")]
    assert any(str(label).startswith("Speed: masked from 100") for label in drawn)


@pytest.mark.parametrize(
    ("measure", "title"), [("heldout-loss", "Loss on whole images"), ("kernel-distance", "Distance of samples on the way")]
)
def test_the_best_evaluation_is_ringed_in_the_chart_of_its_measure(tmp_path: Path, measure: str, title: str) -> None:
    events = [*_events(), {"event": "best", "step": 320, "stage": "whole", "measure": measure, "value": 0.005}]
    source = write_report(make_run(tmp_path / "a", events)).read_text(encoding="utf-8")
    charts = {part.split("</h3>")[0]: part for part in source.split("<h3>")}
    assert [name for name, part in charts.items() if 'class="ring"' in part.split("</svg>")[0]] == [title]


def test_overfitting_seen_on_the_way_names_the_training_images(tmp_path: Path) -> None:
    losses = [(0.4, 0.4), (0.2, 0.2), (0.3, 0.1), (0.4, 0.05)]
    events = [{"event": "heldout", "step": i, "seconds": i, "loss": new, "train_loss": old} for i, (new, old) in enumerate(losses)]
    said = words(make_run(tmp_path / "a", events))
    assert "Overfitting: the held-out loss rose from 0.2 at its best to 0.4, while that of training images fell on to 0.05." in said


def test_a_loss_that_rises_on_training_images_too_is_no_overfitting(tmp_path: Path) -> None:
    losses = [(0.4, 0.39), (0.2, 0.19), (0.3, 0.29), (0.4, 0.39)]
    events = [{"event": "heldout", "step": i, "seconds": i, "loss": new, "train_loss": old} for i, (new, old) in enumerate(losses)]
    said = words(make_run(tmp_path / "a", events))
    assert "rose from 0.2 at its best to 0.4, that of training images went from 0.19 to 0.39." in said
    assert "That is no overfitting; try a lower lr." in said
    assert "Overfitting" not in said


def test_all_broken_files_are_counted_where_not_all_are_listed(tmp_path: Path) -> None:
    data = {"name": "digits", "broken": [[f"{i}.png", "cut off"] for i in range(200)]}
    said = words(make_run(tmp_path / "a", data=data | {"num_broken": 1234}))
    assert "Files left out (1 234)" in said and "and 1 134 more" in said
    assert "Files left out (200)" in words(make_run(tmp_path / "b", data=data))


def test_averages_are_drawn_against_the_one_that_training_kept(tmp_path: Path) -> None:
    def sweep(**more: Any) -> dict[str, Any]:
        points = [{"sigma_rel": s, "value": 0.1 + s, "difference": s - 0.07} | more for s in (0.05, 0.1)]
        return {"points": points, "measure": "heldout-loss", "best": 0.05, "ordinary": {"value": 0.17}}

    run = make_run(tmp_path / "a")
    (run / "ema_sweep.json").write_text(json.dumps(sweep(difference_interval=[-0.01, 0.01])))
    assert "Below 0: better than the average that training kept (0.17)" in words(run)
    (run / "ema_sweep.json").write_text(json.dumps(sweep(difference_interval=None)))
    assert "Below 0" not in words(run) and "the average that training kept" in words(run)


def test_what_to_do_next_is_said_of_runs_that_are_not_done(tmp_path: Path) -> None:
    command = "maskdm train digits --out runs/x"
    for status, hint in (("running", "maskdm report"), ("stopped", command), ("failed", command), ("finished", "")):
        said = words(make_run(tmp_path / status, status=status))
        before = said[said.index("as of") : said.index("In short")]
        assert (hint in before) if hint else ("<code>" not in before and command not in before), status
    gone = {"pid": 2**22 + 1, "host": platform.node(), "started": 1.0}
    said = words(make_run(tmp_path / "killed", status="running", process=gone))
    assert "ended without a word" in said and "was ended, by a kill" in said


def test_large_pictures_under_a_slider_share_one_budget(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    run = make_run(tmp_path / "a")
    files = sorted((run / "samples").glob("*.png"))
    for file in files:
        Image.fromarray(noise).save(file, compress_level=1)
    assert allowance(files) == FRAMES // len(files) < files[0].stat().st_size
    page = page_of(run)
    frames = [str(image["src"]) for image in page.all("img") if "data-caption" in image]
    assert len(frames) == len(files) == 5
    assert sum(map(len, frames)) < FRAMES * 4 / 3 and all(frame.startswith("data:image/jpeg") for frame in frames)
    assert "Shown smaller than the file" in page.words
    assert "Shown smaller" not in words(make_run(tmp_path / "b"))


def test_a_picture_as_it_is_unless_it_is_large(tmp_path: Path) -> None:
    _picture(tmp_path / "x" / "small.png")
    small = tmp_path / "x" / "small.png"
    whole, reduced = picture(small, "x", 320), picture(small, "x", 320, most=10)
    assert whole and 'class="pixel" width="320" height="160"' in whole and "data:image/png" in whole
    assert reduced and "data:image/jpeg" in reduced
    assert picture(tmp_path / "absent.png", "x") is None


def test_whiskers_and_histograms_stay_inside_their_frames() -> None:
    drawn = Page(whisker(0.5, (-3.0, 9.0), 0.0, 1.0))
    (bar,) = [line for line in drawn.all("line") if line["class"] == "curve"]
    assert (bar["x1"], bar["x2"]) == ("5.0", "125.0")
    assert whisker(None, None, 0.0, 1.0) == whisker(0.5, None, 1.0, 1.0) == ""
    heights = [
        float(pair.split(",")[1]) for pair in str(Page(histogram("red", [1.0, 0.0], [0.25, 0.75])).all("polyline")[0]["points"]).split()
    ]
    assert min(heights) == 6 and max(heights) == 110
    assert histogram("red", [1.0], []) == ""


def _contrast(first: str, second: str) -> float:
    """WCAG's contrast of two colours #rrggbb."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def test_what_is_drawn_stands_out_from_the_card_in_both_themes(tmp_path: Path) -> None:
    source = write_report(make_run(tmp_path / "a")).read_text(encoding="utf-8")
    (stroke,) = re.findall(r"\.filled {[^}]*stroke: var\(--(\w+)\)", source)
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", theme)) for theme in re.findall(r":root {(.*?)}", source, re.DOTALL)]
    assert len(themes) == 2
    for theme in themes:
        assert all(_contrast(theme[name], theme["card"]) >= 3 for name in (stroke, *(f"c{index}" for index in range(NUM_COLORS))))
    levels = next(part for part in source.split("<h3>") if part.startswith("Held-out loss by noise level"))
    assert re.findall('stroke-dasharray: ([^"]*)', levels) == ["2 4", "8 5", "none", "none"]  # the first, one between, the last; training


def test_numbers_that_are_tiny_or_huge() -> None:
    assert number(1.2e-05) == "1.2\u202f\u00d7\u202f10\u207b\u2075" and number(-0.00012) == "-0.00012"
    said = [number(999.7), number(-999.7), number(0.9996), scaled(999.7e9, "FLOP"), scaled(12345.0, "FLOP"), percent(-0.0001)]
    assert [each.replace("\u202f", " ") for each in said] == ["1 000", "-1 000", "1", "1 TFLOP", "12 300 FLOP", "0 %"]
    assert scaled(1.25e12, "FLOP").replace("\u202f", " ") == "1.25 TFLOP" and scaled(None, "FLOP") == "&ndash;"


def test_the_arithmetic_is_among_the_facts_where_it_is_known(tmp_path: Path) -> None:
    assert "Arithmetic80 TFLOP2 TFLOP/s while training" in words(make_run(tmp_path / "a", flops=8e13))
    assert "Arithmetic" not in words(make_run(tmp_path / "b"))


def test_grids_on_the_way_are_pointed_to_where_there_are_no_final_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", status="running")
    (run / "samples.png").unlink()
    page = page_of(run)
    assert "Those drawn on the way" in page.words and [link["href"] for link in page.all("a")].count("#time") == 2
    (run / "metrics.jsonl").write_text("")
    for file in (run / "samples").iterdir():
        file.unlink()
    assert "Those drawn on the way" not in words(run) and "No final samples yet" in words(run)


def test_a_run_that_goes_on_is_not_told_to_train_longer(tmp_path: Path) -> None:
    events = [{"event": "heldout", "step": i, "seconds": i, "loss": loss} for i, loss in enumerate((0.4, 0.3, 0.2, 0.1))]
    for status, advised in (("running", False), ("finished", True)):
        said = words(make_run(tmp_path / status, events, status=status))
        assert "Still improving" in said and ("train longer" in said) == advised


def test_figures_beyond_reason_are_left_out(tmp_path: Path) -> None:
    events = [{"event": "heldout", "step": i, "seconds": i, "loss": loss} for i, loss in enumerate((0.4, 1e300, 0.2, 0.1))]
    page = page_of(make_run(tmp_path / "a", events, measures=_measures() | {"kernel_distance": 1e300}, flops=1e300))
    assert "10\u00b3\u2070\u2070" not in page.words and "Arithmetic" not in page.words
    assert any(str(svg.get("aria-label")).startswith("Loss on whole images") for svg in page.all("svg"))


def _going_on(status: str) -> dict[str, Any]:
    """run.json of a run whose last checkpoint was at its first stage's end, and that has logged ten steps of the second since."""
    stage = {"hidden": 0.5, "steps": 20, "images": 200, "seconds": 2.0, "done": True, "flops": 2e12, "flops_per_image": 1e10}
    second = {"name": "whole", "hidden": 0.0, "steps": 0, "images": 0, "seconds": 0.0, "done": False, "flops": 0.0, "flops_per_image": 4e10}
    return {"status": status, "flops": 2e12, "stages": [{"name": "masked", **stage}, second]}


def test_a_stage_is_told_as_of_its_last_record_not_its_last_checkpoint(tmp_path: Path) -> None:
    at = {"event": "train", "loss": 1.0}
    events = [at | {"step": 20, "stage": "masked", "stage_step": 20, "images": 200, "seconds": 2.0}]
    events += [at | {"step": 30, "stage": "whole", "stage_step": 10, "images": 100, "seconds": 6.0}]
    said = words(make_run(tmp_path / "a", events, **_going_on("running")))
    assert "(6.0 s so far)" in said and "Images seen300" in said and "Arithmetic6 TFLOP1 TFLOP/s" in said
    assert "10 steps, under way" in said and "4.0 s4 TFLOP25" in said  # 100 images in 4 s: 25 images/s


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_no_stage_of_a_run_that_ended_is_under_way(tmp_path: Path, status: str) -> None:
    record = {"event": "train", "step": 30, "stage": "whole", "stage_step": 10, "images": 100, "seconds": 6.0, "loss": 1.0}
    said = words(make_run(tmp_path / "a", [record], **_going_on(status)))
    assert "10 steps, cut short" in said and "under way" not in said


def test_a_frechet_distance_stands_beside_held_out_images_only_at_equal_counts(tmp_path: Path) -> None:
    measures = _measures() | {"headline": "frechet_distance", "frechet_distance_halves": 0.9, "frechet_distance_halves_count": 250}
    said = words(make_run(tmp_path / "a", measures=measures | {"num_heldout": 360}))
    assert "0.8 to 1.2; at equal counts 0.7, new real images 0.5" in said
    assert "Frechet distance10.8 to 1.2\u2013The same" in said and "... at equal counts0.70.5Of as many" in said
    assert "... of two real parts0.9\u2013Two disjoint parts of the real images, 250 each." in said
    said = words(make_run(tmp_path / "b", measures=measures | {"num_heldout": 500}))
    assert "0.8 to 1.2; new real images: 0.5" in said and "Frechet distance10.8 to 1.20.5The same" in said


def test_samples_measured_before_the_run_went_on_are_said_to_be_so(tmp_path: Path) -> None:
    stale = "Measured after 12 s of training; the run has gone on since."
    said = words(make_run(tmp_path / "a", measures=_measures() | {"train_seconds": 12.0}))  # of 40
    assert in_order(said, f"In short{stale}It copies", f"How good is it?{stale}")
    assert "has gone on since" not in words(make_run(tmp_path / "b", measures=_measures() | {"train_seconds": 39.9}))
