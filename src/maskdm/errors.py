"""What went wrong, for the person who asked: one line, and the way out."""

from __future__ import annotations

import errno


class Told(Exception):
    """An exception whose message is all that a person needs: in a notebook it stands alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {self}"]


class UserError(Told):
    """Bad input. The message is one line naming the file, key or value and the way out; exit code 2."""


def nearest(word: str, choices: list[str]) -> str:
    """`; did you mean X?` for the choice closest to `word`, or nothing when none is close."""
    import difflib

    match = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def shorten(text: str, most: int = 200) -> str:
    """The text, or its beginning where it is too long for a message."""
    return text if len(text) <= most else f"{text[:most]}..."


_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENODEV}


def of_storage(error: OSError) -> bool:
    """Whether the disk, and not the program, is what failed: full, over quota, read-only, broken, gone."""
    return error.errno in _STORAGE
