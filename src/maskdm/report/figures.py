"""What several runs came to: which figures may be compared, and the words and tables that compare them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import yaml

from maskdm.report import page
from maskdm.report.page import Json, as_object, count, estimate, finite, number, percent, scaled, text, word
from maskdm.report.state import Line, Run, gain, times

CHANCE = "One run each: a difference between two runs may be chance; repeat them with other seeds to know."

# (name, key in metrics.json, how it is shown, whether the number of samples moves it)
_MEASURES: tuple[tuple[str, str, Callable[[float | None], str], bool], ...] = (
    ("Kernel distance", "kernel_distance", number, False),
    ("Frechet distance", "frechet_distance", number, True),
    ("Precision", "precision", percent, True),
    ("Recall", "recall", percent, True),
    ("Density", "density", number, True),
    ("Coverage", "coverage", percent, True),
    ("Class accuracy", "class_accuracy", percent, False),
    ("Copies share", "copies.share", percent, True),
)
_SAMPLER = ("scheduler", "steps", "eta", "guidance", "weights")


def names(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _looked_up(record: Json, key: str) -> Any:
    *outer, last = key.split(".")
    for name in outer:
        record = as_object(record.get(name))
    return record.get(last)


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """A tree of settings as {dotted name: value}; items of a list of mappings go by their `name`, or their place."""
    if isinstance(value, dict) and value:
        pairs = [(str(key), item) for key, item in cast(dict[Any, Any], value).items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in cast(list[Any], value)):
        pairs = [(str(as_object(item).get("name", place)), item) for place, item in enumerate(cast(list[Any], value))]
    else:
        return {prefix: "none" if value is None else str(cast(object, value))}
    return {name: leaf for key, item in pairs for name, leaf in flatten(item, f"{prefix}.{key}" if prefix else key).items()}


def settings(run: Run) -> dict[str, str]:
    """The run's config.yaml, flat; empty when it is absent or damaged."""
    try:
        read = yaml.safe_load(run.config)
    except yaml.YAMLError:
        return {}
    return flatten(read) if isinstance(read, dict) else {}


# --- what does not compare ------------------------------------------------------------------------------------------


def _differ(runs: Sequence[Run], get: Callable[[Run], Any]) -> bool:
    """Whether two runs state different values; one that states none is not known to differ."""
    return len({repr(value) for value in map(get, runs) if value is not None}) > 1


def unlike_losses(runs: Sequence[Run]) -> list[str]:
    """What makes the held-out losses of the runs answers to different questions."""
    asked = {"content_hash": "images", "height": "heights", "width": "widths", "channels": "channels", "heldout": "held-out images"}
    found = [what for key, what in asked.items() if _differ(runs, lambda run, key=key: run.data.get(key))]
    noise = {"diffusion.schedule": "noise schedules", "data.conditional": "classes shown"}
    flat = {run.label: settings(run) for run in runs}
    return found + [what for key, what in noise.items() if _differ(runs, lambda run, key=key: flat[run.label].get(key))]


def unlike_clocks(runs: Sequence[Run]) -> bool:
    """Whether the runs were trained on different hardware, so that their seconds differ in kind."""

    def machine(run: Run) -> list[Any] | None:
        known = [run.environment.get(key) for key in ("device", "gpu", "cpu", "threads")]
        return known if any(value is not None for value in known) else None

    return _differ(runs, machine)


def _shown(runs: Sequence[Run], get: Callable[[Run], Any]) -> str:
    return "; ".join(f"{text(run.label)}: {text(value)}" for run in runs if (value := get(run)) is not None)


def unlike_measures(runs: Sequence[Run]) -> tuple[list[str], bool, bool]:
    """Remarks in words; whether no measure of samples compares; whether those do not that the number of samples moves."""
    measured = [run for run in runs if run.measures]
    said: list[str] = []

    def check(what: str, key: str, consequence: str) -> bool:
        def get(run: Run) -> Any:
            value = _looked_up(run.measures, key)
            return value[:12] if key.endswith("hash") and isinstance(value, str) else value

        if not _differ(measured, get):
            return False
        said.append(f"{what} differ ({_shown(measured, get)}): {consequence}.")
        return True

    void = "distances, precision, recall, accuracy and copies do not compare"
    all_void = [
        check("Feature networks", "features.hash", void),
        check("The measured data", "provenance.data_hash", void),
        check("Reference images", "reference", void),
    ]
    rest = "" if any(all_void) else "; the kernel distance does"
    biased = check("Numbers of samples", "num_samples", f"the Frechet distance, precision, recall and copies do not compare{rest}")
    for key in _SAMPLER:
        check(f"Sampler settings ({key})", f"provenance.{key}", "the figures tell of the sampling as well as of the training")
    return said, any(all_void), biased


# --- held-out loss, in words ------------------------------------------------------------------------------------------


def first_reach(line: Line, level: float) -> float | None:
    """When the best loss so far first came down to `level`, between measurements by linear interpolation; None if never."""
    before, best = 0.0, math.inf
    for seconds, loss in line:
        if loss <= level:
            return seconds if best == math.inf else before + (seconds - before) * (best - level) / (best - loss)
        before, best = seconds, min(best, loss)
    return None


def verdicts(runs: Sequence[Run]) -> list[str]:
    """The run with the lowest final held-out loss against each other one; finished HTML sentences."""
    lines = {run.label: run.heldout() for run in runs}
    without = [text(run.label) for run in runs if not lines[run.label]]
    said = [f"No held-out loss was measured for {names(without)}." for _ in without[:1]]
    unlike = unlike_losses(runs)
    rivals = [run for run in runs if lines[run.label]]
    if unlike and len(rivals) > 1:
        said.append(f"Held-out losses do not compare: the runs differ in {names(unlike)}.")
    elif len(rivals) > 1:
        said += _races(rivals, lines) + _origins(rivals)
        if unlike_clocks(rivals):
            said.append("The runs were trained on different hardware: their times do not compare, the losses against images do.")
    return [*said, CHANCE]


def _races(rivals: Sequence[Run], lines: dict[str, Line]) -> list[str]:
    winner = min(rivals, key=lambda run: lines[run.label][-1][1])
    mine = lines[winner.label]
    said = [f"{text(winner.label)} has the lowest final held-out loss: {number(mine[-1][1])}{_so_far(winner)}."]
    for run in rivals:
        if run is winner:
            continue
        level, its = min(loss for _, loss in lines[run.label]), f"{text(run.label)}'s"
        spent, needed = first_reach(mine, level), first_reach(lines[run.label], level)
        best = f"{its} best held-out loss ({number(level)}{_so_far(run, 'until')})"
        if spent is None:
            said.append(f"{text(winner.label)} has not reached {best}.")
        elif needed:
            most = "at most " if mine[0][1] <= level else ""  # nothing is known of the time before its first measurement
            share = f"{most}{round(100 * spent / needed)}{page.GAP}% of {its} time"
            said.append(f"{text(winner.label)} reaches {best} in {share}: {page.duration(spent)} against {page.duration(needed)}.")
    return said


def origin(run: Run) -> str:
    """The run whose weights this one began with; empty where it began from scratch."""
    found = settings(run).get("init", "none")
    return "" if found == "none" else found


def _origins(runs: Sequence[Run]) -> list[str]:
    """What the times leave out, where the runs did not begin alike."""
    begun = [run for run in runs if origin(run)] if len(set(map(origin, runs))) > 1 else []
    uncounted = "the training behind those is not counted"
    return [f"{text(run.label)} started from other weights ({text(origin(run))}); {uncounted}." for run in begun]


def _so_far(run: Run, when: str = "when") -> str:
    words = {"running": "so far", "failed": f"{when} it failed", "stopped": f"{when} it was stopped", "killed": f"{when} it was killed"}
    return f" {words[run.status]}" if run.status in words else ""


# --- tables -----------------------------------------------------------------------------------------------------------


def _measured(run: Run, key: str, show: Callable[[float | None], str]) -> str:
    *_, last = key.split(".")
    return estimate(as_object(run.measures.get("copies")) if key.startswith("copies.") else run.measures, last, show)


def _column(run: Run) -> str:
    return f'<span class="run">{text(run.label)}</span>'


def _loss(run: Run) -> str:
    losses = [loss for _, loss in run.heldout()]
    return f"{number(losses[-1])}<small>best {number(min(losses))}</small>" if losses else number(None)


def final_table(runs: Sequence[Run]) -> str:
    """Remarks on what does not compare, then a column per run."""
    remarks, void, biased = unlike_measures(runs)
    differs = '<small class="warn">does not compare</small>'
    rows = [
        ["Status", *(run.badge for run in runs)],
        ["Training time" + (differs if unlike_clocks(runs) else ""), *(page.duration(run.seconds) for run in runs)],
        ["Images seen", *(number(run.images) for run in runs)],
        ["Parameters", *(count(run.card, "parameters") for run in runs)],
        ["Arithmetic", *(scaled(run.flops, "FLOP") for run in runs)],
        ["Final held-out loss" + (differs if unlike_losses(runs) else ""), *map(_loss, runs)],
    ]
    for name, key, show, moved in _MEASURES:
        if any(_looked_up(run.measures, key) is not None for run in runs):
            rows.append([name + (differs if void or (moved and biased) else ""), *(_measured(run, key, show) for run in runs)])
    if any(run.measures for run in runs):
        rows.append(["Samples measured", *(count(run.measures, "num_samples") for run in runs)])
    missing = [text(run.label) for run in runs if not run.measures]
    if missing:
        remarks.append(f"Samples of {names(missing)} are not measured yet: <code>maskdm evaluate RUN</code> does it.")
    note = (
        '<p class="soft">Below a figure: its 95 % interval, over samples and not over seeds. Lower is better for losses and distances.</p>'
    )
    return page.bullets(remarks, "verdict") + page.table("Final figures", ["Figure", *map(_column, runs)], rows) + note


def settings_table(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ."""
    flat = [settings(run) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    missing = [text(run.label) for run, each in zip(runs, flat, strict=True) if not each]
    lost = f'<p class="soft">No settings are known of {names(missing)}: config.yaml is missing or damaged.</p>' if missing else ""
    known = [each for each in flat if each]
    rows = [[text(key), *(text(each.get(key, "")) for each in flat)] for key in keys if len({each.get(key) for each in known}) > 1]
    if not rows:
        return lost + ('<p class="soft">Every setting is the same.</p>' if len(known) > 1 else "")
    return lost + page.table("Settings that differ", ["Setting", *map(_column, runs)], rows)


def speed_table(runs: Sequence[Run]) -> str:
    """A row per stage of each run: how fast, and how much of the arithmetic's speed-up was reached."""
    rows: list[list[str]] = []
    for run in runs:
        for stage in run.stages:
            measured, share = gain(run, stage)
            speed = [count(stage, "images_per_second"), times(measured), times(finite(stage, "ideal_speedup")), percent(share)]
            rows.append([text(run.label), word(stage, "name"), word(stage, "mask"), word(stage, "batch"), *speed])
    head = ["Run", "Stage", "Mask", "Batch", "Images/s", "Speed-up", "Ideal", "Share of ideal"]
    note = (
        '<p class="soft">Speed-up: over the whole images of the same run. Ideal: by arithmetic alone. Above 100 % of it, '
        "the two stages differ in more than arithmetic, and the times above do not show the gain of masking alone.</p>"
    )
    return page.table("Speed of each stage", head, rows) + note if rows else ""
