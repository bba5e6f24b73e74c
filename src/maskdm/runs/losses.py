"""What of the shards cannot be read while a run goes on: said by name, once, and known to all processes."""

from __future__ import annotations

from collections.abc import Callable

from maskdm.data import Loss
from maskdm.engine import Trainer
from maskdm.runs.directory import RunDirectory


class Losses:
    """Follows a trainer's loader. What another process than the first has found is in the log with the next checkpoint."""

    def __init__(self, run: RunDirectory, trainer: Trainer, note: Callable[[str], None]) -> None:
        self.run, self.trainer, self.note = run, trainer, note
        self._untold: list[Loss] = []

    def look(self) -> None:
        """Say what this process has found since the last step."""
        found = self.trainer.feed.loader.news()
        self._untold += found
        if self.run.writes:
            self._say(found)

    def share(self) -> None:
        """Let all processes know of what each has found. Raises UserError where that is too much together."""
        if not self.trainer.feed.loader.streams or self.trainer.ranks.world == 1:
            return
        self.look()
        everywhere = self.trainer.ranks.gather(self._untold)
        self._untold = []
        others = [loss for rank, found in enumerate(everywhere) if rank != self.trainer.ranks.rank for loss in found]
        new = self.trainer.feed.loader.admit(others)
        if self.run.writes:
            self._say(new)

    def _say(self, found: list[Loss]) -> None:
        for loss in found:
            what = "shard" if loss.row is None else "image"
            self.run.log("lost", self.trainer.progress.step, what=what, name=loss.name, images=loss.images, reason=loss.reason)
            self.note(f"{what} {loss.name} cannot be read ({loss.reason}): others stand in for its images")
