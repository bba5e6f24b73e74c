"""What the figures of an evaluation say, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from maskdm.evaluation.intervals import Estimate, difference_of_shares

_RECOGNISED = (
    (-0.02, "more typical of their class than"),
    (0.02, "as recognisable as"),
    (0.1, "a little less recognisable than"),
    (math.inf, "clearly less recognisable than"),
)
APART = 1.5
"""Ratio of Frechet distances, at equal counts, above which samples are called farther than new real images."""

_FARTHER = "farther from {} than"
_APART = (
    (1.1, "as close to {} as"),
    (APART, "nearly as close to {} as"),
    (5.0, f"visibly {_FARTHER}"),
    (math.inf, f"much {_FARTHER}"),
)
TELLING = 2
"""Images a dimension from which that ratio is graded. Fewer, and the bias of the count, the same above and below, hides bad samples:
normal sets of 128 dimensions, one moved by 11.5, have a ratio of 1.06 at 0.16 images a dimension, 1.3 at 1 and 1.6 at 2."""

OVERFITTING = 0.03
"""A held-out loss larger than the training loss by this share of it, interval and all, is called overfitting."""

COPYING = 0.005
"""Copies beyond what held-out images show, interval and all, are called copying above this share."""


Verdict = tuple[bool, str]
"""Whether it is bad news, and the sentence."""


def verdicts(measures: Mapping[str, Any], called: str = "training images", among: str = "the training images") -> list[str]:
    """Sentences about the measures of `evaluate_samples`, the gravest first.

    called: the images among which copies were sought. among: those that samples were compared with.
    """
    found = [_copies(measures, called), _overfitting(measures), _distance(measures, among), _accuracy(measures), _variety(measures)]
    colour = measures.get("colour")
    found.append((colour["drift"], colour["verdict"]) if colour else None)
    said = sorted((each for each in found if each is not None), key=lambda each: not each[0])
    few = [f"Only {measures['num_samples']} samples were measured: take the figures as rough."] if measures["num_samples"] < 1000 else []
    left_out = [measures["class_accuracy_left_out"]] if "class_accuracy_left_out" in measures else []
    return [sentence for _, sentence in said] + left_out + few


def _grade(value: float, grades: tuple[tuple[float, str], ...]) -> str:
    """The words of the first limit that the value does not exceed."""
    return next(words for limit, words in grades if value <= limit)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %" if value < 0.1 else f"{100 * value:.1f} %"


def _estimate(measures: Mapping[str, Any], key: str) -> Estimate | None:
    value = measures.get(key)
    return None if value is None else Estimate(value, *measures[f"{key}_interval"])


def _between(found: Estimate) -> str:
    return f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"


def _copies(measures: Mapping[str, Any], called: str) -> Verdict:
    copies = measures["copies"]
    ours, new = _estimate(copies, "share"), _estimate(copies, "heldout_share")
    assert ours is not None
    shown = f"{_percent(ours.value)} of the samples (95 % interval {_percent(ours.low)} to {_percent(ours.high)})"
    if ours.value == 0:
        return False, f"No sign of copying: none of {copies['num_samples']} samples is a near-copy of one of the {called}."
    if new is None:
        return ours.low > COPYING, f"{shown} look like near-copies of {called}; without held-out images this cannot be told from chance."
    calibration = f"of new real images {_percent(new.value)} look so"
    if difference_of_shares(ours, new).low > COPYING:
        return True, f"It copies: {shown} are near-copies of {called}; {calibration}."
    return False, f"No sign of copying beyond chance: {shown} look like {called}; {calibration}."


def _overfitting(measures: Mapping[str, Any]) -> Verdict | None:
    denoising = measures.get("denoising")
    if not denoising:
        return None
    low, train = denoising["gap_interval"][0], denoising["train"]
    shown = f"the denoising loss is {denoising['train']:.4g} on training images and {denoising['heldout']:.4g} on held-out ones"
    if low > OVERFITTING * train:
        return True, f"It overfits: {shown}."
    return False, f"No overfitting to speak of: {shown}."


def _distance(measures: Mapping[str, Any], among: str) -> Verdict | None:
    distance, floor = measures.get("frechet_distance_matched"), measures.get("frechet_distance_heldout")
    ours, new = _estimate(measures, "kernel_distance"), _estimate(measures, "kernel_distance_heldout")
    if not distance or not floor or ours is None or new is None:
        return None
    ratio, matched = distance / floor, min(measures["num_samples"], measures["num_heldout"])
    telling = matched >= TELLING * measures["features"]["dimensions"]
    if measures["headline"] == "kernel_distance" or not telling:
        kernel = f"kernel distance {_between(ours)}, that of new real images {_between(new)}"
        if ours.low > max(new.high, 0.0):  # held out by class, new real images may be below 0: nearer than chance would have it
            words = _grade(ratio, _APART) if telling and ratio > APART else _FARTHER
            return True, f"Samples are {words.format(among)} new real images: {kernel}."
        if not telling:
            return False, f"Samples are not seen to be {_FARTHER.format(among)} new real images, which are few: {kernel}."
        if ratio > APART:
            return (
                False,
                f"The kernel distance does not tell samples from real images ({_between(ours)}); their Frechet distance at equal counts is "
                f"{ratio:.1f} times that of new real images.",
            )
    words = _grade(ratio, _APART).format(among)
    return ratio > APART, f"Samples are {words} new real images: {ratio:.2g} times the Frechet distance at equal counts."


def _accuracy(measures: Mapping[str, Any]) -> Verdict | None:
    ours, real = _estimate(measures, "class_accuracy"), _estimate(measures, "class_accuracy_heldout")
    if ours is None or real is None:
        return None
    less = difference_of_shares(real, ours)
    certain = max(less.low, min(less.high, 0.0))  # the least difference in the interval, 0 where that holds it
    shares = f"a classifier is right on {_percent(ours.value)} of them, and on {_percent(real.value)} of held-out images"
    return certain > 0.02, f"Samples are {_grade(certain, _RECOGNISED)} real images: {shares}."


def _variety(measures: Mapping[str, Any]) -> Verdict | None:
    ours, real = _estimate(measures, "coverage"), _estimate(measures, "coverage_heldout")
    if ours is None or real is None:
        return None
    missing = difference_of_shares(real, ours)
    if missing.low > 0.05:
        reached = f"samples come near {_percent(ours.value)} of the real images, new real images near {_percent(real.value)}"
        return True, f"Variety is lacking: {reached}."
    return None
