"""Charts as inline SVG: lines over a logarithmic or linear axis, bars of histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from maskdm.report.page import NUM_COLORS, bullets, number, text


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (x, y), a colour and a kind of stroke by number, raw points drawn faintly behind."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    faint: Sequence[tuple[float, float]] = ()
    dash: int = 0
    dots: bool = False
    bars: Sequence[tuple[float, float, float]] = ()
    """Intervals (x, low, high)."""
    best: tuple[float, float] | None = None
    """A point to be ringed."""


DASHES = (("solid", "none"), ("dashed", "8 5"), ("dotted", "2 4"))
"""Kinds of stroke, of borders (the legend) and of curves: lines of one colour stay as dark as it is, which paler ones would not."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 58, 14, 12, 46


def smooth(raw: Sequence[tuple[float, float]], most: int = 150) -> list[tuple[float, float]]:
    """At most `most` means of neighbouring points: one batch's loss says more of its noise levels than of the network."""
    size = max(1, math.ceil(len(raw) / most), min(8, len(raw) // 12))
    parts = [raw[start : start + size] for start in range(0, len(raw), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _linear_ticks(low: float, high: float, num: int = 5) -> list[float]:
    raw = (high - low) / num
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 2.5, 5, 10) if base * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) >= 3:
            return ticks
    return _linear_ticks(low, high)


@dataclass(frozen=True)
class _Scale:
    """Data to picture units; y is logarithmic where all of it is above 0, since a loss falls by factors."""

    x: tuple[float, float]
    y: tuple[float, float]
    logarithmic: bool

    def across(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        low, high, at = (math.log(value) if self.logarithmic else value for value in (*self.y, y))
        return TOP + (high - at) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(self, line: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in line)


def _scale(series: Sequence[Series], logarithmic: bool) -> _Scale:
    every = [point for line in series for point in (*line.points, *line.faint)]
    xs = [x for x, _ in every]
    ys = [y for _, y in every] + [y for line in series for _, low, high in line.bars for y in (low, high)]
    low, high = min(ys), max(ys)
    across = (min(0.0, min(xs)), max(max(xs), 1e-9))
    if logarithmic:
        room = 1.04 if high > low else 1.5
        return _Scale(across, (low / room, high * room), True)
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.05 * (high - low) or 1.0
    return _Scale(across, (low - room, high + room), False)


def _axes(scale: _Scale, x_label: str, y_label: str) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts: list[str] = []
    for y in _log_ticks(*scale.y) if scale.logarithmic else _linear_ticks(*scale.y):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{scale.down(y):.1f}" y2="{scale.down(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{scale.down(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in _linear_ticks(*scale.x):
        parts.append(f'<text x="{scale.across(x):.1f}" y="{bottom + 18}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text class="side" x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{y_label}</text>')
    return "".join(parts)


def _line(scale: _Scale, line: Series) -> str:
    parts = [f'<g style="--c: var(--c{line.color % NUM_COLORS})">']
    if line.faint:
        parts.append(f'<polyline class="faint" points="{scale.path(line.faint)}"/>')
    dash = DASHES[line.dash % len(DASHES)][1]
    parts.append(f'<polyline class="curve" style="stroke-dasharray: {dash}" points="{scale.path(line.points)}"/>')
    for x, low, high in line.bars:
        parts.append(f'<polyline class="curve" points="{scale.path([(x, low), (x, high)])}"/>')
    if line.dots or len(line.points) == 1:
        for x, y in line.points:
            hint = f"<title>{text(line.name)}: {number(x)}, {number(y)}</title>"
            parts.append(f'<circle class="dot" r="3.4" cx="{scale.across(x):.1f}" cy="{scale.down(y):.1f}">{hint}</circle>')
    if line.best:
        x, y = line.best
        parts.append(f'<circle class="ring" r="8" cx="{scale.across(x):.1f}" cy="{scale.down(y):.1f}"><title>the best</title></circle>')
    return "".join(parts) + "</g>"


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    marks: Sequence[tuple[float, str]] = (),
    note: str = "",
    logarithmic: bool = True,
) -> str:
    """Lines over a logarithmic y axis (then y > 0) or one from 0, with vertical `marks` (x, name); '' when there is nothing to draw."""
    series = [line for line in series if line.points]
    if not series:
        return ""
    scale = _scale(series, logarithmic)
    drawn = "".join(_line(scale, line) for line in series)
    for x, name in marks:
        at, late = scale.across(x), x > (scale.x[0] + 2 * scale.x[1]) / 3
        side = f'x="{at - 5:.1f}" text-anchor="end"' if late else f'x="{at + 5:.1f}"'
        drawn += f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        drawn += f'<text {side} y="{TOP + 12}">{text(name)}</text>'
    ends = "; ".join(f"{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in series)
    keys = [f"--c: var(--c{line.color % NUM_COLORS}); border-top-style: {DASHES[line.dash % len(DASHES)][0]}" for line in series]
    names = [f'<span style="{key}"></span>{text(line.name)}' for key, line in zip(keys, series, strict=True)]
    return (
        f'<figure class="chart"><h3>{title}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}: {text(ends)}">'
        f"{_axes(scale, x_label, y_label)}{drawn}</svg>{bullets(names, 'legend')}<figcaption>{note}</figcaption></figure>"
    )


def histogram(title: str, ours: Sequence[float], theirs: Sequence[float], note: str = "") -> str:
    """Shares of two sets in the same bins: samples as an outline, real images filled; '' where there are none.

    Heights are square roots, since one bin (a black ground, say) may hold nearly everything.
    """
    if not ours or len(ours) != len(theirs):
        return ""
    width, height = 240, 110
    top = max(*ours, *theirs) or 1.0

    def outline(shares: Sequence[float]) -> str:
        step = width / len(shares)
        tops = [height - max(share / top, 0.0) ** 0.5 * (height - 6) for share in shares]
        corners = [(x, y) for i, y in enumerate(tops) for x in (i * step, (i + 1) * step)]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in [(0.0, float(height)), *corners, (float(width), float(height))])

    label = f"{title}: shares of the values from dark to bright, samples and real images"
    return (
        f'<figure class="chart small"><h3>{text(title)}</h3><svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(label)}">'
        f'<polygon class="filled" points="{outline(theirs)}"/><polyline class="curve" style="--c: var(--c0)" points="{outline(ours)}"/>'
        f"</svg><figcaption>{note}</figcaption></figure>"
    )


def whisker(value: float | None, ends: tuple[float, float] | None, low: float, high: float) -> str:
    """A figure and its interval on an axis from `low` to `high`, for a cell of a table that has the numbers too."""
    if value is None or high <= low:
        return ""
    width, middle = 130, 9

    def across(x: float) -> float:
        return 5 + (min(max(x, low), high) - low) / (high - low) * (width - 10)

    bar = f'<line class="curve" x1="{across(ends[0]):.1f}" x2="{across(ends[1]):.1f}" y1="{middle}" y2="{middle}"/>' if ends else ""
    zero = f'<line class="grid" x1="{across(0.0):.1f}" x2="{across(0.0):.1f}" y1="0" y2="{2 * middle}"/>' if low <= 0 <= high else ""
    dot = f'<circle class="dot" r="4" cx="{across(value):.1f}" cy="{middle}"/>'
    return f'<svg class="whisker" aria-hidden="true" width="{width}" height="{2 * middle}">{zero}{bar}{dot}</svg>'
