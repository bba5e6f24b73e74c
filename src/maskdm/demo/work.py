"""One computation at a time; the others wait their turn, a few of them, and each can be stopped."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from maskdm.engine import out_of_memory
from maskdm.errors import UserError

WAITING = 8
"""Computations that wait while one goes on, at most."""

EVERY = 0.1
"""Seconds between two pictures of a computation."""

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Busy(UserError):
    """Too many wait already."""


class Stopped(Exception):
    """The computation was stopped on request."""


@dataclass(frozen=True)
class Shown:
    """How far a computation is: a sentence, and images uint8 [n, channels, height, width] where there are any to see."""

    text: str
    images: NDArray[np.uint8] | None = None


class Job(Generic[Result]):
    """A computation that was asked for: where it stands, what it shows, how it is stopped, what came of it."""

    def __init__(self, jobs: list[Job[Any]]) -> None:
        self._jobs, self._stop, self._changed = jobs, threading.Event(), threading.Condition()
        self._shown, self._last = Shown("begins"), 0.0
        self.future: Future[Result] = Future()

    def stop(self) -> bool:
        """Have it end at its next step, or never begin; whether there was something to stop."""
        running = not self.future.done() and not self._stop.is_set()
        self._stop.set()
        return running

    # --- for the work itself ---

    def check(self) -> None:
        """Raise Stopped where that was asked for."""
        if self._stop.is_set():
            raise Stopped

    @property
    def due(self) -> bool:
        """Whether it is worth the time to show something again."""
        return time.monotonic() - self._last >= EVERY

    def show(self, text: str, images: NDArray[np.uint8] | None = None) -> None:
        """Say how far the work is."""
        self._shown, self._last = Shown(text, images), time.monotonic()

    # --- for whoever asked ---

    @property
    def ahead(self) -> int:
        """Computations before this one."""
        return next((place for place, each in enumerate(list(self._jobs)) if each is self), 0)

    def watch(self) -> Generator[Shown, None, None]:
        """What it shows, when that changes, until it ends. Left early, it is stopped."""
        seen: Shown | None = None
        try:
            while not self.future.done():
                ahead = self.ahead
                shown = Shown(f"waits for {ahead} before it") if ahead else self._shown
                if shown != seen if ahead else shown is not seen:
                    seen = shown
                    yield shown
                time.sleep(EVERY / 2)
        finally:
            self.stop()

    def result(self) -> Result:
        """What came of it, once it is there. Raises UserError, in a sentence, and Stopped."""
        try:
            return self.future.result()
        except CancelledError:
            raise Stopped from None


class Worker:
    """The thread that computes."""

    def __init__(self, waiting: int = WAITING) -> None:
        self._waiting, self._jobs = waiting, list[Job[Any]]()
        self._lock, self._ended = threading.RLock(), False  # again in the same thread: a signal may come while it is held
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="maskdm-demo")

    def begin(self, work: Callable[[Job[Result]], Result]) -> Job[Result]:
        """Have something computed as soon as it is its turn. Raises Busy."""
        with self._lock:
            if self._ended:
                raise Busy("the demo ends")
            if len(self._jobs) > self._waiting:
                raise Busy(f"{len(self._jobs)} computations are asked for already; try again when some of them are done")
            job: Job[Result] = Job(self._jobs)
            self._jobs.append(job)
            job.future = self._thread.submit(self._run, work, job)
        return job

    def _run(self, work: Callable[[Job[Result]], Result], job: Job[Result]) -> Result:
        try:
            job.check()
            return work(job)
        except (UserError, Stopped):
            raise
        except Exception as error:
            if out_of_memory(error):
                raise UserError("memory ran out; ask for fewer images") from None
            log.exception("a computation of the demo failed")
            raise UserError(f"the computation failed ({type(error).__name__}); the terminal in which maskdm demo runs says more") from None
        finally:
            with self._lock:
                self._jobs.remove(job)

    def stop(self) -> None:
        """Stop everything, and take nothing new."""
        with self._lock:
            self._ended = True
            for job in self._jobs:
                job.stop()

    def close(self) -> None:
        """The same, and wait until it has stopped."""
        self.stop()
        self._thread.shutdown(wait=True)
