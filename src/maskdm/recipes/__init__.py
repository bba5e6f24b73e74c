"""Ready-made runs: functions from a data location to a Config, by name. docs/recipes.md has them all in a table."""

from __future__ import annotations

from collections.abc import Callable

from maskdm.config import Config
from maskdm.errors import UserError, nearest
from maskdm.recipes.automatic import Choice, choose
from maskdm.recipes.paper import ABLATION, PAPER
from maskdm.recipes.small import OURS

__all__ = ["OFFERED", "RECIPES", "Choice", "choose", "recipe"]

RECIPES: dict[str, Callable[[str], Config]] = {**OURS, **PAPER}

OFFERED = ", ".join(
    (
        *OURS,
        *(name for name in PAPER if name.removeprefix("celeba64-") not in ABLATION),
        "celeba64-{patch,block2,block4,crop}-{10,50,90}",
        "celeba64-block8-50",
    )
)
"""The names in a line, those of the paper's ablation as a pattern."""


def recipe(name: str, source: str) -> Config:
    """The configuration of a recipe for the data at `source`. Raises UserError for a name that is none."""
    if name not in RECIPES:
        raise UserError(f"--recipe '{name}' is none of {OFFERED}{nearest(name, sorted(RECIPES))}")
    return RECIPES[name](source)
