"""A run directory as one self-contained HTML page, from its files only: what was trained, on what, how long, how well.

Works while the run goes on and after it failed: a file that is absent or half written is left out, or named as missing.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from maskdm.errors import UserError
from maskdm.report import charts, page
from maskdm.report.page import Json, amount, as_list, as_object, count, finite, number, percent, text, word

MAX_FRAMES = 24  # grids over time inside the page; more would make it heavy


def write_report(run: Path) -> Path:
    """Write run/report.html from the files in the run directory, replacing an older one at once; returns its path.

    Raises UserError when `run` is not a run directory.
    """
    state = _read(run)
    target = run / "report.html"
    unfinished = run / f".report.html.{os.getpid()}"
    unfinished.write_text(_render(state), encoding="utf-8")
    os.replace(unfinished, target)
    return target


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    folder: Path
    card: Json
    events: list[Json]
    measures: Json
    config: str
    updated: datetime

    @property
    def stages(self) -> list[Json]:
        return page.as_objects(self.card.get("stages"))

    def named(self, event: str) -> list[Json]:
        return [record for record in self.events if record.get("event") == event]


def _read(run: Path) -> _Run:
    card = run / "run.json"
    if not card.is_file():
        raise UserError(f"{run} has no run.json; is it a run directory of `maskdm train`?")
    content = page.parse(page.read_text(card))
    if not content:
        raise UserError(f"{card} is not a JSON object; restore it, or train again into another directory")
    updated = max(path.stat().st_mtime for path in (card, run / "metrics.jsonl") if path.is_file())
    return _Run(
        folder=run,
        card=content,
        events=page.read_events(run / "metrics.jsonl"),
        measures=page.parse(page.read_text(run / "metrics.json")),
        config=page.read_text(run / "config.yaml"),
        updated=datetime.fromtimestamp(updated).astimezone(),
    )


# --- what happened, in words --------------------------------------------------------------------------------------


def _is_masked(stage: Json) -> bool:
    return amount(stage, "hidden") > 0


def _seconds(run: _Run) -> float:
    return sum((amount(stage, "seconds") for stage in run.stages), 0.0)


def _status(run: _Run) -> str:
    status = run.card.get("status")
    return status if status in ("finished", "failed") else "running"


def _size(data: Json) -> str:
    return f"{word(data, 'height')} \u00d7 {word(data, 'width')}"


def _summary(run: _Run) -> str:
    data, environment = as_object(run.card.get("data")), as_object(run.card.get("environment"))
    classes = len(as_list(data.get("classes")))
    kind = {1.0: "gray", 3.0: "colour"}.get(amount(data, "channels"), "")
    traits = ", ".join(filter(None, (_size(data), kind, f"{classes} classes" if classes else "")))
    images = finite(data, "train") or finite(data, "count")
    on_cpu = environment.get("device", "cpu") == "cpu"
    threads = environment.get("threads", "?")
    place = f"{text(threads)} CPU thread{'s' if threads != 1 else ''}" if on_cpu else text(environment.get("device"))
    seen = [1 - amount(stage, "hidden") for stage in run.stages]
    stages = [f"a masked stage seeing {percent(share)} of the patches" if share < 1 else "whole images" for share in seen]
    verb, spent = {
        "finished": ("learned", "in {}"),
        "failed": ("stopped with an error while learning", "after {}"),
        "running": ("is learning", "({} so far)"),
    }[_status(run)]
    course = f": {', then '.join(stages)}" if stages else ""
    subject = f"{number(images)} images of {text(data.get('name', 'unnamed data'))} ({traits})"
    return f"maskdm {verb} {subject} {spent.format(page.duration(_seconds(run)))} on {place}{course}."


def _whole_rate(run: _Run) -> float | None:
    """Images per second of whole images: the last whole-image stage is what masking is measured against."""
    rates = [finite(stage, "images_per_second") for stage in run.stages if not _is_masked(stage)]
    return next((rate for rate in reversed(rates) if rate), None)


def _speed_up(run: _Run, stage: Json) -> tuple[str, str]:
    """The stage's measured speed-up over whole images, and the ideal one with the share of it that was reached."""
    reference, rate, ideal = _whole_rate(run), finite(stage, "images_per_second"), finite(stage, "ideal_speedup")
    measured = rate / reference if rate and reference else None
    share = f"{percent(measured / ideal)} of the " if measured and ideal else ""
    return f"{measured:.2f}\u00d7" if measured else "&ndash;", f"{share}ideal {ideal:.2f}\u00d7" if ideal else ""


def _facts(run: _Run) -> str:
    environment = as_object(run.card.get("environment"))
    place = f"{word(environment, 'device')}, {word(environment, 'precision')}"
    facts = [
        ("Training time", page.duration(_seconds(run)), place),
        ("Images seen", number(sum(amount(stage, "images") for stage in run.stages)), "repetitions counted"),
        ("Parameters", count(run.card, "parameters"), text(run.card.get("model", ""))),
    ]
    masked = next((stage for stage in run.stages if _is_masked(stage)), None)
    if masked:
        facts.append(("Masked stage's speed", *_speed_up(run, masked)))
    return page.tiles(facts)


def _header(run: _Run) -> str:
    status = _status(run)
    error = f'<p class="error" role="alert">{text(run.card["error"])}</p>' if run.card.get("error") else ""
    return (
        f'<div class="title"><h1>{text(run.folder.resolve().name)}</h1><span class="badge {status}">{status}</span></div>'
        f'<p class="lead">{_summary(run)}</p>{error}<p class="soft">As of {run.updated:%Y-%m-%d %H:%M:%S}.</p>{_facts(run)}'
    )


# --- quality --------------------------------------------------------------------------------------------------------

_MEASURES = (
    ("Class accuracy", "class_accuracy", percent, "Share recognised as the class asked for, by a classifier of real images."),
    ("Frechet distance", "frechet_distance", number, "How far samples lie from the training images. Lower is better."),
    ("... at equal counts", "frechet_distance_matched", number, "The same for as many samples as held-out images: the fair one."),
    ("Kernel distance", "kernel_distance", number, "The same question, unbiased in small numbers, &plusmn; its standard error."),
    ("Precision", "precision", percent, "Share of the samples that lie among real images: are they plausible?"),
    ("Recall", "recall", percent, "Share of the real images that lie among samples: is their variety reached?"),
)
_RECOGNISED = (
    (-0.02, "more typical than"),
    (0.02, "as recognisable as"),
    (0.1, "a little less recognisable than"),
    (math.inf, "clearly less recognisable than"),
)
_APART = (
    (1.1, "as close to the training images as"),
    (1.5, "nearly as close to the training images as"),
    (5.0, "visibly farther from the training images than"),
    (math.inf, "much farther from the training images than"),
)
_COPIED = ((0.5, "Strong suspicion of copying"), (0.8, "Some suspicion of copying"), (math.inf, "No sign of copying on the whole"))


def _grade(value: float, grades: tuple[tuple[float, str], ...]) -> str:
    """The words of the first limit that the value does not exceed."""
    return next(words for limit, words in grades if value <= limit)


def _trend(run: _Run) -> str:
    """Whether the held-out loss was still falling, from its last quarter of measurements."""
    losses = [loss for _, loss in page.points(run.named("heldout"), "seconds", "loss")]
    if len(losses) < 4:
        return ""
    best, before = min(losses), min(losses[: -max(1, len(losses) // 4)])
    if losses[-1] > 1.03 * best:
        return f"The held-out loss rose from {number(best)} at its best to {number(losses[-1])}: overfitting, perhaps."
    fall = 1 - best / before
    if fall > 0.01:
        return f"The held-out loss still fell by {percent(fall)} over the last quarter of its measurements: longer training may help."
    return f"The held-out loss has levelled off at {number(losses[-1])}: longer training alone is unlikely to help much."


def _verdicts(run: _Run) -> list[str]:
    measures, said = run.measures, [_trend(run)]
    accuracy, real = finite(measures, "class_accuracy"), finite(measures, "class_accuracy_heldout")
    if accuracy is not None and real is not None:
        shares = f"a classifier is right on {percent(accuracy)} of them, and on {percent(real)} of held-out images"
        said.append(f"Samples are {_grade(real - accuracy, _RECOGNISED)} real images: {shares}.")
    distance = finite(measures, "frechet_distance_matched") or finite(measures, "frechet_distance")
    floor = finite(measures, "frechet_distance_heldout")
    if distance is not None and floor:
        ratio = distance / floor
        said.append(f"Samples are {_grade(ratio, _APART)} real ones: {number(ratio)} times the held-out images' Frechet distance.")
    copied = _nearest_ratio(run)
    if copied is not None:
        said.append(f"{_grade(copied, _COPIED)}: the nearest training image is {copied:.2f} times as far as from a held-out image.")
    num = finite(measures, "num_samples")
    if num is not None and num < 1000:
        said.append(f"Only {number(num)} samples were measured: take the figures as rough.")
    return [sentence for sentence in said if sentence]


def _measured(measures: Json, key: str, show: Callable[[float | None], str]) -> str:
    pair = as_object(measures.get(key))
    error = finite(pair, "standard_error")
    shown = show(finite(pair, "value") if pair else finite(measures, key))
    return f"{shown} &plusmn; {show(error)}" if error is not None else shown


def _quality(run: _Run) -> str:
    measures, verdicts = run.measures, page.bullets(_verdicts(run), "verdict")
    if not measures:
        return verdicts + '<p class="soft">Samples are not measured yet: <code>maskdm evaluate RUN --data DATA</code> does it.</p>'
    rows: list[list[str]] = []
    for name, key, show, meaning in _MEASURES:
        real = "frechet_distance_heldout" if key.startswith("frechet") else f"{key}_heldout"
        if measures.get(key) is not None:
            rows.append([name, _measured(measures, key, show), _measured(measures, real, show), meaning])
    features = as_object(measures.get("features"))
    carried = as_object(measures.get("provenance")) | {f"features: {key}": value for key, value in features.items()}
    origin = [f"{text(key)}: {text(value)}" for key, value in carried.items() if value is not None]
    note = (
        f"{count(measures, 'num_samples')} samples. Distances compare only within the same features ({word(features, 'name')}) and counts."
    )
    found = page.table("Measures", ["Measure", "Samples", "Held-out real images", "Meaning"], rows, wide=True)
    return f'{verdicts}{found}<p class="soft">{note}</p><details><summary>How it was measured</summary>{page.bullets(origin)}</details>'


def _nearest_ratio(run: _Run) -> float | None:
    nearest = as_object(run.measures.get("nearest_train"))
    return finite(nearest, "features_ratio") or finite(nearest, "pixels_ratio")


def _neighbours(run: _Run) -> str:
    note = "Above: samples. Below each: the training image nearest to it. Alike is good; the same picture is a copy."
    drawn = page.figure(run.folder / "neighbours.png", "Samples above the training images nearest to them", note, 900)
    nearest = as_object(run.measures.get("nearest_train"))
    rows = [[space, *(count(nearest, f"{space}_{of}") for of in ("samples", "heldout", "ratio"))] for space in ("features", "pixels")]
    head = ["Median distance, in", "Samples", "Held-out real images", "Ratio"]
    return drawn + (page.table("Distances to the nearest training images", head, rows) if nearest else "")


# --- sections -----------------------------------------------------------------------------------------------------


def _samples(run: _Run) -> str:
    name = as_object(run.card.get("data")).get("name", "the data")
    note = "Drawn from noise by the averaged (EMA) weights, with real images beside them as the picture's labels say."
    drawn = page.figure(run.folder / "samples.png", f"Grid of generated images of {name} beside real ones", note, 760)
    return drawn or '<p class="soft">No final samples yet: they are drawn when the training ends, or by <code>maskdm sample</code>.</p>'


def _masks(run: _Run) -> str:
    note = "Above: training images. Below: what is left of them. The network computes nothing for the gray patches."
    return page.figure(run.folder / "masks.png", "Training images with the hidden patches covered", note, 900)


def _stage_table(run: _Run) -> str:
    rows: list[list[str]] = []
    for stage in run.stages:
        steps = amount(stage, "steps")
        state = "done" if stage.get("done") else "not yet" if not steps else "under way"
        tokens = f"{count(stage, 'kept')} of {count(run.card, 'tokens')}"
        measured, ideal = _speed_up(run, stage) if _is_masked(stage) else ("1\u00d7", "by definition")
        row = [word(stage, "name"), word(stage, "mask"), percent(finite(stage, "hidden")), tokens]
        row += [f"{number(steps)} steps, {state}<small>budget: {word(stage, 'budget')}</small>", count(stage, "images")]
        row += [
            word(stage, "batch"),
            count(stage, "lr"),
            page.duration(amount(stage, "seconds")),
            count(stage, "images_per_second"),
        ]
        rows.append([*row, f"{measured}<small>{ideal}</small>"])
    head = ["Stage", "Mask", "Hidden", "Patches", "Progress", "Images", "Batch", "Rate", "Time", "Images/s", "Speed-up"]
    note = (
        '<p class="soft">Hidden: the true share of the patches that the network does not see. Patches: those it sees. Rate: of learning. '
        "Speed-up: in images per second, over whole images in this run; the ideal counts arithmetic only; other load blurs it.</p>"
    )
    return page.table("Stages", head, rows) + note if rows else ""


def _colors(run: _Run) -> dict[str, int]:
    return {str(stage.get("name")): index % page.NUM_COLORS for index, stage in enumerate(run.stages)}


def _curves(run: _Run) -> str:
    unit, name = page.clock(max((amount(record, "seconds") for record in run.events), default=0.0))
    colors, train, marks = _colors(run), run.named("train"), page.stage_starts(run.events, unit)
    series: list[charts.Series] = []
    for stage, color in colors.items():
        raw = page.points([record for record in train if str(record.get("stage")) == stage], "seconds", "loss", unit)
        series.append(charts.Series(stage, charts.smooth(raw), color, faint=raw[:: math.ceil(len(raw) / 800) or 1]))
    note = "Faint: single records; strong: their means."
    if any(map(_is_masked, run.stages)):
        note += " A masked and a whole-image training loss measure different tasks and cannot be compared; the held-out loss can."
    lost = sum(1 for record in train if finite(record, "loss") is None)
    if lost:
        note += f" {lost} of {len(train)} records hold no finite loss: the training diverged there."
    x_label = f"training time, {name}"
    line = page.points(run.named("heldout"), "seconds", "loss", unit)
    measured = [charts.Series("held-out images, EMA weights", line, 1, dots=True)]
    told = "Whole images that were never trained on, in one target (the noise) for every stage: lower is better."
    drawn = charts.chart("Training loss", x_label, "loss", series, marks, note)
    drawn += charts.chart("Held-out loss", x_label, "noise loss", measured, marks, told) + _levels_chart(run)
    return f'<div class="charts">{drawn}</div>' if drawn else '<p class="soft">Nothing has been measured yet.</p>'


def _levels_chart(run: _Run) -> str:
    records = [record for record in run.named("heldout") if record.get("levels")]
    chosen = dict.fromkeys((0, (len(records) - 1) // 2, len(records) - 1)) if records else {}
    series: list[charts.Series] = []
    for place, index in enumerate(chosen, start=1):
        line = page.points(page.as_objects(records[index].get("levels")), "t", "loss")
        label = f"after {page.duration(amount(records[index], 'seconds'))}"
        series.append(charts.Series(label, line, 1, strength=place / len(chosen), dots=True))
    note = "0 is a clean image, 1000 pure noise. Left: fine detail; right: the layout of the whole."
    return charts.chart("Held-out loss by noise level", "noise level t", "noise loss", series, note=note)


def _frames(run: _Run) -> str:
    captions = {
        str(record.get("file")): f"step {count(record, 'step')}, stage {record.get('stage', '?')}" for record in run.named("sample")
    } or {f"samples/{path.name}": path.stem for path in sorted((run.folder / "samples").glob("*.png"))}
    root = run.folder.resolve()
    files = [file for file in captions if (root / file).resolve().is_relative_to(root) and (root / file).is_file()]
    num = min(len(files), MAX_FRAMES)
    chosen = [files[round(index * (len(files) - 1) / max(1, num - 1))] for index in range(num)]
    control = page.slider([(root / file, captions[file]) for file in chosen])
    left_out = f" {num} of {len(files)} grids are shown here." if num < len(files) else ""
    note = f'<p class="soft">Arrow keys move the slider.{left_out}</p>'
    return control and control + note


def _data(run: _Run) -> str:
    data = as_object(run.card.get("data"))
    if not data:
        return ""
    classes = [text(name) for name in as_list(data.get("classes"))]
    shown = ", ".join(classes[:40]) + (f" and {len(classes) - 40} more" if len(classes) > 40 else "")
    facts = [
        f"{count(data, 'count')} images of {_size(data)} pixels: {count(data, 'train')} trained on, {count(data, 'heldout')} held out",
        f"{len(classes)} classes: {shown}" if classes else "no classes",
        f"content hash <code>{word(data, 'content_hash')}</code>",
    ]
    broken = [[text(part) for part in as_list(item)] for item in as_list(data.get("broken"))]
    rows = [[*item, "", ""][:2] for item in broken[:100]]
    more = f'<p class="soft">and {len(broken) - 100} more</p>' if len(broken) > 100 else ""
    listed = page.table("Files left out", ["File", "Reason"], rows, wide=True) + more
    left = f"<h3>Files left out ({len(broken)})</h3>{listed}" if rows else ""
    return page.bullets(facts + [text(note) for note in as_list(data.get("notes"))]) + left


def _repeat(run: _Run) -> str:
    folder = shlex.quote(str(run.folder))
    train = str(run.card.get("command", "maskdm train DATA --out RUN"))
    sample, evaluate = f"maskdm sample {folder} --num 64 --out samples", f"maskdm evaluate {folder} --data DATA --num 1000"
    known: Json = {"maskdm": run.card.get("version"), "created": run.card.get("created"), "seed": run.card.get("seed")}
    known |= as_object(run.card.get("environment"))
    rows = [[text(key), text(value)] for key, value in known.items() if value is not None]
    config = f'<details><summary>The whole configuration</summary><pre tabindex="0">{text(run.config)}</pre></details>'
    return (
        f'<h3>Commands</h3><pre tabindex="0">{text(train)}\n{text(sample)}\n{text(evaluate)}</pre>{config if run.config else ""}'
        f"<h3>Environment</h3>{page.table('Environment', ['What', 'Which'], rows, wide=True)}"
    )


def _render(run: _Run) -> str:
    parts: list[tuple[str, str, Callable[[_Run], str]]] = [
        ("samples", "Samples", _samples),
        ("quality", "How good is it?", _quality),
        ("neighbours", "Does it copy?", _neighbours),
        ("stages", "Stages", _stage_table),
        ("loss", "Loss", _curves),
        ("time", "Samples over time", _frames),
        ("masks", "What the masked stage sees", _masks),
        ("data", "Data", _data),
        (
            "choices",
            "Chosen automatically",
            lambda run: page.bullets([text(choice) for choice in as_list(run.card.get("choices"))]),
        ),
        ("repeat", "To repeat it", _repeat),
    ]
    title = f"{run.folder.resolve().name} - maskdm"
    return page.document(title, _header(run), [page.Section(name, heading, build(run)) for name, heading, build in parts])
