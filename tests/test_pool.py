"""Comparisons of several seeds, run apart, as one."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from benchmarks.pool import pooled
from maskdm.errors import UserError


def record(seed: int, gain: float) -> dict[str, Any]:
    """As compare.json has it: one seed of an arm, and of one that comes down `gain` times as fast."""

    def curve(speed: float) -> list[dict[str, Any]]:
        return [
            {"seconds": 60.0 * n, "flops": n, "images": n, "steps": 50 * n, "pieces": 1, "loss": 0.1 / (1 + speed * n)}
            for n in range(1, 21)
        ]

    final = {"denoising": {"heldout": 0.05}, "frechet_distance": 1.0 + seed, "stages": []}
    return {
        "budget": "20m",
        "data": "x",
        "data_hash": "1",
        "config": {"seed": 0},
        "unit": "seconds",
        "heldout_images": 256,
        "decaying": [],
        "seeds": 1,
        "first_seed": seed,
        "environment": {"machine": seed},
        "features": {"name": "onnx"},
        "arms": {"whole": {}, "masked": {}},
        "specs": {"whole": {"stages": 1}, "masked": {"stages": 2}},
        "networks": {},
        "flops": "of all",
        "finals": {"whole": [final], "masked": [final]},
        "curves": {"whole": [curve(1.0)], "masked": [curve(gain)]},
    }


def test_seeds_run_apart_are_one_comparison() -> None:
    contest, about = pooled([record(0, 1.5), record(2, 1.6), record(1, 1.4)])
    assert about["pooled_seeds"] == [0, 2, 1] and about["seeds"] == 3 and len(about["environments"]) == 3
    assert [len(contest.records[arm]) for arm in ("whole", "masked")] == [3, 3] and len(contest.curves("masked")) == 3
    assert [final["frechet_distance"] for final in contest.finals["whole"]] == [1.0, 3.0, 2.0]


def test_another_arm_than_the_first_may_be_what_others_are_compared_with() -> None:
    contest, _ = pooled([record(0, 1.5), record(1, 1.4)], "masked")
    assert list(contest.records) == list(contest.finals) == ["masked", "whole"]
    with pytest.raises(UserError, match="--against other is no arm of all of them; there are whole, masked"):
        pooled([record(0, 1.5), record(1, 1.4)], "other")


def test_distances_in_other_features_are_left_out() -> None:
    other = record(1, 1.4) | {"features": {"name": "self"}}
    contest, _ = pooled([record(0, 1.5), other])
    assert all("frechet_distance" not in final and "denoising" in final for final in contest.finals["masked"])


@pytest.mark.parametrize(("key", "value"), [("budget", "10m"), ("data_hash", "2"), ("config", {"seed": 1}), ("heldout_images", 32)])
def test_what_does_not_belong_together_is_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        pooled([record(0, 1.5), record(1, 1.5) | {key: value}])


def test_a_seed_counts_once() -> None:
    with pytest.raises(UserError, match="in common"):
        pooled([record(0, 1.5), record(0, 1.5)])
    without = copy.deepcopy(record(1, 1.5))
    without["specs"]["whole"] = {"stages": 3}
    with pytest.raises(UserError, match="arm whole is not the same"):
        pooled([record(0, 1.5), without])
    del without["flops"]
    with pytest.raises(UserError, match="differ in flops"):
        pooled([record(0, 1.5), without])
    without["arms"] = {"other": {}}
    with pytest.raises(UserError, match="no arm in common"):
        pooled([record(0, 1.5), without])
    with pytest.raises(UserError, match="pooled are not pooled again"):
        pooled([record(0, 1.5), {key: value for key, value in record(1, 1.5).items() if key != "first_seed"}])


def test_as_many_samples_are_measured_in_all() -> None:
    few, many = record(0, 1.5), record(1, 1.5)
    for each, num in ((few, 20), (many, 1000)):
        each["finals"]["whole"] = [each["finals"]["whole"][0] | {"asked": {"num": num, "features": f"onnx:{num}"}}]
    with pytest.raises(UserError, match="arm whole was not measured with as many samples"):
        pooled([few, many])


def test_a_seed_that_diverged_stays_so() -> None:
    diverged = record(1, 1.5)
    diverged["curves"]["masked"][0][5]["loss"] = None  # as JSON has it
    contest, about = pooled([record(0, 1.5), diverged])
    assert math.isnan(contest.curves("masked")[1].losses[5]) and about["seeds"] == 2
