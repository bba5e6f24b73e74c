"""The report: from files written by hand, whole and damaged, to one page that needs nothing else."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskdm.errors import UserError
from maskdm.report import write_report
from maskdm.report.page import duration, number, percent
from maskdm.report.run import MAX_FRAMES

HOSTILE = "<script>alert('x')</script>&\"q'"
SECTIONS = ["samples", "quality", "copies", "colour", "stages", "loss", "time", "denoising", "masks", "data", "choices", "repeat"]
STEPS = range(20, 401, 20)


class Page(HTMLParser):
    """Every tag with its attributes, in order; and that each is closed where it should be."""

    VOID = ("meta", "link", "img", "input", "br", "line", "polyline")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for attributes in self.all("section")]


def _card(**changes: Any) -> dict[str, Any]:
    masked = {"name": "masked", "mask": "block 4, 75 %", "hidden": 0.75, "kept": 4, "batch": 64, "lr": 2e-4, "steps": 200, "images": 12800}
    masked |= {"seconds": 20.0, "done": True, "budget": "200 steps", "ideal_speedup": 4.0, "images_per_second": 900.0}
    whole = {**masked, "name": "whole", "mask": "none", "hidden": 0.0, "kept": 16, "ideal_speedup": 1.0, "images_per_second": 300.0}
    data = {"name": "digits", "count": 1797, "train": 1437, "heldout": 360, "height": 8, "width": 8, "channels": 1}
    data |= {"classes": ["zero", "one"], "broken": [["a/bad.png", "cut off"]], "notes": ["two are equal"], "content_hash": "abc123"}
    card = {"version": "0.1.0", "created": "2026-11-22T10:00:00", "command": "maskdm train digits --out runs/x", "status": "finished"}
    card |= {
        "error": None,
        "seed": 0,
        "parameters": 1437000,
        "model": "uvit 128 x 7",
        "data": data,
        "tokens": 16,
        "stages": [masked, whole],
    }
    card |= {"environment": {"device": "cpu", "threads": 2, "precision": "fp32"}, "choices": ["patch 2: it fits"]}
    return card | changes


def _events() -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"event": "surprise", "anything": [1]}]
    for step in STEPS:
        at = {"step": step, "stage": "masked" if step <= 200 else "whole", "seconds": step / 10}
        events.append({"event": "train", **at, "loss": 1 / step, "lr": 2e-4})
        if step % 80 == 0:
            levels = [{"t": 62.5, "loss": 0.5}, {"t": 562.5, "loss": 0.1}]
            known = {"train_loss": 1.5 / step, "train_levels": levels}
            events.append({"event": "heldout", **at, "loss": 2 / step, "levels": levels, **known})
            figures = {"kernel_distance": 40 / step - 0.2, "kernel_distance_interval": [40 / step - 0.3, 40 / step - 0.1]}
            events.append({"event": "evaluate", **at, **figures})
            events.append({"event": "sample", **at, "file": f"samples/step-{step:08d}.png"})
    return events


def _measures() -> dict[str, Any]:
    measures: dict[str, Any] = {"num_samples": 500, "class_accuracy": 0.95, "class_accuracy_heldout": 0.96, "frechet_distance": 1.0}
    measures |= {"frechet_distance_heldout": 0.5, "frechet_distance_matched": 0.7, "precision": 0.9, "recall": None}
    measures |= {"kernel_distance": 0.002, "kernel_distance_interval": [0.0012, 0.0028], "frechet_distance_interval": [0.8, 1.2]}
    worst = {"sample": 17, "train": 3, "name": "cat/17.png", "ratio": 0.125, "space": "pixels", "mirrored": True, "shift": [0, 1]}
    measures["copies"] = {"share": 0.03, "share_interval": [0.02, 0.05], "heldout_share": 0.001, "heldout_share_interval": [0.0, 0.004]}
    measures["copies"] |= {"threshold": 1 / 3, "worst": [worst]}
    red = {"name": "red", "samples": 0.5, "real": 0.4, "difference": 0.1, "interval": [0.08, 0.12], "drift": True}
    shares = {"channel": "red", "samples": [0.5, 0.5], "real": [0.25, 0.75]}
    measures["colour"] = {"drift": True, "verdict": "Samples are more red.", "statistics": [red], "histograms": [shares]}
    measures["classes"] = [{"name": "zero", "num_samples": 50, "kernel_distance": 0.01, "class_accuracy": 0.875}]
    measures["verdicts"] = ["It copies: 3 % of the samples.", "Only 500 samples were measured: take the figures as rough."]
    return measures | {"features": {"name": "self", "hash": "feed"}, "provenance": {"scheduler": "ddim", "steps": 50}}


def _picture(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 32), dtype=np.uint8)).save(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with every file."""
    folder = tmp_path / "my run"
    folder.mkdir()
    events = _events()
    (folder / "run.json").write_text(json.dumps(_card()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.json").write_text(json.dumps(_measures()))
    (folder / "config.yaml").write_text("data:\n  source: digits\n")
    pictures = ["samples.png", "masks.png", "neighbours.png", "copies.png", "denoising.png"]
    files = [*pictures, *(event["file"] for event in events if event["event"] == "sample")]
    for file in files:
        _picture(folder / file)
    return folder


def _report(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_a_finished_run_has_every_part(run: Path) -> None:
    assert write_report(run) == run / "report.html"
    page = _report(run)
    assert page.sections == SECTIONS
    summary = "maskdm learned 1_437 images of digits (8 \u00d7 8, gray, 2 classes) in 40_s on 2 CPU threads: "
    summary += "a masked stage seeing 25_% of the patches, then whole images."
    assert summary.replace("_", "\u202f") in page.words
    assert "3.00\u00d7" in page.words and "75\u202f% of the ideal 4.00\u00d7" in page.words  # 900 over 300 images/s
    assert "It copies: 3\u202f% of the samples." in page.words and "Only 500 samples" in page.words
    assert "0.0020.0012 to 0.0028" in page.words and "3\u202f%2\u202f% to 5\u202f%" in page.words
    assert "cat/17.png" in page.words and "pixels, mirrored" in page.words and "zero" in page.words
    assert "Samples are more red." in page.words and "10\u202f%8\u202f% to 12\u202f%" in page.words
    assert "source: digits" in page.words and "a/bad.png" in page.words and "patch 2: it fits" in page.words
    assert "FID" not in page.words
    assert not list(run.glob(".report*"))


def test_headings_are_in_order_and_pictures_have_words(run: Path) -> None:
    page = _report(run)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(image["alt"] for image in page.all("img"))
    drawn = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]  # those hidden stand beside their numbers
    assert len(drawn) == 5 and all(svg["aria-label"] for svg in drawn)


def test_nothing_comes_from_outside(run: Path) -> None:
    source = write_report(run).read_text(encoding="utf-8")
    assert "http://" not in source and "https://" not in source and "@import" not in source and "url(" not in source
    anchors = {f"#{name}" for name in SECTIONS}
    for _, attributes in Page(source).tags:
        for key in ("src", "href", "srcset", "data", "action"):
            link = attributes.get(key)
            assert link is None or link.startswith("data:") or link in anchors


def test_slider_holds_every_grid_and_shows_the_last(run: Path) -> None:
    page = _report(run)
    frames = [image for image in page.all("img") if "data-caption" in image]
    (control,) = page.all("input")
    assert len(frames) == 5 and control["max"] == "4"
    assert [("hidden" in frame) for frame in frames] == [True] * 4 + [False]
    assert frames[-1]["data-caption"] == "step 400, stage whole"
    assert len(page.all("img")) == 5 + 5


def test_many_grids_are_thinned_to_the_first_and_last_and_some_between(run: Path) -> None:
    (run / "metrics.jsonl").unlink()  # the folder itself is then the list
    for step in range(1000, 1100):
        _picture(run / f"samples/step-{step:08d}.png")
    frames = [image["data-caption"] for image in _report(run).all("img") if "data-caption" in image]
    assert len(frames) == MAX_FRAMES
    assert (frames[0], frames[-1]) == ("step-00000080", "step-00001099")


def _poison(value: Any) -> Any:
    if isinstance(value, dict):
        return {f"{key}": _poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_poison(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_whatever_comes_from_files_is_escaped(run: Path) -> None:
    clean = _report(run)
    card = _poison(_card(error="stopped: ")) | {"status": "finished"}
    card["environment"][HOSTILE] = HOSTILE
    (run / "run.json").write_text(json.dumps(card))
    events = [{**event, "stage": f"{event.get('stage')}{HOSTILE}"} for event in _events()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    measures = _poison(_measures())
    measures["provenance"][HOSTILE] = HOSTILE
    (run / "metrics.json").write_text(json.dumps(measures))
    (run / "config.yaml").write_text(HOSTILE)
    hostile = _report(run.rename(run.with_name("a & b")))
    assert len(hostile.all("script")) == len(clean.all("script")) == 1
    assert {key for _, attributes in hostile.tags for key in attributes} <= {key for _, attributes in clean.tags for key in attributes} | {
        "role"
    }
    assert hostile.sections == SECTIONS
    assert hostile.words.count(HOSTILE) > 20 and "a & b" in hostile.words


MISSING = {"metrics.jsonl": "loss", "metrics.json": "quality", "config.yaml": "repeat", "samples.png": "samples"}
MISSING |= {"masks.png": "masks", "neighbours.png": "copies", "copies.png": "copies", "denoising.png": "denoising", "samples": "time"}


@pytest.mark.parametrize("name", MISSING)
def test_each_file_may_be_absent(run: Path, name: str) -> None:
    (run / name).rename(run.parent / "away")
    page = _report(run)
    left_out = {"masks.png": ["masks"], "denoising.png": ["denoising"], "samples": ["time"], "metrics.json": ["colour"]}
    assert page.sections == [section for section in SECTIONS if section not in left_out.get(name, [])]  # others say that there is nothing
    assert "Traceback" not in page.words and "None" not in page.words and "nan" not in page.words


def test_only_run_json_is_needed_and_may_be_nearly_empty(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "running"}')
    page = _report(tmp_path)
    assert page.sections == ["samples", "quality", "loss", "repeat"]
    assert "No final samples yet" in page.words and "Nothing has been measured yet" in page.words


def test_wrong_types_are_tolerated(run: Path) -> None:
    card = {key: [1] if isinstance(value, dict | str) else "odd" for key, value in _card().items()}
    (run / "run.json").write_text(json.dumps(card))
    (run / "metrics.json").write_text('{"frechet_distance": "low", "kernel_distance": [1], "class_accuracy": NaN, "features": 3}')
    (run / "metrics.jsonl").write_text('[1]\n3\n{"event": "train"}\n{"event": "heldout", "loss": "x", "levels": 3}\n{"event": "sample"}\n')
    (run / "samples.png").write_bytes((run / "samples.png").read_bytes()[:60])  # one that is being written
    assert "No final samples yet" in _report(run).words


def test_half_a_line_is_ignored(run: Path) -> None:
    whole = write_report(run).read_text(encoding="utf-8")
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"event": "train", "step": 420, "stage": "whole", "seconds": 9')
    torn = write_report(run).read_text(encoding="utf-8")
    assert re.sub("as of [^<]*", "", torn) == re.sub("as of [^<]*", "", whole)


def test_what_a_resumed_run_did_over_is_drawn_once(run: Path) -> None:
    before = _report(run).words
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lost = '{"event": "heldout", "step": 410, "stage": "whole", "seconds": 90, "loss": 9, "levels": []}\n'
    (run / "metrics.jsonl").write_text("".join([*lines, lost, '{"event": "resume", "step": 400}\n']))
    strip = re.compile("as of [0-9: -]*")
    assert strip.sub("", _report(run).words) == strip.sub("", before)


def test_a_file_outside_the_run_is_not_taken_in(run: Path) -> None:
    _picture(run.parent / "private.png")
    (run / "metrics.jsonl").write_text('{"event": "sample", "step": 1, "stage": "whole", "file": "../private.png"}\n')
    assert "time" not in _report(run).sections


def test_failed_and_running_runs_say_so(run: Path) -> None:
    (run / "run.json").write_text(json.dumps(_card(status="failed", error="loss is not finite at step 300; lower lr")))
    failed = _report(run)
    assert "stopped with an error while learning" in failed.words and "loss is not finite at step 300; lower lr" in failed.words
    assert any(tag.get("class") == "badge failed" for tag in failed.all("span"))
    (run / "run.json").write_text(json.dumps(_card(status="running")))
    assert "is learning" in _report(run).words and "so far" in _report(run).words


def test_a_diverged_loss_is_named(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"event": "train", "step": 420, "stage": "whole", "seconds": 42, "loss": NaN}\n')
    assert "1 of 21 records hold no finite loss" in _report(run).words


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([0.4, 0.3, 0.2, 0.1], "Still improving: the held-out loss fell by 50"),
        ([0.4, 0.1, 0.1, 0.1], "Levelled off"),
        ([0.4, 0.1, 0.1, 0.2], "rose from 0.1"),
    ],
)
def test_the_course_of_the_heldout_loss_in_words(run: Path, losses: list[float], words: str) -> None:
    records = [{"event": "heldout", "step": i, "stage": "whole", "seconds": i, "loss": loss} for i, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert words in _report(run).words


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no run.json; is it a run directory of `maskdm train`\?"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text('{"version": "0.1')
    with pytest.raises(UserError, match="not a JSON object"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_numbers_for_people() -> None:
    assert [number(value) for value in (1437, 0.012345, 8533.4, None)] == ["1\u202f437", "0.0123", "8\u202f533", "&ndash;"]
    assert [percent(value) for value in (0.875, 1.0)] == ["87.5\u202f%", "100\u202f%"]
    said = ["4.2 s", "42 s", "3 min 20 s", "2 h", "3 d 4 h"]
    assert [duration(value).replace("\u202f", " ") for value in (4.2, 42, 200, 7200, 276000)] == said


def test_a_run_that_was_killed_is_told_from_one_that_goes_on(run: Path) -> None:
    import os
    import platform

    import psutil

    def write(age: float, **process: Any) -> None:
        (run / "run.json").write_text(json.dumps(_card(status="running", process=process)))
        for file in ("run.json", "metrics.jsonl"):
            os.utime(run / file, (time.time() - age,) * 2)

    here = {"pid": os.getpid(), "host": platform.node(), "started": psutil.Process().create_time()}
    for process, words in (
        (here, "is learning"),
        (here | {"started": 1.0}, "was ended, by a kill"),
        (here | {"started": 1.0, "host": "elsewhere"}, "is learning"),
        ({}, "is learning"),
    ):
        write(age=900, **process)
        assert words in _report(run).words, process
    write(age=60, **here | {"started": 1.0})  # its log was just written: the clock was set, and moved the process's beginning
    assert "is learning" in _report(run).words
    write(age=60, **here | {"pid": 2**22 + 1})
    assert "was ended, by a kill" in _report(run).words
    (run / "run.json").write_text(json.dumps(_card(status="stopped")))
    assert "was stopped while learning" in _report(run).words


def test_only_inceptions_distance_is_called_fid(run: Path) -> None:
    assert "FID" not in _report(run).words
    (run / "metrics.json").write_text(json.dumps(_measures() | {"fid": 1.0}))
    assert "FID" in _report(run).words


def test_evaluations_are_listed_and_those_of_other_features_marked(run: Path) -> None:
    other = _measures() | {"features": {"name": "onnx", "hash": "beef"}}
    (run / "evaluations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (other, _measures())))
    page = _report(run)
    assert "All evaluations (2)" in page.words
    assert page.words.count("does not compare") == 1


def test_best_and_early_stop_are_said(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"event": "best", "step": 320, "stage": "whole", "measure": "heldout-loss", "value": 0.005}\n')
        lines.write('{"event": "early_stop", "step": 400, "stage": "whole", "measure": "heldout-loss", "best": 0.005, "since": 5}\n')
    words = _report(run).words
    assert "Best held-out loss: 0.005 at step 320" in words
    assert words.count("5 evaluations without a better one") == 2  # in short, and below the losses


def test_lengths_of_averages_are_drawn(run: Path) -> None:
    sweep = {"points": [{"sigma_rel": s, "value": 0.1 + s} for s in (0.05, 0.1)], "measure": "heldout-loss", "best": 0.05}
    (run / "ema_sweep.json").write_text(json.dumps(sweep | {"ordinary": {"value": 0.12}}))
    page = _report(run)
    assert "Length of the average" in page.words and "the best is 0.05" in page.words


def test_a_page_of_large_pictures_stays_small(run: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)
    for name in ("samples.png", "masks.png", "samples/step-00000080.png", "samples/step-00000160.png", "samples/step-00000240.png"):
        Image.fromarray(noise).save(run / name, compress_level=1)
    assert write_report(run).stat().st_size < 8_000_000
