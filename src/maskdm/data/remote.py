"""Bytes of a file, on this machine or behind a URL, through connections that drop and stall."""

from __future__ import annotations

import http.client
import io
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from maskdm.data.threads import within
from maskdm.errors import UserError

T = TypeVar("T")

PIECE = 1 << 16
LONGEST_PAUSE = 30.0
SLOWEST = 50_000
"""Bytes a second: below it a read is given up, after `patience`."""
MOST_AT_ONCE = 1 << 30
"""Bytes of a file that is read as a whole."""
LEVELS = 4
"""Of folders that are looked through, behind a URL."""
GONE = (401, 403, 404, 410, 416)
"""Answers of a server that no second request changes."""


class LostShard(Exception):
    """A file is missing or damaged, or its server does not answer. The message names it."""


@dataclass(frozen=True)
class Remote:
    """How to read: seconds without a byte until a connection is given up, tries without progress, the first pause, seconds in all."""

    timeout: float = 20.0
    tries: int = 6
    pause: float = 0.5
    patience: float = 120.0

    def read(self, address: str, start: int, length: int) -> bytes:
        """The bytes [start, start + length) of a path or URL. After a failure it goes on where it was. Raises LostShard."""
        got = bytearray()
        if length <= 0:
            return b""
        if not is_http(address):
            return self._read_other(address, start, length)

        def request(ends: float) -> bool:
            self._request(address, start, length, got, ends)
            return len(got) >= length

        self._insist(address, request, lambda: len(got), self.patience + length / SLOWEST)
        return bytes(got)

    def size(self, address: str) -> int:
        """How many bytes a file has. Raises LostShard."""
        if not is_http(address):
            return self._size_other(address)
        found: list[int] = []

        def request(ends: float) -> bool:
            with urllib.request.urlopen(urllib.request.Request(address), timeout=self.timeout) as response:
                given = response.headers.get("Content-Length")
            if given is None:
                raise LostShard(f"{address}: the server does not say how long it is")
            if not given.isdecimal():
                raise LostShard(f"{address}: the server says that it is '{given[:40]}' bytes long")
            found.append(int(given))
            return True

        self._insist(address, request, lambda: 0, self.patience)
        return found[0]

    def read_all(self, address: str) -> bytes:
        """A whole file, of a size that memory takes. Raises LostShard."""
        size = self.size(address)
        if size > MOST_AT_ONCE:
            raise LostShard(f"{address}: has {size / 1e9:.3g} GB, which is too much for an index")
        return self.read(address, 0, size)

    def names(self, address: str) -> list[str]:
        """The files below a folder, some levels down, by their names from there. Raises LostShard."""
        if "://" not in address:
            root = Path(address)
            return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

        def ask(files: Any, path: str) -> list[str]:
            below = path.rstrip("/") + "/"
            return sorted(str(name)[len(below) :] for name in files.find(path, maxdepth=LEVELS) if str(name).startswith(below))

        return self._by_fsspec(address, ask, 0)

    def _insist(self, address: str, request: Callable[[float], bool], progress: Callable[[], int], patience: float) -> None:
        """Ask a server until it has answered. Raises LostShard after too many tries without progress, or too long in all."""
        failures, ends = 0, time.monotonic() + patience
        while True:
            before, reason = progress(), "the connection ended early"
            try:
                if request(ends):
                    return
            except urllib.error.HTTPError as error:
                if error.code in GONE:
                    raise LostShard(f"{address}: {error.code} {error.reason}") from error
                reason = f"{error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            failures = 0 if progress() > before else failures + 1
            if failures >= self.tries:
                raise LostShard(f"{address}: {reason}, {failures} times in a row")
            if time.monotonic() > ends:
                raise LostShard(f"{address}: not read within {patience:.0f} s ({reason})")
            # jitter: processes that lost one server do not all come back at once
            time.sleep(min(LONGEST_PAUSE, self.pause * 2**failures) * random.uniform(0.5, 1))

    def _request(self, address: str, start: int, length: int, got: bytearray, ends: float) -> None:
        """Append to `got` what one connection gives of the bytes that are missing."""
        first = start + len(got)
        request = urllib.request.Request(address, headers={"Range": f"bytes={first}-{start + length - 1}"})
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            skip = 0 if response.status == 206 else first  # a server without ranges sends the file from its beginning
            while len(got) < length and time.monotonic() < ends:
                piece: bytes = response.read1(PIECE)
                if not piece:
                    return
                kept = piece[min(skip, len(piece)) :]
                skip -= len(piece) - len(kept)
                got += kept[: length - len(got)]

    def _read_other(self, address: str, start: int, length: int) -> bytes:
        """From a local file, or by fsspec, whose file systems retry by themselves."""
        if "://" in address:
            got = self._by_fsspec(address, lambda files, path: files.cat_file(path, start=start, end=start + length), length)
        else:
            try:
                with Path(address).open("rb") as file:
                    file.seek(start)
                    got = file.read(length)
            except OSError as error:
                raise LostShard(f"{address}: {error.strerror or error}") from error
        if len(got) < length:
            raise LostShard(f"{address}: ends before byte {start + length}; it is damaged")
        return got

    def _size_other(self, address: str) -> int:
        if "://" in address:
            return int(self._by_fsspec(address, lambda files, path: files.info(path)["size"], 0))
        try:
            return Path(address).stat().st_size
        except OSError as error:
            raise LostShard(f"{address}: {error.strerror or error}") from error

    def _by_fsspec(self, address: str, ask: Callable[[Any, str], T], length: int) -> T:
        """Ask a file system, and not for ever: the thread that does not come back is left behind."""

        def work() -> T:
            from fsspec.core import url_to_fs

            files, path = url_to_fs(address)
            return ask(files, path)

        patience = self.patience + length / SLOWEST
        try:
            return within(patience, work)
        except TimeoutError as error:
            raise LostShard(f"{address}: not read within {patience:.0f} s") from error
        except ImportError as error:
            raise UserError(f"{address} needs another package ({error})") from error
        except ValueError as error:  # no such protocol
            raise UserError(f"{address} cannot be read: {error}") from error
        except Exception as error:  # each file system has errors of its own
            text = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise LostShard(f"{address}: {text}") from error


class RangeFile(io.RawIOBase):
    """A file of known size behind a path or URL, read in pieces: for readers that want one that can be sought in."""

    def __init__(self, remote: Remote, address: str, size: int) -> None:
        self.remote, self.address, self.length = remote, address, size
        self._place = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go elsewhere."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.length}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as there are bytes. Raises LostShard."""
        count = max(0, min(len(buffer), self.length - self._place))
        if count:
            buffer[:count] = self.remote.read(self.address, self._place, count)
            self._place += count
        return count


def is_http(address: str) -> bool:
    """Whether an address is one of the web."""
    return address.startswith(("http://", "https://"))
