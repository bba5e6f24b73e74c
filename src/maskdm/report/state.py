"""What a run directory says: its files read, whatever state they are in, and the few facts that several parts of a page need."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

from maskdm.errors import UserError
from maskdm.report import page
from maskdm.report.page import Json, amount, as_object, finite, number, percent

RECENT = timedelta(minutes=10)
Line = list[tuple[float, float]]

_WORDS = {
    "finished": "finished",
    "failed": "failed",
    "running": "running",
    "stopped": "stopped",
    "killed": "ended without a word",
}


@dataclass(frozen=True)
class Run:
    """The files of a run directory. `card`: run.json; `events`: metrics.jsonl; `measures`: metrics.json; all may be incomplete.

    `label` tells the run from others on the page; `updated`: when it last wrote its files.
    """

    folder: Path
    label: str
    card: Json
    events: list[Json]
    measures: Json
    evaluations: list[Json]
    sweep: Json
    config: str
    updated: datetime

    @property
    def data(self) -> Json:
        """What run.json says of the data."""
        return as_object(self.card.get("data"))

    @property
    def environment(self) -> Json:
        """What run.json says of machine and versions."""
        return as_object(self.card.get("environment"))

    @cached_property
    def stages(self) -> list[Json]:
        """What each stage was and did: as run.json has it, which is of the last checkpoint, or as the log has it where that is later."""
        last = {str(record.get("stage")): record for record in self.named("train")}
        stages: list[Json] = []
        before = 0.0
        for stage in page.as_objects(self.card.get("stages")):
            record, later = last.get(str(stage.get("name")), {}), Json()
            if amount(record, "stage_step") > amount(stage, "steps"):
                images, seconds = amount(record, "images"), amount(record, "seconds") - before  # the log's clock runs through all stages
                later = {"steps": record["stage_step"], "images": images, "seconds": seconds, "flops": images * _cost(stage) or None}
                later["images_per_second"] = images / seconds if seconds > 0 else None
            stages.append(stage | later)
            before += amount(stages[-1], "seconds")
        return stages

    @property
    def seconds(self) -> float:
        """Of training."""
        return sum((amount(stage, "seconds") for stage in self.stages), 0.0)

    @property
    def images(self) -> float:
        """Seen in training, repetitions counted."""
        return sum((amount(stage, "images") for stage in self.stages), 0.0)

    @property
    def flops(self) -> float | None:
        """Arithmetic of the training, where it is known."""
        known = [finite(stage, "flops") for stage in self.stages if amount(stage, "images")]
        return sum(filter(None, known)) if known and all(known) else finite(self.card, "flops")

    @property
    def status(self) -> str:
        """finished, failed, running, stopped, or killed: said to be running, by a process that is gone from this machine."""
        status = self.card.get("status")
        if status in ("finished", "failed", "stopped"):
            return str(status)
        recent = datetime.now().astimezone() - self.updated < RECENT
        return "killed" if _is_gone(as_object(self.card.get("process")), recent) else "running"

    @property
    def badge(self) -> str:
        """The status as a page shows it."""
        status = self.status
        return f'<span class="badge {status}">{_WORDS[status]}</span>'

    def named(self, event: str) -> list[Json]:
        """The events of a name, in order."""
        return [record for record in self.events if record.get("event") == event]

    def heldout(self) -> Line:
        """(training seconds, held-out loss), in the order of measuring."""
        return page.points(self.named("heldout"), "seconds", "loss")

    def heldout_by_images(self) -> Line:
        """(images seen in all stages so far, held-out loss)."""
        return self._heldout_by({})

    def heldout_by_flops(self) -> Line:
        """(arithmetic of all stages so far, held-out loss); empty where a stage's is not known."""
        costs = {str(stage.get("name")): _cost(stage) for stage in self.stages}
        return self._heldout_by(costs) if costs and all(costs.values()) else []

    def _heldout_by(self, costs: Json) -> Line:
        """The spending so far; an image costs 1 unless `costs` says otherwise.

        Records count images within their stage: `images` of `train`, `seen` of `heldout` (older logs have none, and lag by some steps).
        """
        line: Line = []
        before, within, stage = 0.0, 0.0, None
        for record in self.events:
            seen = finite(record, {"train": "images", "heldout": "seen"}.get(str(record.get("event")), ""))
            if seen is not None:
                if record.get("stage") != stage:
                    before, within, stage = before + within, 0.0, record.get("stage")
                within = max(within, seen * costs.get(str(stage), 1.0))
            if record.get("event") == "heldout":
                loss, spent = finite(record, "loss"), before + within
                line += [(spent, loss)] if spent > 0 and loss is not None and loss > 0 else []
        return line


def _cost(stage: Json) -> float:
    """Arithmetic of an image in a stage; 0 where it is not known."""
    return finite(stage, "flops_per_image") or amount(stage, "flops") / max(amount(stage, "images"), 1)


def _is_gone(process: Json, recent: bool) -> bool:
    """Whether a process of this machine has ended, or another has its number now.

    Of a run that wrote its files recently the number is enough: a clock that is set moves the time at which a process seems to have begun.
    """
    import psutil

    pid, started = finite(process, "pid"), finite(process, "started")
    if pid is None or started is None or process.get("host") != platform.node():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - started) > 2 and not recent
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def read_run(run: Path, label: str | None = None) -> Run:
    """Read a run directory; its label is the folder's name unless given. Raises UserError when it is none."""
    card = run / "run.json"
    if not card.is_file():
        raise UserError(f"{run} has no run.json; is it a run directory of `maskdm train`?")
    content = page.parse(page.read_text(card))
    if not content:
        raise UserError(f"{card} is not a JSON object; restore it, or train again into another directory")
    updated = max(path.stat().st_mtime for path in (card, run / "metrics.jsonl") if path.is_file())
    return Run(
        folder=run,
        label=run.resolve().name if label is None else label,
        card=content,
        events=page.read_events(run / "metrics.jsonl"),
        measures=page.parse(page.read_text(run / "metrics.json")),
        evaluations=[found for found in map(page.parse, page.read_text(run / "evaluations.jsonl").splitlines()) if found],
        sweep=page.parse(page.read_text(run / "ema_sweep.json")),
        config=page.read_text(run / "config.yaml"),
        updated=datetime.fromtimestamp(updated).astimezone(),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs with labels that tell them apart. Raises UserError when a folder is no run directory, or is named twice."""
    places = [folder.resolve() for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UserError(f"{folders[index]} is given twice; name each run once")
    return [read_run(folder, label) for folder, label in zip(folders, _labels(places), strict=True)]


def _labels(places: Sequence[Path]) -> list[str]:
    """The last part of each path, and for those that share it as many more as it takes."""
    labels: list[str] = []
    for place in places:
        others = [other.parts for other in places if other != place]
        tails = (place.parts[-length:] for length in range(1, len(place.parts) + 1))
        tail = next((tail for tail in tails if all(other[-len(tail) :] != tail for other in others)), place.parts)
        labels.append(str(Path(*tail)))
    return labels


def is_masked(stage: Json) -> bool:
    """Whether a stage hides patches."""
    return amount(stage, "hidden") > 0


def gain(run: Run, stage: Json) -> tuple[float | None, float | None]:
    """The stage's speed-up in images per second over the run's last whole-image stage; the share of the ideal one that this is."""
    rates = [finite(other, "images_per_second") for other in run.stages if not is_masked(other)]
    reference = next((rate for rate in reversed(rates) if rate), None)
    rate, ideal = finite(stage, "images_per_second"), finite(stage, "ideal_speedup")
    measured = rate / reference if rate and reference else None
    return measured, measured / ideal if measured and ideal else None


def times(factor: float | None) -> str:
    """2.061 -> '2.06x'."""
    return f"{factor:.2f}\u00d7" if factor else number(None)


def speed_up(run: Run, stage: Json) -> tuple[str, str]:
    """The stage's measured speed-up over whole images, and the ideal one with the share of it that was reached."""
    (measured, share), ideal = gain(run, stage), finite(stage, "ideal_speedup")
    reached = f"{percent(share)} of the " if share else ""
    return times(measured), f"{reached}ideal {times(ideal)}" if ideal else ""


def colors(run: Run) -> dict[str, int]:
    """A colour for each stage."""
    return {str(stage.get("name")): index % page.NUM_COLORS for index, stage in enumerate(run.stages)}
