"""What a person sees while a run goes on: notes, and bars in a terminal, a line now and then in a log file, or one line in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

WORTH_SAYING = 0.02
"""Share of the time that training waits for images, from which on the bar says so."""

LINE_SECONDS = 20.0
"""Between lines of progress where there is no terminal to draw a bar in."""

NOTEBOOK_SECONDS = 0.5
"""Between changes of the one line of progress in a notebook."""


class Display:
    """Prints what goes on to standard error, in a notebook to standard output; results are the caller's to print."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, soft_wrap=True, highlight=False, quiet=quiet)
        self._notebook = self.console.is_jupyter
        if self._notebook:  # it shows standard error as alarming, each of rich's own prints apart, and says by FORCE_COLOR to be a terminal
            plain: dict[str, Any] = {"force_jupyter": False, "force_terminal": False}
            self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False, quiet=quiet, **plain)
        self._standing = ""
        self._said = 0.0

    def note(self, text: str) -> None:
        """A line."""
        self._end_line()
        self.console.print(escape(text))

    def heading(self, text: str) -> None:
        """A line that stands out."""
        self._end_line()
        self.console.print(f"[bold]{escape(text)}[/bold]")

    def begin(self) -> None:
        """Something begins whose progress `stand` says from now on."""
        self._said = time.monotonic()

    def stand(self, text: str, last: bool = False) -> None:
        """Say now and then where something stands, and what came of it at the `last`; nothing in a terminal, which has bars."""
        now = time.monotonic()
        between = NOTEBOOK_SECONDS if self._notebook else LINE_SECONDS
        if self.console.is_terminal or self.console.quiet or (now - self._said <= between and not last):
            return
        self._said = now
        if not self._notebook:
            self.note(text)
            return
        self.console.file.write("\r" + text.ljust(len(self._standing)))  # over the line before
        self.console.file.flush()
        self._standing = text
        if last:
            self._end_line()

    def _end_line(self) -> None:
        if self._standing:
            self._standing = ""
            self.console.file.write("\n")

    @contextmanager
    def counting(self, what: str) -> Generator[Callable[[int, int], None], None, None]:
        """A bar for work of known length: the function given is called with (done, total)."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            bar = bars.add_task(what, total=None, rate="")
            self.begin()
            began = time.monotonic()
            first: int | None = None  # what resumed work had done before is not its speed

            def update(done: int, total: int) -> None:
                nonlocal began, first
                now = time.monotonic()
                if first is None:
                    first, began = done, now
                rate = f"{(done - first) / (now - began):.3g}/s" if done > first else ""
                bars.update(bar, completed=done, total=total, rate=rate)
                self.stand(f"{what}: {done} of {total}{rate and f', {rate}'}")

            yield update

    @contextmanager
    def training(self) -> Generator[TrainingBar, None, None]:
        """A bar for the stages of a run."""
        columns = (
            TextColumn("[bold]{task.description}[/bold]"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            TextColumn("eta {task.fields[eta]}"),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bars:
            yield TrainingBar(self, bars)


class TrainingBar:
    """The bar of the stage that is running."""

    def __init__(self, display: Display, bars: Progress) -> None:
        self._display, self._bars = display, bars
        self._stage = ""
        self._bar = None
        display.begin()

    def update(self, stage: str, share: float, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        """Show where the stage stands: `share` of its budget, its `step`, training `seconds` in the stage, and the figures logged."""
        if stage != self._stage or self._bar is None:
            self._stage = stage
            self._bar = self._bars.add_task(stage, total=1.0, figures="", eta="")
        eta = _clock(seconds * (1 - share) / share) if share > 0 else "?"
        waiting = f"  waits for data {figures['data_wait']:.0%}" if figures["data_wait"] > WORTH_SAYING else ""
        text = (
            f"step {step}  {figures['images_per_second']:.0f} images/s  {figures['share_of_ceiling']:.0%} of ceiling{waiting}"
            f"  {figures['memory'] / 2**30:.1f} GiB  loss {figures['loss']:.4f}"
        )
        self._bars.update(self._bar, completed=share, figures=text, eta=eta)
        self._display.stand(f"{stage} {share:4.0%}  {text}  eta {eta}", last=share >= 1)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
