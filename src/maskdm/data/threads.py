"""Threads for reading and decoding that the end of the program does not wait for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

READERS = 16
"""Requests under way at once, in a process."""


class Threads:
    """Workers that take what is submitted in order. The interpreter's own pools would be joined at its end, whatever they wait for."""

    def __init__(self, count: int, name: str) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        for number in range(count):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have something done."""
        future: Future[T] = Future()
        self._queue.put((future, work))
        return future

    def _work(self) -> None:
        while True:
            future, work = self._queue.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)


def within(seconds: float, work: Callable[[], T]) -> T:
    """The outcome of some work. Raises TimeoutError where it takes longer: its thread is left behind."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="maskdm-bounded", daemon=True).start()
    return future.result(seconds)


@cache
def readers() -> Threads:
    """For what waits for a disk or a server."""
    return Threads(READERS, "maskdm-read")


@cache
def decoders() -> Threads:
    """For what keeps a core busy outside the interpreter's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Threads(min(cores, READERS), "maskdm-decode")
