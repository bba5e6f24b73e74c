"""A run directory as one self-contained HTML page, from its files only: what was trained, on what, how long, how well.

Works while the run goes on and after it failed: a file that is absent or half written is left out, or named as missing.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from maskdm.report import images, page
from maskdm.report.figures import origin
from maskdm.report.page import Json, amount, as_list, count, finite, number, percent, text, word
from maskdm.report.quality import colour, copies, headline, quality, verdicts
from maskdm.report.state import Run, is_masked, read_run, speed_up
from maskdm.report.training import best, curves, overfitting, stage_table

MAX_FRAMES = 24
"""Grids over time inside the page: more would make it heavy."""


def write_report(run: Path) -> Path:
    """Write run/report.html from the files in the run directory, replacing an older one at once; returns its path.

    Raises UserError when `run` is not a run directory.
    """
    state = read_run(run)
    target = run / "report.html"
    unfinished = run / f".report.html.{os.getpid()}"
    unfinished.write_text(_render(state), encoding="utf-8")
    os.replace(unfinished, target)
    return target


def _size(data: Json) -> str:
    return f"{word(data, 'height')} \u00d7 {word(data, 'width')}"


def _summary(run: Run) -> str:
    data, environment = run.data, run.environment
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
        "stopped": ("was stopped while learning", "after {}"),
        "killed": ("was ended, by a kill or a crash of the machine, while learning", "after {}"),
    }[run.status]
    course = f": {', then '.join(stages)}" if stages else ""
    subject = f"{number(images)} images of {text(data.get('name', 'unnamed data'))} ({traits})"
    begun = f"; it started from other weights ({text(origin(run))}), and the training behind those is not counted" if origin(run) else ""
    return f"maskdm {verb} {subject} {spent.format(page.duration(run.seconds))} on {place}{course}{begun}."


def _facts(run: Run) -> str:
    environment = run.environment
    place = f"{word(environment, 'device')}, {word(environment, 'precision')}"
    facts = [
        ("Training time", page.duration(run.seconds), place),
        ("Images seen", number(run.images), "repetitions counted"),
        ("Parameters", count(run.card, "parameters"), text(run.card.get("model", ""))),
    ]
    if run.flops:
        rate = page.scaled(run.flops / max(run.seconds, 1e-9), "FLOP/s")
        facts.insert(2, ("Arithmetic", page.scaled(run.flops, "FLOP"), f"{rate} while training"))
    masked = next((stage for stage in run.stages if is_masked(stage)), None)
    losses = [loss for _, loss in run.heldout()]
    if losses:
        facts.append(("Held-out loss", number(losses[-1]), f"lowest {number(min(losses))}"))
    distance = headline(run)
    facts += [distance] if distance else []
    if masked:
        facts.append(("Masked stage's speed", *speed_up(run, masked)))
    return page.tiles(facts)


def _header(run: Run) -> str:
    error = f'<p class="error" role="alert">{text(run.card["error"])}</p>' if run.card.get("error") else ""
    return (
        f'<div class="title"><h1>{text(run.label)}</h1>{run.badge}<span class="soft">as of {run.updated:%Y-%m-%d %H:%M:%S}</span></div>'
        f'<p class="lead">{_summary(run)}</p>{error}{_next(run)}{verdicts(run)}{_facts(run)}'
    )


def _next(run: Run) -> str:
    """What to do where a run is not done."""
    folder = text(shlex.quote(str(run.folder)))
    if run.status == "finished":
        return ""
    if run.status == "running":
        return f"<p>This page does not change by itself: <code>maskdm report {folder}</code> brings it up to date.</p>"
    return f"<p>The same command goes on where it stopped: <code>{text(run.card.get('command', 'maskdm train'))}</code></p>"


# --- sections -----------------------------------------------------------------------------------------------------


def _samples(run: Run) -> str:
    name = run.data.get("name", "the data")
    note = "Drawn from noise by the averaged (EMA) weights, with real images beside them as the picture's labels say."
    drawn = images.figure(run.folder / "samples.png", f"Grid of generated images of {name} beside real ones", note, 760)
    grids = ' Those drawn on the way are under <a href="#time">Samples over time</a>.' if _grids(run) else ""
    none = "No final samples yet: they are drawn when the training ends, or by <code>maskdm sample</code>."
    return drawn or f'<p class="soft">{none}{grids}</p>'


def _denoising(run: Run) -> str:
    note = "A row per image, from noise on the left to the sample on the right."
    return images.figure(run.folder / "denoising.png", "Images on their way from noise to sample", note, 900)


def _masks(run: Run) -> str:
    note = "Above: training images. Below: what is left of them. The network computes nothing for the gray patches."
    return images.figure(run.folder / "masks.png", "Training images with the hidden patches covered", note, 900)


def _grids(run: Run) -> list[tuple[Path, str]]:
    """Grids over time with their captions: those that are there, inside the run's folder."""
    captions = {
        str(record.get("file")): f"step {count(record, 'step')}, stage {record.get('stage', '?')}" for record in run.named("sample")
    } or {f"samples/{path.name}": path.stem for path in sorted((run.folder / "samples").glob("*.png"))}
    root = run.folder.resolve()
    places = [(root / file, caption) for file, caption in captions.items()]
    return [(path, caption) for path, caption in places if path.resolve().is_relative_to(root) and path.is_file()]


def _frames(run: Run) -> str:
    grids = _grids(run)
    num = min(len(grids), MAX_FRAMES)
    chosen = [grids[round(index * (len(grids) - 1) / max(1, num - 1))] for index in range(num)]
    control = images.slider(chosen) if chosen else ""
    paths = [path for path, _ in chosen]
    left_out = f" {num} of {len(grids)} grids are shown here." if num < len(grids) else ""
    left_out += images.shrunk(paths, images.allowance(paths)) if paths else ""
    note = f'<p class="soft">Arrow keys move the slider.{left_out}</p>'
    return control and control + note


def _data(run: Run) -> str:
    data = run.data
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
    total = round(max(amount(data, "num_broken"), len(broken)))  # not all are listed in run.json
    more = f'<p class="soft">and {number(total - len(rows))} more</p>' if total > len(rows) else ""
    listed = page.table("Files left out", ["File", "Reason"], rows, wide=True) + more
    left = f"<h3>Files left out ({number(total)})</h3>{listed}" if rows else ""
    return page.bullets(facts + [text(note) for note in as_list(data.get("notes"))]) + left


def _repeat(run: Run) -> str:
    folder = shlex.quote(str(run.folder))
    train = str(run.card.get("command", "maskdm train DATA --out RUN"))
    sample, evaluate = f"maskdm sample {folder} --num 64 --out samples", f"maskdm evaluate {folder} --num 1000"
    known: Json = {"maskdm": run.card.get("version"), "created": run.card.get("created"), "seed": run.card.get("seed")}
    known |= run.environment
    rows = [[text(key), text(value)] for key, value in known.items() if value is not None]
    forks = [
        f"At step {count(fork, 'step')} <code>--fork</code> changed {text('; '.join(map(str, as_list(fork.get('changed')))))}"
        + (f"; begun by <code>{word(fork, 'before')}</code>" if fork.get("before") else "")
        for fork in run.named("fork")
    ]
    config = f'<details><summary>The whole configuration</summary><pre tabindex="0">{text(run.config)}</pre></details>'
    return (
        f'<h3>Commands</h3><pre tabindex="0">{text(train)}\n{text(sample)}\n{text(evaluate)}</pre>'
        f"{page.bullets(forks)}{config if run.config else ''}"
        f"<h3>Environment</h3>{page.table('Environment', ['What', 'Which'], rows, wide=True)}"
    )


def _render(run: Run) -> str:
    parts: list[tuple[str, str, Callable[[Run], str]]] = [
        ("samples", "Samples", _samples),
        ("quality", "How good is it?", quality),
        ("copies", "Does it copy?", copies),
        ("colour", "Colour and contrast", colour),
        ("stages", "Stages and speed", stage_table),
        ("loss", "Loss", lambda run: curves(run) + best(run) + overfitting(run)),
        ("time", "Samples over time", _frames),
        ("denoising", "From noise to image", _denoising),
        ("masks", "What the masked stage sees", _masks),
        ("data", "Data", _data),
        ("choices", "Chosen automatically", lambda run: page.bullets([text(choice) for choice in as_list(run.card.get("choices"))])),
        ("repeat", "To repeat it", _repeat),
    ]
    title = f"{run.label} - maskdm"
    return page.document(title, _header(run), [page.Section(name, heading, build(run)) for name, heading, build in parts])
