"""Of the words of a command line, which are settings of a run: those are checked against the configuration, not by tyro."""

from __future__ import annotations

from dataclasses import dataclass, field

TRAIN_OPTIONS = ("--out", "--recipe", "--config")
OPTIONS = {
    "train": (),
    "plan": ("--price-per-hour", "--price_per_hour"),
    "compare": ("--budget", "--arms", "--seeds", "--first-seed", "--features", "--num"),
    "distil": ("--steps", "--end", "--scales", "--method", "--updates", "--mask", "--data"),
}
"""Verbs that take the settings of a run, and the options that each has beside TRAIN_OPTIONS."""

TRAIN_FLAGS = ("--dry-run", "--no-dry-run", "--fork", "--no-fork", "--help", "-h")


@dataclass
class CommandLine:
    """The arguments, with the settings of a run taken out: those are checked against the configuration, not by tyro."""

    rest: list[str] = field(default_factory=list[str])
    settings: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def split_settings(arguments: list[str], options: tuple[str, ...] = TRAIN_OPTIONS) -> CommandLine:
    """Separate `--any.setting value`, `--any.setting=value` and bare `--switch` / `--no-switch` from train's own options."""
    line, waiting = CommandLine(), list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, has_value, value = word.partition("=")
        if not word.startswith("--") or name.replace("_", "-") in TRAIN_FLAGS:
            line.rest.append(word)
        elif name in options:
            line.rest.extend([word] if has_value or not waiting else [word, waiting.pop(0)])
        elif has_value:
            line.settings.append((name[2:], value))
        elif waiting and not waiting[0].startswith("--"):
            line.settings.append((word[2:], waiting.pop(0)))
        else:
            off = word.startswith("--no-")
            line.settings.append((word[5:] if off else word[2:], "false" if off else "true"))
    return line
