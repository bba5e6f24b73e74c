"""Several runs side by side as one self-contained HTML page, from their files only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from maskdm.errors import UserError
from maskdm.report import charts, images, page
from maskdm.report.figures import final_table, names, settings_table, speed_table, unlike_losses, verdicts
from maskdm.report.page import amount, count, text
from maskdm.report.state import Run, read_runs

NUM_FRAMES = 11  # places of the slider, ends included: each holds one grid per run


def compare_runs(runs: Sequence[Path], out: Path) -> Path:
    """Write the page `out` that puts two or more run directories side by side; returns `out`. Runs may be going on or have failed.

    Raises UserError for fewer than two runs, a path that is no run directory, and a place that cannot be written.
    """
    if len(runs) < 2:
        raise UserError("a comparison needs two or more runs")
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise UserError(f"{out} is not a place for a file; give --out a file name in a folder that exists")
    source = _render(read_runs(runs))
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.write_text(source, encoding="utf-8")
    os.replace(unfinished, out)
    return out


def _render(runs: Sequence[Run]) -> str:
    parts = [
        page.Section("verdict", "What differs?", page.bullets(verdicts(runs), "verdict")),
        page.Section("figures", "Final figures", final_table(runs)),
        page.Section("loss", "Held-out loss", _curves(runs)),
        page.Section("time", "Samples over time", _samples(runs)),
        page.Section("settings", "Settings that differ", settings_table(runs)),
        page.Section("speed", "Speed", speed_table(runs)),
    ]
    title = f"{names([run.label for run in runs])} - maskdm"
    return page.document(title, _header(runs), parts)


def _header(runs: Sequence[Run]) -> str:
    pieces: list[str] = []
    for run in runs:
        pieces.append(f"{text(run.label)} {run.badge} <small>{text(run.folder.resolve())}</small>")
    errors = [f"{text(run.label)}: {text(run.card['error'])}" for run in runs if run.card.get("error")]
    failed = "".join(f'<p class="error" role="alert">{error}</p>' for error in errors)
    lead = f"{len(runs)} runs of maskdm, on {names(_data(runs))}."
    return (
        f'<div class="title"><h1>{names([text(run.label) for run in runs])}</h1></div><p class="lead">{lead}</p>'
        f"{page.bullets(pieces)}{failed}"
    )


def _data(runs: Sequence[Run]) -> list[str]:
    """The data that the runs learned, each named once."""
    return list(
        dict.fromkeys(
            f"{count(run.data, 'train')} images of {text(run.data.get('name', 'unnamed data'))} "
            f"({page.word(run.data, 'height')} \u00d7 {page.word(run.data, 'width')})"
            for run in runs
        )
    )


# --- held-out loss ----------------------------------------------------------------------------------------------------


def _series(run: Run, place: int, points: Sequence[tuple[float, float]]) -> charts.Series:
    round_, color = divmod(place, page.NUM_COLORS)  # past the fifth run the colours come again, with other strokes
    return charts.Series(run.label, points, color, dash=round_, dots=True)


def _curves(runs: Sequence[Run]) -> str:
    unit, name = page.clock(max((seconds for run in runs for seconds, _ in run.heldout()), default=0.0))
    by_time = [_series(run, place, [(seconds / unit, loss) for seconds, loss in run.heldout()]) for place, run in enumerate(runs)]
    by_images = [_series(run, place, run.heldout_by_images()) for place, run in enumerate(runs)]
    note = "Whole images that were never trained on, by the averaged (EMA) weights, in one target (the noise): lower is better."
    drawn = charts.chart("Against training time", f"training time, {name}", "noise loss", by_time, note=note)
    drawn += charts.chart(
        "Against images seen", "images, repetitions counted", "noise loss", by_images, note="Masked images count as whole ones."
    )
    by_flops = [run.heldout_by_flops() for run in runs]
    if all(by_flops):
        most = max(flops for line in by_flops for flops, _ in line)
        size, prefix = next(((size, prefix) for size, prefix in page.PREFIXES if most >= size), (1.0, ""))
        lines = [_series(run, place, [(flops / size, loss) for flops, loss in by_flops[place]]) for place, run in enumerate(runs)]
        note = "What a perfect machine would have to compute: masked images cost less."
        drawn += charts.chart("Against arithmetic", f"{prefix}FLOP", "noise loss", lines, note=note)
    unlike = unlike_losses(runs)
    warning = f'<p class="soft">These losses do not compare: the runs differ in {names(unlike)}.</p>' if unlike else ""
    return f'{warning}<div class="charts">{drawn}</div>' if drawn else ""


# --- samples ----------------------------------------------------------------------------------------------------------


def _grids(run: Run) -> list[tuple[float, Path, str]]:
    """(seconds, file, caption) of the run's grids, those that exist and lie inside the run, in order."""
    root, found = run.folder.resolve(), list[tuple[float, Path, str]]()
    latest = 0.0
    for record in run.events:
        latest = max(latest, amount(record, "seconds"))
        path = root / str(record.get("file"))
        if record.get("event") == "sample" and path.resolve().is_relative_to(root) and path.is_file():
            found.append((latest, path, f"step {count(record, 'step')}, {page.duration(latest)}"))
    return found


def _cell(run: Run, grids: Sequence[tuple[float, Path, str]], share: float, most: int) -> str:
    """The newest grid of the run at this share of its training time."""
    due = [grid for grid in grids if grid[0] <= share * grids[-1][0] * (1 + 1e-9)]
    if not due:
        return f"<figure><figcaption>{text(run.label)}: no samples yet</figcaption></figure>"
    _, path, caption = due[-1]
    return images.figure(path, f"Samples of {run.label} at {caption}", f"{text(run.label)}: {caption}", 420, most)


def _samples(runs: Sequence[Run]) -> str:
    grids = {run.label: found for run in runs if (found := _grids(run))}
    shown = [run for run in runs if run.label in grids]
    if not shown:
        return ""
    num = min(NUM_FRAMES, max(map(len, grids.values())))
    most = min(images.LARGE, images.FRAMES // (num * len(shown)))
    frames: list[tuple[str, str]] = []
    for index in range(num):
        share = (index + 1) / num
        cells = "".join(_cell(run, grids[run.label], share, most) for run in shown)
        frames.append((f"{page.percent(share)} of each run's time so far", cells))
    missing = [text(run.label) for run in runs if run.label not in grids]
    lost = f" {names(missing)} left no samples." if missing else ""
    return images.joint_slider(frames) + f'<p class="soft">Arrow keys move the slider. Grids of one run draw from the same noise.{lost}</p>'
