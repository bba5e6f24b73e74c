"""The parts of a run's page about its training: stages, losses by noise level, evaluations on the way, averages of the weights."""

from __future__ import annotations

import math
import statistics

from maskdm.report import charts, page
from maskdm.report.page import Json, amount, as_object, count, finite, number, percent, text, word
from maskdm.report.state import Run, colors, is_masked, speed_up


def trend(run: Run) -> str:
    """Whether the held-out loss was still falling, from its last quarter of measurements."""
    records = [record for record in run.named("heldout") if amount(record, "loss") > 0 and finite(record, "seconds") is not None]
    losses = [amount(record, "loss") for record in records]
    if len(losses) < 4:
        return ""
    best, before = min(losses), min(losses[: -max(1, len(losses) // 4)])
    if losses[-1] > 1.03 * best:
        then, now = (finite(record, "train_loss") for record in (records[losses.index(best)], records[-1]))
        told = f"the held-out loss rose from {number(best)} at its best to {number(losses[-1])}"
        if then is None or now is None:
            return f"Overfitting, perhaps: {told}."
        if now < then:
            return f"Overfitting: {told}, while that of training images fell on to {number(now)}."
        course = f"that of training images went from {number(then)} to {number(now)}"
        return f"Worse, on training images too: {told}, {course}. That is no overfitting; try a lower lr."
    fall = 1 - best / before
    if fall > 0.01:
        advice = "" if run.status == "running" else "; train longer"
        return f"Still improving: the held-out loss fell by {percent(fall)} over the last quarter of its measurements{advice}."
    return f"Levelled off: the held-out loss stays at {number(losses[-1])}; longer training alone is unlikely to help much."


def early_stops(run: Run) -> list[str]:
    """Which stages ended before their budget, and why."""
    ends = run.named("early_stop")
    return [f"Stage {word(end, 'stage')} ended early: {count(end, 'since')} evaluations without a better one." for end in ends]


def lost_trackers(run: Run) -> list[str]:
    """Which trackers were dropped, and why."""
    last = {str(event.get("name")): event for event in run.named("tracker")}
    return [
        f"Tracking: {text(name)} failed at step {count(event, 'step')} and was left out from there on ({word(event, 'error')})."
        for name, event in last.items()
    ]


def stage_table(run: Run) -> str:
    """What each stage was, did, and how fast."""
    rows: list[list[str]] = []
    begun = "under way" if run.status == "running" else "cut short"
    for stage in run.stages:
        steps = amount(stage, "steps")
        state = "ended early" if stage.get("ended_early") else "done" if stage.get("done") else "not yet" if not steps else begun
        measured, ideal = speed_up(run, stage) if is_masked(stage) else ("1\u00d7", "by definition")
        seen = f"{percent(1 - amount(stage, 'hidden'))}<small>{count(stage, 'kept')} of {count(run.card, 'tokens')} patches</small>"
        row = [f"{word(stage, 'name')}<small>mask: {word(stage, 'mask')}</small>", seen]
        row += [f"{number(steps)} steps, {state}<small>budget: {word(stage, 'budget')}</small>"]
        row += [f"{count(stage, 'images')}<small>{word(stage, 'batch')} a step</small>", count(stage, "lr")]
        spent = f"<small>{page.scaled(finite(stage, 'flops'), 'FLOP')}</small>" if finite(stage, "flops") else ""
        row += [page.duration(amount(stage, "seconds")) + spent, count(stage, "images_per_second")]
        rows.append([*row, f"{measured}<small>{ideal}</small>"])
    head = ["Stage", "Sees", "Progress", "Images", "Learning rate", "Time", "Images/s", "Speed-up"]
    note = (
        '<p class="soft">Sees: the true share of the patches that the network works on. '
        "Speed-up: in images per second, over whole images in this run; the ideal counts arithmetic only; other load blurs it.</p>"
    )
    return page.table("Stages", head, rows) + note + _use(run) + _speed(run) if rows else ""


def _use(run: Run) -> str:
    """What each stage made of the machine: medians of its records, and its highest memory."""
    rows: list[list[str]] = []
    for stage in run.stages:
        records = [record for record in run.named("train") if record.get("stage") == stage.get("name")]
        found = {
            key: [value for value in (finite(record, key) for record in records) if value is not None]
            for key in ("tokens_per_second", "share_of_ceiling", "data_wait", "memory")
        }
        if all(found.values()):
            tokens, share, waiting = (statistics.median(found[key]) for key in ("tokens_per_second", "share_of_ceiling", "data_wait"))
            memory = f"{max(found['memory']) / 2**30:.2f} GiB"
            rows.append([word(stage, "name"), number(tokens), percent(share), percent(waiting), memory])
    if not rows:
        return ""
    head = ["Stage", "Tokens/s", "Share of ceiling", "Waiting for data", "Memory, peak"]
    note = (
        '<p class="soft">The ceiling is what this machine reached in large matrix products of the same precision when the run began '
        "(the share is also called MFU).</p>"
    )
    return page.table("Use of the machine", head, rows) + note


def _by_stage(run: Run, key: str, unit: float) -> list[charts.Series]:
    """A figure of the `train` records over the time, a line per stage: means, with the single records behind them."""
    series: list[charts.Series] = []
    for stage, color in colors(run).items():
        raw = page.points([record for record in run.named("train") if str(record.get("stage")) == stage], "seconds", key, unit)
        series.append(charts.Series(stage, charts.smooth(raw), color, faint=raw[:: math.ceil(len(raw) / 800) or 1]))
    return series


def _clock(run: Run) -> tuple[float, str]:
    return page.clock(max((amount(record, "seconds") for record in run.events), default=0.0))


def _speed(run: Run) -> str:
    unit, name = _clock(run)
    series, marks = _by_stage(run, "images_per_second", unit), page.stage_starts(run.events, unit)
    drawn = charts.chart("Speed", f"training time, {name}", "images per second", series, marks, logarithmic=False)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def curves(run: Run) -> str:
    """Training loss by stage, held-out beside training images, by noise level, and the kernel distance."""
    unit, name = _clock(run)
    train, marks = run.named("train"), page.stage_starts(run.events, unit)
    note = "Faint: single records; strong: their means."
    if any(map(is_masked, run.stages)):
        note += " A masked and a whole-image training loss measure different tasks and cannot be compared; the held-out loss can."
    lost = sum(1 for record in train if finite(record, "loss") is None)
    if lost:
        note += f" {lost} of {len(train)} records hold no finite loss: the training diverged there."
    x_label, heldout = f"training time, {name}", run.named("heldout")
    found = _best(run, "loss")
    line = page.points(heldout, "seconds", "loss", unit)
    measured = [
        charts.Series("held-out images", line, 1, dots=True, best=found and (found[0] / unit, found[1])),
        charts.Series("training images", page.points(heldout, "seconds", "train_loss", unit), 2, dots=True),
    ]
    told = "Whole images, in one target (the noise) for every stage, by the averaged weights. Where the two part, it learns by heart."
    drawn = charts.chart("Training loss", x_label, "loss", _by_stage(run, "loss", unit), marks, note)
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
        series.append(charts.Series(label, line, 1, dash=len(chosen) - place, dots=True))
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
        low, high = page.interval(record, "kernel_distance") or (None, None)
        if x is not None and y is not None:
            line.append((x / unit, y))
            bars += [(x / unit, low, high)] if low is not None and high is not None else []
    found = _best(run, "kernel_distance")
    series = [charts.Series("samples", line, 3, dots=True, bars=bars, best=found and (found[0] / unit, found[1]))]
    note = "Kernel distance of a few samples to training images, with its 95 % interval: lower is better, about 0 is as good as new."
    return charts.chart("Distance of samples on the way", x_label, "kernel distance", series, marks, note, logarithmic=False)


def _sweep(run: Run) -> str:
    points = page.as_objects(run.sweep.get("points"))
    ordinary, title = finite(as_object(run.sweep.get("ordinary")), "value"), "Length of the average"
    said = f"Post-hoc averages of the weights ({word(run.sweep, 'measure')}); the best is {word(run.sweep, 'best')} of the stage"
    ends = [(finite(point, "sigma_rel"), finite(point, "difference"), page.interval(point, "difference")) for point in points]
    known = [(x, y, *span) for x, y, span in ends if x is not None and y is not None and span]
    if ordinary and ordinary > 0 and len(known) == len(points):  # on the same images, which tells more than figures with an interval each
        unit = ordinary / 100
        line, bars = [(x, y / unit) for x, y, _, _ in known], [(x, low / unit, high / unit) for x, _, low, high in known]
        series = [charts.Series("averages of this length", line, 4, dots=True, bars=bars)]
        kept, here = (count(record, "step") for record in (as_object(run.sweep.get("ordinary")), run.sweep))
        apart = (
            f" That one is of step {kept}, these of {here}: training between them may be all of the difference."
            if kept not in (0, here)
            else ""
        )
        note = f"{said}. Below 0: better than the average that training kept ({number(ordinary)}).{apart}"
        return charts.chart(title, "sigma_rel", "difference, %", series, note=note, logarithmic=False)
    values = [
        (x, y) for x, y in ((finite(point, "sigma_rel"), finite(point, "value")) for point in points) if x is not None and y is not None
    ]
    kept = [(values[0][0], ordinary), (values[-1][0], ordinary)] if values and ordinary is not None else []
    series = [charts.Series("averages of this length", values, 4, dots=True), charts.Series("the average that training kept", kept, 1)]
    return charts.chart(title, "sigma_rel", "value", series, note=f"{said}.", logarithmic=all(y > 0 for _, y in (*values, *kept)))


def _best(run: Run, key: str) -> tuple[float, float] | None:
    """(seconds, value) of the best evaluation, if it went by this figure of `heldout` or `evaluate`."""
    found = run.named("best")
    if not found or str(found[-1].get("measure")).replace("-", "_").removeprefix("heldout_") != key:
        return None
    at = [each for each in run.named("evaluate" if key == "kernel_distance" else "heldout") if each.get("step") == found[-1].get("step")]
    seconds, value = (finite(at[-1], "seconds"), finite(at[-1], key)) if at else (None, None)
    return None if seconds is None or value is None else (seconds, value)


def best(run: Run) -> str:
    """Which evaluation was best, and whether a stage ended by it."""
    said: list[str] = []
    found = run.named("best")
    if found:
        last, name = found[-1], text(str(found[-1].get("measure", "?")).replace("-", " ").replace("_", " ").replace("heldout", "held-out"))
        said.append(f"Best {name}: {count(last, 'value')} at step {count(last, 'step')} (ringed; its weights are in <code>best</code>).")
    return page.bullets([*said, *early_stops(run)])


def overfitting(run: Run) -> str:
    """The loss of the finished weights on training and held-out images, and by noise level; from an evaluation."""
    found = as_object(run.measures.get("denoising"))
    levels = page.as_objects(found.get("levels"))
    if not levels:
        return ""

    def row(name: str, record: Json) -> list[str]:
        return [name, count(record, "train"), count(record, "heldout"), page.estimate(record, "gap", number)]

    rows = [row("All levels", found), *(row(f"t = {count(level, 't')}", level) for level in levels)]
    shown = page.table("Loss on training and held-out images", ["Noise level", "Training images", "Held-out images", "Gap"], rows)
    note = "Overfitting: a gap over all levels above 3 % of the loss on training images, interval and all. "
    note += "The levels differ by far: compare along a row."
    return f'<details><summary>Overfitting, level by level</summary>{shown}<p class="soft">{note}</p></details>'
