"""What a run directory says of its run: run.json, metrics.jsonl, metrics.json and config.yaml, whole or damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskdm.errors import UserError
from maskdm.report import page
from maskdm.report.page import Json, amount, as_object, finite

Line = list[tuple[float, float]]


@dataclass(frozen=True)
class RunFiles:
    """The files of one run. `label` tells it from the others on the page; values in `card` and the like may be of any type."""

    folder: Path
    label: str
    card: Json
    events: list[Json]
    measures: Json
    config: str

    @property
    def data(self) -> Json:
        """What run.json says of the data."""
        return as_object(self.card.get("data"))

    @property
    def stages(self) -> list[Json]:
        """What run.json says of each stage, in order."""
        return page.as_objects(self.card.get("stages"))

    @property
    def status(self) -> str:
        """finished, failed or running."""
        status = self.card.get("status")
        return status if status in ("finished", "failed") else "running"

    @property
    def seconds(self) -> float:
        """Training time of all stages."""
        return sum((amount(stage, "seconds") for stage in self.stages), 0.0)

    def named(self, event: str) -> list[Json]:
        """The records of metrics.jsonl of one kind."""
        return [record for record in self.events if record.get("event") == event]

    def heldout(self) -> Line:
        """(training seconds, held-out loss), in the order of measuring."""
        return page.points(self.named("heldout"), "seconds", "loss")

    def heldout_by_images(self) -> Line:
        """(images seen, held-out loss): images of all stages so far, from the `train` records, which count within their stage."""
        line: Line = []
        before, within, stage = 0.0, 0.0, None
        for record in self.events:
            if record.get("event") == "train":
                if record.get("stage") != stage:
                    before, within, stage = before + within, 0.0, record.get("stage")
                within = max(within, amount(record, "images"))
            elif record.get("event") == "heldout":
                loss, images = finite(record, "loss"), before + within
                line += [(images, loss)] if images > 0 and loss is not None and loss > 0 else []
        return line

    def speeds(self) -> list[tuple[Json, float | None, float | None]]:
        """Each stage; its speed-up over the run's last whole-image stage; the share of the ideal speed-up that this is."""
        rates = [finite(stage, "images_per_second") for stage in self.stages if amount(stage, "hidden") == 0]
        whole = next((rate for rate in reversed(rates) if rate), None)
        found: list[tuple[Json, float | None, float | None]] = []
        for stage in self.stages:
            rate, ideal = finite(stage, "images_per_second"), finite(stage, "ideal_speedup")
            gain = rate / whole if rate and whole else None
            found.append((stage, gain, gain / ideal if gain and ideal else None))
        return found


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """Runs with labels that tell them apart. Raises UserError when a folder is no run directory, or is named twice."""
    places = [folder.resolve() for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UserError(f"{folders[index]} is given twice; name each run once")
    return [_read(folder, label) for folder, label in zip(folders, _labels(places), strict=True)]


def _labels(places: Sequence[Path]) -> list[str]:
    """The last part of each path, and for those that share it as many more as it takes."""
    labels: list[str] = []
    for place in places:
        others = [other.parts for other in places if other != place]
        tails = (place.parts[-length:] for length in range(1, len(place.parts) + 1))
        tail = next((tail for tail in tails if all(other[-len(tail) :] != tail for other in others)), place.parts)
        labels.append(str(Path(*tail)))
    return labels


def _read(run: Path, label: str) -> RunFiles:
    card = run / "run.json"
    if not card.is_file():
        raise UserError(f"{run} has no run.json; is it a run directory of `maskdm train`?")
    content = page.parse(page.read_text(card))
    if not content:
        raise UserError(f"{card} is not a JSON object; restore it, or train again into another directory")
    return RunFiles(
        folder=run,
        label=label,
        card=content,
        events=page.read_events(run / "metrics.jsonl"),
        measures=page.parse(page.read_text(run / "metrics.json")),
        config=page.read_text(run / "config.yaml"),
    )
