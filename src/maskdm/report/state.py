"""What a run directory says: its files read, whatever state they are in, and the few facts that several parts of a page need."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from maskdm.errors import UserError
from maskdm.report import page
from maskdm.report.page import Json, amount, as_object, finite, percent

_WORDS = {
    "finished": "finished",
    "failed": "failed",
    "running": "running",
    "stopped": "stopped",
    "killed": "ended without a word",
}


@dataclass(frozen=True)
class Run:
    """The files of a run directory. `card`: run.json; `events`: metrics.jsonl; `measures`: metrics.json; all may be incomplete."""

    folder: Path
    card: Json
    events: list[Json]
    measures: Json
    evaluations: list[Json]
    sweep: Json
    config: str
    updated: datetime

    @property
    def stages(self) -> list[Json]:
        """What each stage was and did."""
        return page.as_objects(self.card.get("stages"))

    @property
    def seconds(self) -> float:
        """Of training."""
        return sum((amount(stage, "seconds") for stage in self.stages), 0.0)

    @property
    def status(self) -> str:
        """finished, failed, running, stopped, or killed: said to be running, by a process that is gone from this machine."""
        status = self.card.get("status")
        if status in ("finished", "failed", "stopped"):
            return str(status)
        return "killed" if _is_gone(as_object(self.card.get("process"))) else "running"

    @property
    def status_words(self) -> str:
        """The status as the page names it."""
        return _WORDS[self.status]

    def named(self, event: str) -> list[Json]:
        """The events of a name, in order."""
        return [record for record in self.events if record.get("event") == event]


def _is_gone(process: Json) -> bool:
    """Whether a process of this machine has ended (or another has its number now)."""
    import psutil

    pid, started = finite(process, "pid"), finite(process, "started")
    if pid is None or started is None or process.get("host") != platform.node():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - started) > 2
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def read_run(run: Path) -> Run:
    """Read a run directory. Raises UserError when it is none."""
    card = run / "run.json"
    if not card.is_file():
        raise UserError(f"{run} has no run.json; is it a run directory of `maskdm train`?")
    content = page.parse(page.read_text(card))
    if not content:
        raise UserError(f"{card} is not a JSON object; restore it, or train again into another directory")
    updated = max(path.stat().st_mtime for path in (card, run / "metrics.jsonl") if path.is_file())
    return Run(
        folder=run,
        card=content,
        events=page.read_events(run / "metrics.jsonl"),
        measures=page.parse(page.read_text(run / "metrics.json")),
        evaluations=[found for found in map(page.parse, page.read_text(run / "evaluations.jsonl").splitlines()) if found],
        sweep=page.parse(page.read_text(run / "ema_sweep.json")),
        config=page.read_text(run / "config.yaml"),
        updated=datetime.fromtimestamp(updated).astimezone(),
    )


def is_masked(stage: Json) -> bool:
    """Whether a stage hides patches."""
    return amount(stage, "hidden") > 0


def gain(run: Run, stage: Json) -> tuple[float | None, float | None]:
    """The stage's measured speed-up over the run's last whole-image stage, and the share of the ideal speed-up that this is."""
    rates = [finite(other, "images_per_second") for other in run.stages if not is_masked(other)]
    reference = next((rate for rate in reversed(rates) if rate), None)
    rate, ideal = finite(stage, "images_per_second"), finite(stage, "ideal_speedup")
    measured = rate / reference if rate and reference else None
    return measured, measured / ideal if measured and ideal else None


def speed_up(run: Run, stage: Json) -> tuple[str, str]:
    """The stage's measured speed-up, and the ideal one with the share of it that was reached, for people."""
    (measured, reached), ideal = gain(run, stage), finite(stage, "ideal_speedup")
    share = f"{percent(reached)} of the " if reached else ""
    return f"{measured:.2f}\u00d7" if measured else "&ndash;", f"{share}ideal {ideal:.2f}\u00d7" if ideal else ""


def colors(run: Run) -> dict[str, int]:
    """A colour for each stage."""
    return {str(stage.get("name")): index % page.NUM_COLORS for index, stage in enumerate(run.stages)}
