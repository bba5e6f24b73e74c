"""Damage to bytes, as a function of a random generator."""

from __future__ import annotations

import random
import struct

EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
HEADER = 64
"""Bytes at the beginning in which formats say sizes and types."""


def mutate(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """One to four damages to a file; `other` is another from which pieces are taken."""
    kinds = (_flip, _extreme, _extreme, _cut, _insert, _splice, _repeat, _blank, _grow)
    for _ in range(draw.choice((1, 1, 2, 4))):
        data = draw.choice(kinds)(data, other, draw)
    return data


def _place(data: bytes, draw: random.Random) -> int:
    """Somewhere, half of the time in the header."""
    return draw.randrange(max(1, min(len(data), HEADER) if draw.random() < 0.5 else len(data)))


def _flip(data: bytes, other: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 3, 30)) if data else 0):
        changed[_place(data, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _extreme(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A number of one, two, four or eight bytes set to an end of its range, either way round."""
    code = draw.choice("BHIQ")
    value = draw.choice(EXTREMES) & ((1 << (8 * struct.calcsize(code))) - 1)
    number = struct.pack(draw.choice("<>") + code, value)
    at = _place(data, draw)
    return data[:at] + number + data[at + len(number) :]


def _cut(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data[: _place(data, draw)]


def _insert(data: bytes, other: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + draw.randbytes(draw.choice((1, 7, 300))) + data[at:]


def _splice(data: bytes, other: bytes, draw: random.Random) -> bytes:
    at, start = _place(data, draw), _place(other, draw)
    piece = other[start : start + draw.choice((4, 50, 1000))]
    return data[:at] + piece + data[at + (len(piece) if draw.random() < 0.5 else 0) :]


def _repeat(data: bytes, other: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + data[at : at + 200] * draw.choice((2, 20)) + data[at:]


def _blank(data: bytes, other: bytes, draw: random.Random) -> bytes:
    at, length = _place(data, draw), draw.choice((4, 40, 400))
    return data[:at] + draw.choice((b"\0", b"\xff"))[:1] * min(length, len(data) - at) + data[at + length :]


def _grow(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data + other if draw.random() < 0.5 else other[:HEADER] + data[HEADER:]
