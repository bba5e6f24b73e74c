"""A run's directory: what is in it and under which name. Everything a person or a report needs is in plain files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from maskdm.config import Config
from maskdm.engine.checkpoint import sync
from maskdm.errors import UserError, of_storage
from maskdm.settings import from_plain, read_yaml, to_yaml

Weights = Literal["raw", "ema", "best"]
"""As trained, averaged, or averaged at the best evaluation during training."""


LOCK = ".lock"


class RunDirectory:
    """Paths and small files of a run; tensors are the checkpoints' and the model folder's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.say: Callable[[str], None] | None = None
        """Where a running run says that it cannot write; None: that is an error."""
        self.writes = True
        """Whether this process writes here: of several only the first."""
        self._failing: set[str] = set()
        self._unwritten = ""
        self.config_file = path / "config.yaml"
        self.run_file = path / "run.json"
        self.metrics_log = path / "metrics.jsonl"
        self.metrics_file = path / "metrics.json"
        self.evaluations_log = path / "evaluations.jsonl"
        self.best = path / "best"
        self.base = path / "base"
        """What adapters adapt, where a run trains such."""
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "snapshots"
        self.sweep_file = path / "ema_sweep.json"
        self.samples = path / "samples"
        self.model = path / "model"

    @property
    def started(self) -> bool:
        """Whether a run has written its configuration here."""
        return self.config_file.is_file()

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """The run at `path`. Raises UserError where there is none."""
        run = cls(path)
        if not path.is_dir():
            raise UserError(f"{path} is not there; give the directory of a run of `maskdm train`")
        if not run.started or not run.run_file.is_file():
            raise UserError(f"{path} is not the directory of a run of `maskdm train` (no config.yaml and run.json in it)")
        return run

    def check_free(self) -> None:
        """Raise UserError where a run cannot be: a file, or a directory with other things in it."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file; give a directory")
        partials = {f".{file.name}.partial" for file in (self.run_file, self.config_file)}
        cut_short = {self.samples.name, LOCK, self.run_file.name} | partials
        if self.path.is_dir() and not self.started and not {p.name for p in self.path.iterdir()} <= cut_short:
            raise UserError(f"--out {self.path} holds files that are not a run's; give an empty or a new directory")
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK):
            raise UserError(f"cannot write to --out {self.path}: {parent} is read-only")

    def create(self) -> None:
        """Make the directory. Raises UserError where that cannot be."""
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to --out {self.path}: {error.strerror}") from None

    def config(self) -> Config:
        """The run's whole configuration."""
        try:
            return from_plain(read_yaml(self.config_file))
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}") from None

    def write_config(self, config: Config) -> None:
        """Store the configuration."""
        if self.writes:
            write_text(self.config_file, to_yaml(config))

    def info(self) -> dict[str, Any]:
        """The content of run.json."""
        try:
            found: dict[str, Any] = json.loads(self.run_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{self.run_file} is missing or damaged; restore it or train into a new directory") from None
        return found

    def write_info(self, info: dict[str, Any]) -> None:
        """Store run.json."""
        if self.writes:
            write_text(self.run_file, json.dumps(info, indent=1, ensure_ascii=False))

    @contextmanager
    def alone(self) -> Generator[None]:
        """Have the directory, which is made, for this process. Raises UserError naming the process that has it.

        The system ends the hold with the process, however that ends. Where nothing has been begun nothing is left.
        """
        self.create()
        with held(self.path, self._holder):
            try:
                yield
            finally:
                if not self.started:
                    with suppress(OSError):
                        (self.path / LOCK).unlink()
                        self.samples.rmdir()
                        self.path.rmdir()

    def _holder(self) -> str:
        """Who has the directory, as far as run.json knows."""
        try:
            process = self.info()["process"]
            return f"another process, it seems {process['pid']} on {process['host']}"
        except (UserError, KeyError, TypeError):
            return "another process"

    def attempt(self, what: str, write: Callable[[], object]) -> bool:
        """Write something; where the disk refuses and the run goes on, say so, once until it can be written again."""
        if not self.writes:
            return True
        try:
            write()
        except OSError as error:
            self.failed(what, error)
            return False
        if what in self._failing and self.say is not None:
            self._failing.remove(what)
            self.say(f"{what}: can be written again")
        return True

    def failed(self, what: str, error: OSError) -> None:
        """Say that something could not be written, or raise the error where the run does not go on."""
        if self.say is None or not of_storage(error):
            raise error
        if what not in self._failing:
            self._failing.add(what)
            self.say(f"cannot write {what} ({error.strerror}): the run goes on, and what was saved before stands")

    def log(self, event: str, step: int, **values: Any) -> None:
        """Append a line to metrics.jsonl; lines that the disk refuses wait for the next."""
        self._unwritten += json.dumps({"event": event, "step": step, **values}, ensure_ascii=False) + "\n"
        self.attempt(self.metrics_log.name, self.flush)

    def flush(self) -> None:
        """Write the lines of the log that wait, all or none."""
        with self.metrics_log.open("ab", buffering=0) as file:
            end, left = file.seek(0, os.SEEK_END), self._unwritten.encode()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise
        self._unwritten = ""

    def sync_log(self) -> None:
        """Have the log on the disk, before a checkpoint says that its steps are done."""
        if self.metrics_log.is_file():
            sync(self.metrics_log)

    def forget_after(self, step: int) -> None:
        """Drop the log's lines of steps later than `step`, which a resumed run does again, and a half-written last line."""
        if not self.writes or not self.metrics_log.is_file():
            return
        kept: list[str] = []
        for line in self.metrics_log.read_text(encoding="utf-8").split("\n"):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self.metrics_log, "".join(line + "\n" for line in kept))


@contextmanager
def held(path: Path, holder: Callable[[], str] = lambda: "another process") -> Generator[None]:
    """Have a directory for this process, until it ends, however it does. Raises UserError where another, which `holder` names, has it."""
    lock = FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{path} is in use by {holder()}; wait for it, stop it, or give another --out") from None
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Replace a file at once, so that a reader or a crash never meets half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
