"""Where figures, pictures and histograms of a run also go: TensorBoard, Weights & Biases, trackio. None is needed.

A tracker that fails while a run goes on (network, disk, a server) never ends it: it is named once, and dropped.
"""

from __future__ import annotations

import html
import importlib
import json
import netrc
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlparse

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.config import TrackerName
from maskdm.errors import UserError
from maskdm.models import Denoiser

BINS = 64
SMALLEST = 1e-30
"""Updates below count as this much: log10 of 0 has no place in a histogram."""


@dataclass(frozen=True)
class Histogram:
    """Counts [BINS] between edges [BINS + 1], and the sum of the values and of their squares."""

    counts: NDArray[np.float64]
    edges: NDArray[np.float64]
    total: float
    squares: float


@runtime_checkable
class Tracker(Protocol):
    """What a run tells. Steps are those of the run; images are uint8 [height, width, 3]."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Figures by name."""
        ...

    def image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """A picture."""
        ...

    def histogram(self, name: str, value: Histogram, step: int) -> None:
        """A distribution."""
        ...

    def text(self, name: str, text: str, step: int) -> None:
        """Plain text."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def _quieten_the_thread() -> None:
    """TensorBoard writes in a thread, which prints a traceback where the disk refuses; the next call raises the same, and that is said."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard")):
            before(args)

    threading.excepthook = hook


class TensorBoard:
    """Event files in RUN/tensorboard; figures of steps that a resumed run does again are purged."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _quieten_the_thread()
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A curve each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """A picture with a slider over steps."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def histogram(self, name: str, value: Histogram, step: int) -> None:
        """A distribution over steps."""
        edges, counts = value.edges, value.counts
        self._writer.add_histogram_raw(
            name, edges[0], edges[-1], int(counts.sum()), value.total, value.squares, edges[1:], counts, global_step=step
        )

    def text(self, name: str, text: str, step: int) -> None:
        """Text as it is."""
        self._writer.add_text(name, f"<pre>{html.escape(text)}</pre>", step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class Wandb:
    """Weights & Biases: as WANDB_MODE says; else online for a user who is logged in, offline in RUN/wandb for any other.

    Figures are over `step`, not over the server's own count, which would refuse steps that a resumed run does again.
    """

    def __init__(self, folder: Path, identity: str, config: dict[str, Any]) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        self._run: Any = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "maskdm"),
            name=folder.name,
            id=identity,
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=config,
            settings=self._wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A curve each."""
        self._run.log({**values, "step": step})

    def image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """A picture."""
        self._run.log({name: self._wandb.Image(image), "step": step})

    def histogram(self, name: str, value: Histogram, step: int) -> None:
        """A distribution."""
        self._run.log({name: self._wandb.Histogram(np_histogram=(value.counts, value.edges)), "step": step})

    def text(self, name: str, text: str, step: int) -> None:
        """Text as it is."""
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def close(self) -> None:
        """Finish the run; waits for what has not been sent."""
        self._run.finish()


def _logged_in() -> bool:
    """Whether there is a key for the server, so that wandb does not ask for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Trackio:
    """trackio's local store (`trackio show --project maskdm`), or the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, folder: Path, identity: str, config: dict[str, Any]) -> None:
        with redirect_stdout(sys.stderr):  # it prints, and standard output is for results
            self._trackio: Any = importlib.import_module("trackio")
            name = f"{folder.name}-{identity}"  # runs are told apart by name alone
            self._run: Any = self._trackio.init(project="maskdm", name=name, resume="allow", config=config, embed=False)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A curve each."""
        self._run.log(dict(values), step=step)

    def image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """A picture."""
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def histogram(self, name: str, value: Histogram, step: int) -> None:
        """A distribution."""
        self._run.log({name: self._trackio.Histogram(np_histogram=(value.counts, value.edges))}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Text as it is."""
        self._run.log({name: self._trackio.Markdown(f"```\n{text}\n```")}, step=step)

    def close(self) -> None:
        """Write what is left."""
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


# --- all of a run's trackers ---


def require(names: Sequence[TrackerName]) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            way_out = "pip install 'maskdm[track]', or leave it out of --tracking"
            raise UserError(f"--tracking {name} needs a package that cannot be imported ({error}); {way_out}") from None


class Trackers:
    """The trackers of a run, told together. `failed` is called with the name and the error of one that fails, or "histograms"."""

    def __init__(
        self, names: Sequence[TrackerName], folder: Path, step: int, config: dict[str, Any], failed: Callable[[str, str], None]
    ) -> None:
        self._failed = failed
        self._open: dict[str, Tracker] = {}
        self._no_histograms = False
        identity = _identity(folder) if set(names) - {"tensorboard"} else ""
        for name in names:
            try:
                self._open[name] = _open(name, folder, step, identity, config)
            except Exception as error:  # whatever a server or a package may raise
                failed(name, _in_short(error))

    def __bool__(self) -> bool:
        """Whether any is left."""
        return bool(self._open)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Figures by name."""
        self._tell(lambda each: each.scalars(values, step))

    def image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """A picture, uint8 [height, width, 3]."""
        self._tell(lambda each: each.image(name, image, step))

    def histogram(self, name: str, value: Histogram, step: int) -> None:
        """A distribution."""
        self._tell(lambda each: each.histogram(name, value, step))

    def histograms(self, compute: Callable[[], Mapping[str, Histogram]], step: int) -> None:
        """Distributions by name, computed only if a tracker is left; given up, as a tracker is, once that fails."""
        if not self._open or self._no_histograms:
            return
        try:
            found = compute()
        except Exception as error:  # memory, or what a device cannot do
            self._no_histograms = True
            self._failed("histograms", _in_short(error))
            return
        for name, value in found.items():
            self.histogram(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Plain text."""
        self._tell(lambda each: each.text(name, text, step))

    def close(self) -> None:
        """Write what is left; those closed are told nothing more."""
        self._tell(lambda each: each.close())
        self._open.clear()

    def _tell(self, message: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                message(tracker)
            except Exception as error:  # whatever a network, a disk or a package may raise
                del self._open[name]
                self._failed(name, _in_short(error))


def _open(name: TrackerName, folder: Path, step: int, identity: str, config: dict[str, Any]) -> Tracker:
    match name:
        case "tensorboard":
            return TensorBoard(folder, step)
        case "wandb":
            return Wandb(folder, identity, config)
        case "trackio":
            return Trackio(folder, identity, config)


def _identity(folder: Path) -> str:
    """The name under which servers know the run, drawn once and kept in RUN/tracking.json, so that it goes on there too."""
    file = folder / "tracking.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        identity = uuid.uuid4().hex[:8]
        file.write_text(json.dumps({"id": identity}), encoding="utf-8")
        return identity


def _in_short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --- histograms of a network ---


def histogram(values: Tensor) -> Histogram | None:
    """The distribution of a tensor's finite values; None where there are none."""
    values = values.detach().float().flatten()
    values = values[torch.isfinite(values)]
    if len(values) == 0:
        return None
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, BINS, low, high).cpu().double().numpy()
    values = values.cpu().double()  # in this order: Apple's GPUs have no float64
    return Histogram(counts, np.linspace(low, high, BINS + 1), float(values.sum()), float(values.square().sum()))


@torch.no_grad()
def network_histograms(
    model: Denoiser, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
) -> dict[str, Histogram]:
    """Weights, and log10 of the size of the last update (AdamW's alone, decay left out), for each block of the network.

    `groups` and `state` are the optimizer's. The update is computed from its moments, so that nothing is kept from step to step.
    """
    weights: dict[str, list[Tensor]] = {}
    updates: dict[str, list[Tensor]] = {}
    settings = {p: group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        part = re.match(r"\w+(\.\d+)?", name)
        block = part[0] if part else name
        weights.setdefault(block, []).append(parameter.flatten())
        moments = state.get(parameter, {})
        if "exp_avg" in moments:
            group = settings[parameter]
            first, second = (1 - beta ** float(moments["step"]) for beta in group["betas"])
            change = group["lr"] * (moments["exp_avg"] / first) / ((moments["exp_avg_sq"] / second).sqrt() + group["eps"])
            updates.setdefault(block, []).append(change.abs().clamp(min=SMALLEST).log10().flatten())
    values = {f"weights/{k}": v for k, v in weights.items()} | {f"updates (log10)/{k}": v for k, v in updates.items()}
    found = {name: histogram(torch.cat(each)) for name, each in values.items()}
    return {name: each for name, each in found.items() if each is not None}
