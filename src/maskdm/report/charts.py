"""Charts as inline SVG: lines over a logarithmic or linear axis, bars of histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from maskdm.report.page import NUM_COLORS, bullets, number, text


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (x, y), a colour by number, raw points drawn faintly behind, and how strongly it shows."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    faint: Sequence[tuple[float, float]] = ()
    strength: float = 1.0
    dots: bool = False


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
    """Data to picture units; y is logarithmic, since a loss falls by factors."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        low, high = math.log(self.y[0]), math.log(self.y[1])
        return TOP + (high - math.log(y)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(self, line: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in line)


def _scale(series: Sequence[Series]) -> _Scale:
    every = [point for line in series for point in (*line.points, *line.faint)]
    xs, ys = [x for x, _ in every], [y for _, y in every]
    low, high = min(ys), max(ys)
    room = 1.04 if high > low else 1.5
    return _Scale((min(0.0, min(xs)), max(max(xs), 1e-9)), (low / room, high * room))


def _axes(scale: _Scale, x_label: str, y_label: str) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts: list[str] = []
    for y in _log_ticks(*scale.y):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{scale.down(y):.1f}" y2="{scale.down(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{scale.down(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in _linear_ticks(*scale.x):
        parts.append(f'<text x="{scale.across(x):.1f}" y="{bottom + 18}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text class="side" x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{y_label}</text>')
    return "".join(parts)


def _line(scale: _Scale, line: Series) -> str:
    color = f"--c: var(--c{line.color % NUM_COLORS}); opacity: {line.strength}"
    parts = [f'<g style="{color}">']
    if line.faint:
        parts.append(f'<polyline class="faint" points="{scale.path(line.faint)}"/>')
    parts.append(f'<polyline class="curve" points="{scale.path(line.points)}"/>')
    if line.dots or len(line.points) == 1:
        for x, y in line.points:
            hint = f"<title>{text(line.name)}: {number(x)}, {number(y)}</title>"
            parts.append(f'<circle class="dot" r="3.4" cx="{scale.across(x):.1f}" cy="{scale.down(y):.1f}">{hint}</circle>')
    return "".join(parts) + "</g>"


def chart(title: str, x_label: str, y_label: str, series: Sequence[Series], marks: Sequence[tuple[float, str]] = (), note: str = "") -> str:
    """Lines over a logarithmic y axis, with vertical `marks` (x, name); '' when there is nothing to draw. Points need y > 0."""
    series = [line for line in series if line.points]
    if not series:
        return ""
    scale = _scale(series)
    drawn = "".join(_line(scale, line) for line in series)
    for x, name in marks:
        at, late = scale.across(x), x > (scale.x[0] + 2 * scale.x[1]) / 3
        side = f'x="{at - 5:.1f}" text-anchor="end"' if late else f'x="{at + 5:.1f}"'
        drawn += f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        drawn += f'<text {side} y="{TOP + 12}">{text(name)}</text>'
    ends = "; ".join(f"{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in series)
    names = [f'<span style="--c: var(--c{line.color % NUM_COLORS}); opacity: {line.strength}"></span>{text(line.name)}' for line in series]
    return (
        f'<figure class="chart"><h3>{title}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}: {text(ends)}">'
        f"{_axes(scale, x_label, y_label)}{drawn}</svg>{bullets(names, 'legend')}<figcaption>{note}</figcaption></figure>"
    )
