"""Parts of a self-contained HTML page: values out of files, escaped text, numbers for people, tables, pictures, charts as inline SVG.

Whatever comes from a file passes through `text` (or a function here that calls it) before it becomes part of a page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, cast

Json = dict[str, Any]
GAP = "\u202f"  # narrow, unbreakable: between digits, and between a number and its unit
NUM_COLORS = 5
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


# --- values out of files whose shape is not to be relied on ---------------------------------------------------------


def as_object(value: Any) -> Json:
    """The value if it is a JSON object, else an empty one."""
    return cast(Json, value) if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return cast(list[Any], value) if isinstance(value, list) else []


def as_objects(value: Any) -> list[Json]:
    """The value if it is a list, its items as JSON objects."""
    return [as_object(item) for item in as_list(value)]


def read_text(path: Path) -> str:
    """The file's text; nothing when there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def parse(source: str) -> Json:
    """The JSON object in `source`; an empty one when it is something else, or cut off."""
    try:
        return as_object(json.loads(source))
    except ValueError:
        return {}


def read_events(path: Path) -> list[Json]:
    """The records that still hold, of JSON lines: those past the step that a run resumed from have been done over since."""
    events: list[Json] = []
    for record in filter(None, map(parse, read_text(path).split("\n"))):
        if record.get("event") == "resume":
            start = amount(record, "step")
            events = [earlier for earlier in events if amount(earlier, "step") <= start]
        events.append(record)
    return events


def finite(record: Json, key: str) -> float | None:
    """The number under `key`; None when it is absent, no number, not finite, or past what a sum or an axis bears."""
    found = record.get(key)
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < 1e50 else None


def amount(record: Json, key: str) -> float:
    """The number under `key`, or 0."""
    return finite(record, key) or 0.0


def interval(record: Json, key: str) -> tuple[float, float] | None:
    """The 95 % interval of a figure, where it is there and finite."""
    ends = as_list(record.get(f"{key}_interval"))
    if len(ends) != 2:
        return None
    low, high = (finite({"end": end}, "end") for end in ends)
    return None if low is None or high is None else (low, high)


def points(records: Sequence[Json], x: str, y: str, unit: float = 1.0) -> list[tuple[float, float]]:
    """(x / unit, y) of the records that have both, and a y that can stand on a logarithmic axis."""
    pairs = [(finite(record, x), finite(record, y)) for record in records]
    return [(first / unit, second) for first, second in pairs if first is not None and second is not None and second > 0]


def stage_starts(events: Sequence[Json], unit: float) -> list[tuple[float, str]]:
    """When each stage but the first began, on the clock of the records."""
    starts: dict[str, float] = {}
    latest = 0.0
    for record in events:
        if "seconds" in record and record.get("stage") is not None:
            starts.setdefault(str(record["stage"]), latest)
            latest = max(latest, amount(record, "seconds"))
    return [(start / unit, name) for name, start in list(starts.items())[1:]]


# --- text and tables ------------------------------------------------------------------------------------------------


def text(value: object) -> str:
    """Any value as escaped text, safe between tags and inside quoted attributes."""
    return html.escape(str(value), quote=True)


def number(value: int | float | None, digits: int = 3) -> str:
    """1437 -> '1 437', 0.012345 -> '0.0123', None -> a dash."""
    if value is None:
        return "&ndash;"
    if not float(value).is_integer() and abs(value) < 1000:
        value = float(f"{value:.{digits}g}")  # first: 999.7 is 1 000
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{round(value):,}".replace(",", GAP)
    shown = f"{value:.{digits}g}"
    if "e" in shown:
        base, power = shown.split("e")
        return f"{base}{GAP}\u00d7{GAP}10{str(int(power)).translate(_RAISED)}"
    return shown


def scaled(value: float | None, unit: str) -> str:
    """1.2e12 FLOP -> '1.2 TFLOP', None -> a dash."""
    if value is None:
        return number(value)
    value = float(f"{value:.3g}")  # first: 999.7 G is 1 T
    for factor, prefix in PREFIXES:
        if value >= factor:
            return f"{number(value / factor)}{GAP}{prefix}{unit}"
    return f"{number(value)}{GAP}{unit}"


def word(record: Json, key: str) -> str:
    """The value under `key` as escaped text, or a question mark."""
    return text(record.get(key, "?"))


def count(record: Json, key: str) -> str:
    """The number under `key` for people, or a dash."""
    return number(finite(record, key))


def percent(value: float | None) -> str:
    """0.875 -> '87.5 %'."""
    return "&ndash;" if value is None else f"{round(100 * value, 1) + 0.0:g}{GAP}%"  # + 0.0 makes of -0.0 a 0.0


def estimate(record: Json, key: str, show: Callable[[float | None], str]) -> str:
    """A figure for people, its 95 % interval below it."""
    ends = interval(record, key)
    span = f'<small class="span">{show(ends[0])} to {show(ends[1])}</small>' if ends else ""
    return show(finite(record, key)) + span


def duration(seconds: int | float) -> str:
    """200 -> '3 min 20 s'."""
    if seconds < 10:
        return f"{seconds:.1f}{GAP}s"
    whole = round(seconds)
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size}{GAP}{unit}" + (f" {rest}{GAP}{small}" if rest else "")
    return f"{whole}{GAP}s"


def clock(longest: float) -> tuple[float, str]:
    """Seconds per unit of a time axis that reaches `longest` seconds, and the unit."""
    return (1.0, "s") if longest <= 180 else (60.0, "min") if longest <= 3 * 3600 else (3600.0, "h")


def bullets(items: Sequence[str], kind: str = "") -> str:
    """A list of finished HTML fragments; nothing when there are none."""
    return f'<ul class="{kind}">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>" if items else ""


def tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    """(what, how much, remark) side by side, from finished HTML fragments."""
    return '<dl class="facts">' + "".join(f"<div><dt>{a}</dt><dd>{b}<small>{c}</small></dd></div>" for a, b, c in facts) + "</dl>"


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], wide: bool = False) -> str:
    """A table of finished HTML fragments that scrolls in its own box; `wide`: the last column is prose. Cells may be empty."""
    last = len(head) - 1

    def cell(index: int, content: str) -> str:
        if index == 0:
            return f'<th scope="row">{content}</th>'
        return f'<td class="{"wide" if wide and index == last else "num"}">{content}</td>'

    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    body = "".join("<tr>" + "".join(cell(i, content) for i, content in enumerate(row)) + "</tr>" for row in rows)
    # A box that scrolls must be reachable by keyboard, hence the tabindex and the name.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# --- the whole ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """One part of the page: an anchor, a heading, and finished HTML; left out when that is empty."""

    name: str
    title: str
    content: str

    def html(self) -> str:
        """The part, labelled by its heading."""
        heading = f'<h2 id="{self.name}-title">{self.title}</h2>'
        return f'<section id="{self.name}" aria-labelledby="{self.name}-title">{heading}{self.content}</section>'


def document(title: str, header: str, sections: Sequence[Section]) -> str:
    """The whole page: the template beside this module, filled."""
    shown = [part for part in sections if part.content]
    links = "".join(f'<a href="#{part.name}">{part.title}</a>' for part in shown)
    template = Template(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    return template.substitute(title=text(title), header=header, links=links, parts="\n".join(part.html() for part in shown))
