"""How much sooner one way of training reaches what another ends with, over seeds, with an interval and in words.

A curve is the held-out loss of whole images against what was spent (seconds, FLOPs or images), of one seed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from maskdm.evaluation.intervals import Estimate

Unit = Literal["seconds", "flops", "images"]
SOONER: dict[Unit, str] = {"seconds": "sooner", "flops": "cheaper in arithmetic", "images": "sooner in images"}

MARGIN = 1.05
"""Speed-ups nearer to 1 count as no difference: two arms that are the same differ by that much on a busy machine."""


@dataclass(frozen=True)
class Curve:
    """Losses at increasing costs, none at cost 0."""

    costs: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def best(self) -> float:
        """The lowest loss reached."""
        return min(self.losses)

    def cost_of(self, loss: float) -> float | None:
        """What the lowest loss so far first reached `loss` at, between the points by a line; None where it never did."""
        lowest = np.minimum.accumulate(self.losses)
        if not lowest[-1] <= loss:
            return None
        index = int(np.argmax(lowest <= loss))
        if index == 0:
            return self.costs[0]
        before, here = lowest[index - 1], lowest[index]
        part = (before - loss) / (before - here)
        return float(self.costs[index - 1] + part * (self.costs[index] - self.costs[index - 1]))


def speed_up(arm: Curve, against: Curve) -> float:
    """What `against` spent on its best loss over what `arm` spent on the same; above 1: `arm` is faster.

    Where the arm never gets there it is the other way round: over the arm's best loss, below 1. On curves that still fall it changes
    without a leap; where they have levelled out the costs of nearly equal losses are far apart, and the ratio says little. 1 where neither
    can be called faster (`EVEN`). NaN where a loss of either is not finite.
    """
    if not all(map(math.isfinite, (*arm.losses, *against.losses))):
        return math.nan
    return 1.0 if _kind(arm, against) in EVEN else _ratio(arm, against)


def _ratio(arm: Curve, against: Curve) -> float:
    """The costs of the lowest loss that both reach."""
    level = _level(arm, against)
    theirs, ours = against.cost_of(level), arm.cost_of(level)
    assert theirs is not None and ours is not None
    return theirs / ours


def _crossed(arm: Curve, against: Curve) -> bool:
    """Whether the one that was sooner at the level that both reach has stopped falling there, and the other goes on: neither is faster."""
    ahead = math.log(_ratio(arm, against))
    return abs(ahead) > math.log(MARGIN) and ahead * (against.best - arm.best) < 0


def _level(arm: Curve, against: Curve) -> float:
    """The lowest loss that both reach."""
    return max(arm.best, against.best)


Kind = Literal["told", "ours", "theirs", "both", "crossed"]

EVEN: dict[Kind, str] = {
    "both": "both were there before they were first measured",
    "crossed": "the one that is sooner at first does not get as low as the other",
}
"""Pairs of which neither can be called faster."""


def _kind(arm: Curve, against: Curve) -> Kind:
    """What the ratio of a pair is worth: `ours`, `theirs`: that one was there before it was first measured, so it is a bound."""
    ours, theirs = (curve.losses[0] <= _level(arm, against) for curve in (arm, against))
    if ours and theirs:
        return "both"
    if _crossed(arm, against):
        return "crossed"
    return "ours" if ours else "theirs" if theirs else "told"


@dataclass(frozen=True)
class Verdict:
    """An arm against another: the geometric mean of the speed-ups over seeds, its 95 % interval (None for one seed), and words.

    bound: the speed-up is only the least that it can be (below 1: the most), and has no interval.
    """

    arm: str
    against: str
    speedup: float
    low: float | None
    high: float | None
    seeds: int
    text: str
    bound: bool = False


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean over seeds and Student's 95 % interval; NaN ends for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    return Estimate.around(mean, float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1)


def compare_curves(arm: str, curves: Sequence[Curve], against: str, others: Sequence[Curve], unit: Unit = "seconds") -> Verdict:
    """The verdict on curves of the same seeds, in the same order: pairs share what a seed decides, and differ by the arm alone."""
    ratios = [speed_up(ours, theirs) for ours, theirs in zip(curves, others, strict=True)]
    if not all(map(math.isfinite, ratios)):
        lost = [name for name, seeds in ((arm, curves), (against, others)) if not all(math.isfinite(x) for c in seeds for x in c.losses)]
        text = f"no verdict on {arm} and {against}: a loss of {' and of '.join(lost)} is not a number; it diverged"
        return Verdict(arm, against, math.nan, None, None, len(ratios), text)
    mean, low, high = (math.exp(value) for value in over_seeds([math.log(ratio) for ratio in ratios]))
    count, kinds = len(ratios), Counter(_kind(*pair) for pair in zip(curves, others, strict=True))
    even = [f"{words}{_of(kinds[kind], count)}" for kind, words in EVEN.items() if kinds[kind]]
    if kinds["both"] + kinds["crossed"] == count:
        return Verdict(arm, against, 1.0, None, None, count, f"neither of {arm} and {against} is faster: {'; '.join(even)}")
    more = "".join(f"; {words}, which counts as no speed-up" for words in even)
    hint = " (one seed, so no interval: take it for no more than a hint, and repeat with --seeds 3)" if count < 2 else ""
    if bounds := kinds["ours"] + kinds["theirs"]:
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        text = f"no difference shown: the speed-ups of the seeds are {each}, some of them bounds"
        if (min(ratios) >= MARGIN and not kinds["theirs"]) or (max(ratios) <= 1 / MARGIN and not kinds["ours"]):
            words = _reaches(arm, against, mean, "at least ", SOONER[unit])
            text = f"{words}, for it was there before it was first measured{_of(bounds, count)}: a bound, without an interval"
        return Verdict(arm, against, mean, None, None, count, text + hint + more, bound=True)
    words = _reaches(arm, against, mean, "", SOONER[unit])
    if count < 2:
        return Verdict(arm, against, mean, None, None, 1, words + hint)
    forth, back = (f"95 % interval {a:.2f} to {b:.2f}, {count} seeds" for a, b in ((low, high), (1 / high, 1 / low)))
    if low > 1 and mean >= MARGIN:
        text = f"{arm}: reaches {against}'s best held-out loss {mean:.2f}x {SOONER[unit]} ({forth})"
    elif high < 1 and mean <= 1 / MARGIN:
        text = f"no gain here: {words} ({back})"
    elif low > 1 / MARGIN and high < MARGIN:
        text = f"no difference: {arm} and {against} are as fast, to {MARGIN - 1:.0%} (speed-up {mean:.2f}, {forth})"
    else:
        text = f"no difference shown: {words} ({forth if mean >= 1 else back}); more seeds or a longer budget may tell"
    return Verdict(arm, against, mean, low, high, count, text + more)


def _of(some: int, count: int) -> str:
    """Of how many seeds something is, where there are several."""
    return "" if count == 1 else f" in {some} of {count} seeds"


def _reaches(arm: str, against: str, mean: float, least: str, sooner: str) -> str:
    first, second = (arm, against) if mean >= 1 else (against, arm)
    digits = ".3g" if least else ".2f"  # a bound is known less well
    return f"{first} reaches {second}'s best held-out loss {least}{max(mean, 1 / mean):{digits}}x {sooner}"
