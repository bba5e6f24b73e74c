"""Bytes of a shard, on this machine or behind a URL, through connections that drop and stall."""

from __future__ import annotations

import http.client
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIECE = 1 << 16
LONGEST_PAUSE = 30.0
GONE = (401, 403, 404, 410)
"""Answers of a server that no second request changes."""


class LostShard(Exception):
    """A shard is missing or damaged, or its server does not answer. The message names it."""


@dataclass(frozen=True)
class Remote:
    """How to read: seconds without a byte before a connection is given up, tries without a byte of progress, the first pause."""

    timeout: float = 20.0
    tries: int = 6
    pause: float = 0.5

    def read(self, address: str, start: int, length: int) -> bytes:
        """The bytes [start, start + length) of a path or URL. After a failure it goes on where it was. Raises LostShard."""
        if not address.startswith(("http://", "https://")):
            return _read_other(address, start, length)
        got, failures = bytearray(), 0
        while len(got) < length:
            before, reason = len(got), "the connection ended early"
            try:
                self._request(address, start, length, got)
            except urllib.error.HTTPError as error:
                if error.code in GONE or error.code == 416:
                    raise LostShard(f"{address}: {error.code} {error.reason}") from error
                reason = f"{error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            failures = 0 if len(got) > before else failures + 1
            if failures >= self.tries:
                raise LostShard(f"{address}: {reason}, {failures} times in a row")
            if len(got) < length:  # jitter: processes that lost one server do not all come back at once
                time.sleep(min(LONGEST_PAUSE, self.pause * 2**failures) * random.uniform(0.5, 1))
        return bytes(got)

    def _request(self, address: str, start: int, length: int, got: bytearray) -> None:
        """Append to `got` what one connection gives of the bytes that are missing."""
        first = start + len(got)
        request = urllib.request.Request(address, headers={"Range": f"bytes={first}-{start + length - 1}"})
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            skip = 0 if response.status == 206 else first  # a server without ranges sends the file from its beginning
            while len(got) < length:
                piece: bytes = response.read1(PIECE)
                if not piece:
                    return
                kept = piece[min(skip, len(piece)) :]
                skip -= len(piece) - len(kept)
                got += kept[: length - len(got)]


def _read_other(address: str, start: int, length: int) -> bytes:
    """From a local file, or by fsspec, whose file systems retry by themselves."""
    try:
        if "://" in address:
            got = _by_fsspec(address, start, length)
        else:
            with Path(address).open("rb") as file:
                file.seek(start)
                got = file.read(length)
    except OSError as error:
        raise LostShard(f"{address}: {error.strerror or error}") from error
    if len(got) < length:
        raise LostShard(f"{address}: ends before byte {start + length}; it is damaged")
    return got


def _by_fsspec(address: str, start: int, length: int) -> bytes:
    from fsspec.core import url_to_fs

    files: Any
    files, path = url_to_fs(address)
    got: bytes = files.cat_file(path, start=start, end=start + length)
    return got
