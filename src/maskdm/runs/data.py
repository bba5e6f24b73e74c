"""`maskdm data`: what is in a data set, and what training would do with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from maskdm.config import Hardware
from maskdm.data import Dataset, Summary, duplicates, inspect, open_source, prepare
from maskdm.engine import this_machine
from maskdm.recipes import choose
from maskdm.runs.display import Display
from maskdm.runs.resolve import facts_of
from maskdm.runs.sizes import parse_size
from maskdm.runs.store import cache_directory

LISTED = 50
"""Names of broken or duplicate files printed before the rest is only counted."""


def describe_data(location: str, image_size: str | None, display: Display) -> str:
    """Read every image of `location` and say what is there. Raises UserError where nothing can be read."""
    source = open_source(location)
    summary = inspect(source)
    if summary.readable == 0:
        display.note("none of the files looked at can be read")
    size = parse_size(image_size) if image_size else None
    choice = choose(facts_of(source, summary, this_machine(Hardware())), size)
    settings = replace(choice.config.data, max_broken=1.0)
    with display.counting("reading images") as progress:
        dataset = prepare(source, settings, cache_directory(), progress)
    lines = [f"{location}: {source.description}", *_summary_lines(summary), *_class_lines(dataset)]
    height, width = settings.image_size
    lines.append(f"prepared as {height} x {width}, {'gray' if settings.channels == 1 else 'RGB'}, fit {settings.fit}: {choice.reasons[0]}")
    lines += [*source.notes, *(note for note in dataset.notes if note not in source.notes)]
    if source.index is not None:
        lines.append("shards are not read for this: what is broken in them is named while training; duplicates have the same bytes")
    lines += _listed("broken, skipped", [f"{name}: {reason}" for name, reason in dataset.broken])
    lines += _listed("exact duplicates, kept on one side of the held-out split", [" = ".join(group) for group in duplicates(dataset)])
    share = len(dataset.broken) / max(1, len(source))
    limit = choice.config.data.max_broken
    if share > limit:
        lines.append(
            f"{share:.1%} of the files are broken, and training accepts {limit:.1%}: mend them, or give --max-broken {share + 0.01:.2f}"
        )
    return "\n".join(lines)


def _summary_lines(summary: Summary) -> list[str]:
    common = ", ".join(f"{height} x {width} ({count})" for (height, width), count in summary.sizes[:3])
    return [
        f"images: {summary.count}",
        f"sizes (height x width): median {summary.median_height} x {summary.median_width}; most common {common}",
        f"colour: {'gray' if summary.gray else 'RGB'}",
    ]


def _class_lines(dataset: Dataset) -> list[str]:
    if dataset.labels is None:
        return ["classes: none"]
    counts = Counter(dataset.labels.tolist())
    shown = ", ".join(f"{name} ({counts[i]})" for i, name in enumerate(dataset.class_names[:20]))
    more = f", ... {len(dataset.class_names) - 20} more" if len(dataset.class_names) > 20 else ""
    return [f"classes: {len(dataset.class_names)}: {shown}{more}"]


def _listed(title: str, names: list[str]) -> list[str]:
    lines = [f"{title}: {len(names) or 'none'}", *(f"  {name}" for name in names[:LISTED])]
    return lines if len(names) <= LISTED else [*lines, f"  ... and {len(names) - LISTED} more"]
