"""Ready-made runs: functions from a data location to a Config."""

from __future__ import annotations

from collections.abc import Callable

from maskdm.config import Config
from maskdm.errors import UserError, nearest
from maskdm.recipes.automatic import Choice, choose
from maskdm.recipes.small import cifar10, digits, emoji

__all__ = ["RECIPES", "Choice", "choose", "cifar10", "digits", "emoji", "recipe"]

RECIPES: dict[str, Callable[[str], Config]] = {"cifar10": cifar10, "digits": digits, "emoji": emoji}


def recipe(name: str, source: str) -> Config:
    """The configuration of a recipe for the data at `source`. Raises UserError for a name that is none."""
    if name not in RECIPES:
        raise UserError(f"--recipe '{name}' is none of {', '.join(sorted(RECIPES))}{nearest(name, sorted(RECIPES))}")
    return RECIPES[name](source)
