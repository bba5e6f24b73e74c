"""Where what is made from data is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where decoded images, indexes of shards and feature networks are kept: $MASKDM_CACHE, or maskdm in the user's cache directory."""
    given = os.environ.get("MASKDM_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskdm"


def put(path: Path, body: bytes) -> None:
    """Write a file so that it is there as a whole or not at all, also after a crash."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with partial.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
