"""Several runs on one page: told apart by labels, with the lines that they are compared by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskdm.errors import UserError
from maskdm.report import page
from maskdm.report.page import Json, amount, as_object, finite
from maskdm.report.state import Run, gain, read_run

Line = list[tuple[float, float]]


@dataclass(frozen=True)
class RunFiles(Run):
    """A run among others. `label` tells it from them on the page."""

    label: str

    @property
    def data(self) -> Json:
        """What run.json says of the data."""
        return as_object(self.card.get("data"))

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
        return [(stage, *gain(self, stage)) for stage in self.stages]


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """Runs with labels that tell them apart. Raises UserError when a folder is no run directory, or is named twice."""
    places = [folder.resolve() for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UserError(f"{folders[index]} is given twice; name each run once")
    return [RunFiles(**vars(read_run(folder)), label=label) for folder, label in zip(folders, _labels(places), strict=True)]


def _labels(places: Sequence[Path]) -> list[str]:
    """The last part of each path, and for those that share it as many more as it takes."""
    labels: list[str] = []
    for place in places:
        others = [other.parts for other in places if other != place]
        tails = (place.parts[-length:] for length in range(1, len(place.parts) + 1))
        tail = next((tail for tail in tails if all(other[-len(tail) :] != tail for other in others)), place.parts)
        labels.append(str(Path(*tail)))
    return labels
