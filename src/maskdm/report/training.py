"""The parts of a run's page about its training: stages, losses by noise level, evaluations on the way, averages of the weights."""

from __future__ import annotations

import math

from maskdm.report import charts, page
from maskdm.report.page import Json, amount, as_object, count, finite, number, percent, word
from maskdm.report.state import Run, colors, is_masked, speed_up


def trend(run: Run) -> str:
    """Whether the held-out loss was still falling, from its last quarter of measurements."""
    losses = [loss for _, loss in page.points(run.named("heldout"), "seconds", "loss")]
    if len(losses) < 4:
        return ""
    best, before = min(losses), min(losses[: -max(1, len(losses) // 4)])
    if losses[-1] > 1.03 * best:
        return f"The held-out loss rose from {number(best)} at its best to {number(losses[-1])}: overfitting, perhaps."
    fall = 1 - best / before
    if fall > 0.01:
        return f"Still improving: the held-out loss fell by {percent(fall)} over the last quarter of its measurements; train longer."
    return f"The held-out loss has levelled off at {number(losses[-1])}: longer training alone is unlikely to help much."


def stage_table(run: Run) -> str:
    """What each stage was, did, and how fast."""
    rows: list[list[str]] = []
    for stage in run.stages:
        steps = amount(stage, "steps")
        state = "ended early" if stage.get("ended_early") else "done" if stage.get("done") else "not yet" if not steps else "under way"
        tokens = f"{count(stage, 'kept')} of {count(run.card, 'tokens')}"
        measured, ideal = speed_up(run, stage) if is_masked(stage) else ("1\u00d7", "by definition")
        row = [word(stage, "name"), word(stage, "mask"), percent(finite(stage, "hidden")), tokens]
        row += [f"{number(steps)} steps, {state}<small>budget: {word(stage, 'budget')}</small>", count(stage, "images")]
        row += [word(stage, "batch"), count(stage, "lr"), page.duration(amount(stage, "seconds")), count(stage, "images_per_second")]
        rows.append([*row, f"{measured}<small>{ideal}</small>"])
    head = ["Stage", "Mask", "Hidden", "Patches", "Progress", "Images", "Batch", "Rate", "Time", "Images/s", "Speed-up"]
    note = (
        '<p class="soft">Hidden: the true share of the patches that the network does not see. Patches: those it sees. Rate: of learning. '
        "Speed-up: in images per second, over whole images in this run; the ideal counts arithmetic only; other load blurs it.</p>"
    )
    return page.table("Stages", head, rows) + note if rows else ""


def curves(run: Run) -> str:
    """Training loss by stage, held-out beside training images, by noise level, and the kernel distance."""
    unit, name = page.clock(max((amount(record, "seconds") for record in run.events), default=0.0))
    train, marks = run.named("train"), page.stage_starts(run.events, unit)
    series: list[charts.Series] = []
    for stage, color in colors(run).items():
        raw = page.points([record for record in train if str(record.get("stage")) == stage], "seconds", "loss", unit)
        series.append(charts.Series(stage, charts.smooth(raw), color, faint=raw[:: math.ceil(len(raw) / 800) or 1]))
    note = "Faint: single records; strong: their means."
    if any(map(is_masked, run.stages)):
        note += " A masked and a whole-image training loss measure different tasks and cannot be compared; the held-out loss can."
    lost = sum(1 for record in train if finite(record, "loss") is None)
    if lost:
        note += f" {lost} of {len(train)} records hold no finite loss: the training diverged there."
    x_label, heldout = f"training time, {name}", run.named("heldout")
    measured = [
        charts.Series("held-out images", page.points(heldout, "seconds", "loss", unit), 1, dots=True),
        charts.Series("training images", page.points(heldout, "seconds", "train_loss", unit), 2, dots=True),
    ]
    told = "Whole images, in one target (the noise) for every stage, of the averaged weights: lower is better. Apart: learnt by heart."
    drawn = charts.chart("Training loss", x_label, "loss", series, marks, note)
    drawn += charts.chart("Loss on whole images", x_label, "noise loss", measured, marks, told)
    drawn += _levels(heldout) + _distances(run, unit, x_label, marks) + _sweep(run)
    return f'<div class="charts">{drawn}</div>' if drawn else '<p class="soft">Nothing has been measured yet.</p>'


def _levels(heldout: list[Json]) -> str:
    records = [record for record in heldout if record.get("levels")]
    chosen = dict.fromkeys((0, (len(records) - 1) // 2, len(records) - 1)) if records else {}
    series: list[charts.Series] = []
    for place, index in enumerate(chosen, start=1):
        line = page.points(page.as_objects(records[index].get("levels")), "t", "loss")
        label = f"after {page.duration(amount(records[index], 'seconds'))}"
        series.append(charts.Series(label, line, 1, strength=place / len(chosen), dots=True))
    if records:
        known = page.points(page.as_objects(records[-1].get("train_levels")), "t", "loss")
        series.append(charts.Series("training images, last", known, 2, dots=True))
    note = "0 is a clean image, 1000 pure noise. Left: fine detail; right: the layout of the whole."
    return charts.chart("Held-out loss by noise level", "noise level t", "noise loss", series, note=note)


def _distances(run: Run, unit: float, x_label: str, marks: list[tuple[float, str]]) -> str:
    line: list[tuple[float, float]] = []
    bars: list[tuple[float, float, float]] = []
    for record in run.named("evaluate"):
        x, y = finite(record, "seconds"), finite(record, "kernel_distance")
        low, high = interval(record, "kernel_distance") or (None, None)
        if x is not None and y is not None:
            line.append((x / unit, y))
            bars += [(x / unit, low, high)] if low is not None and high is not None else []
    series = [charts.Series("samples", line, 3, dots=True, bars=bars)]
    note = "Kernel distance of samples to training images, with its 95 % interval: lower is better, about 0 is as good as new."
    return charts.chart("Distance of samples on the way", x_label, "kernel distance", series, marks, note, logarithmic=False)


def _sweep(run: Run) -> str:
    points = [(finite(point, "sigma_rel"), finite(point, "value")) for point in page.as_objects(run.sweep.get("points"))]
    line = [(x, y) for x, y in points if x is not None and y is not None]
    ordinary = finite(as_object(run.sweep.get("ordinary")), "value")
    series = [charts.Series("averages of this length", line, 4, dots=True)]
    if line and ordinary is not None:
        series.append(charts.Series("the average that training kept", [(line[0][0], ordinary), (line[-1][0], ordinary)], 1))
    note = f"Post-hoc averages of the weights ({word(run.sweep, 'measure')}); the best is {word(run.sweep, 'best')} of the stage."
    positive = all(y > 0 for each in series for _, y in each.points)
    return charts.chart("Length of the average", "sigma_rel", "value", series, note=note, logarithmic=positive)


def best(run: Run) -> str:
    """Which evaluation was best, and whether a stage ended by it."""
    said: list[str] = []
    found = run.named("best")
    if found:
        last = found[-1]
        said.append(f"Best {word(last, 'measure')}: {count(last, 'value')} at step {count(last, 'step')} (weights in <code>best</code>).")
    for record in run.named("early_stop"):
        said.append(f"Stage {word(record, 'stage')} ended early: {count(record, 'since')} evaluations without a better one.")
    return page.bullets(said)


def interval(record: Json, key: str) -> tuple[float, float] | None:
    """The 95 % interval of a figure, where it is there and finite."""
    ends = page.as_list(record.get(f"{key}_interval"))
    if len(ends) != 2:
        return None
    low, high = (finite({"end": end}, "end") for end in ends)
    return None if low is None or high is None else (low, high)
