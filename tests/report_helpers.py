"""Run directories written by hand, for pages of several runs and pages in a browser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from test_report import _card, _events, _measures, _picture


def heldout(losses: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """(seconds, loss) as events; 100 images a second, the first half of the measurements in a masked stage."""
    events: list[dict[str, Any]] = []
    for index, (seconds, loss) in enumerate(losses):
        late = index >= len(losses) / 2
        begun = losses[(len(losses) + 1) // 2 - 1][0] if late else 0.0
        at = {"step": index + 1, "stage": "whole" if late else "masked", "seconds": seconds}
        events.append({"event": "train", **at, "images": int(100 * (seconds - begun)), "loss": loss})
        events.append({"event": "heldout", **at, "loss": loss})
    return events


def make_run(
    folder: Path,
    events: list[dict[str, Any]] | None = None,
    measures: dict[str, Any] | None = None,
    config: str = "seed: 0\n",
    **card: Any,
) -> Path:
    """A run with every file; `card` changes keys of run.json."""
    folder.mkdir(parents=True)
    events = _events() if events is None else events
    (folder / "run.json").write_text(json.dumps(_card(**card)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.json").write_text(json.dumps(_measures() if measures is None else measures))
    (folder / "config.yaml").write_text(config)
    for file in ["samples.png", "masks.png", "neighbours.png", *(event["file"] for event in events if event["event"] == "sample")]:
        _picture(folder / file)
    return folder
