"""What the benchmarks share: training steps to time, interleaving, JSON by hardware."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from maskdm.engine import keep_freed_memory
from maskdm.engine.hardware import synchronize

keep_freed_memory()  # as `maskdm train` does

RESULTS = Path(__file__).parent / "results"


class Step(Protocol):
    """One training step of some network on `images` images."""

    images: int

    def __call__(self, number: int) -> None: ...


@dataclass
class Arm:
    """A step under a name, and the seconds that its repetitions took."""

    name: str
    step: Step
    seconds: list[float] = field(default_factory=list[float])

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """By the median step."""
        return self.step.images / self.median


def interleave(arms: Sequence[Arm], device: torch.device, repeats: int, warm: int = 2, least: float = 0.0) -> None:
    """Time the arms in turns, so that a drifting machine hurts all alike: `repeats` rounds, after `warm` that do not count.

    An arm whose steps are short repeats within its turn until `least` seconds have gone; its figure is then their mean.
    """
    for number in range(-warm, repeats):
        for arm in arms:
            synchronize(device)
            started, count = time.perf_counter(), 0
            while count == 0 or (number >= 0 and time.perf_counter() - started < least):
                arm.step(number + warm)
                count += 1
            synchronize(device)  # at the end alone: training does not wait after each step either
            if number >= 0:
                arm.seconds.append((time.perf_counter() - started) / count)


@contextlib.contextmanager
def cast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to bf16; nothing for fp32."""
    if dtype == torch.float32:
        yield
    else:
        with torch.autocast(device.type, dtype):
            yield


def results_directory(device: torch.device) -> Path:
    """Where the results of this hardware are kept."""
    from maskdm.config import Hardware
    from maskdm.engine import this_machine

    machine = this_machine(Hardware(device="cuda" if device.type == "cuda" else "cpu"))
    name = machine.name.lower().replace("nvidia ", "").replace(" ", "-")
    return RESULTS / (name if device.type == "cuda" else f"{name}-{machine.cores}-cores")


def write_rows(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Keep rows with what they depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
