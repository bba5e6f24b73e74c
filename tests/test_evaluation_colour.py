from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from maskdm.evaluation import ImageSet, colour_drift


def pictures(seed: int, count: int = 400, channels: int = 3) -> np.ndarray:
    random = np.random.default_rng(seed)
    base = random.uniform(60, 180, (count, 1, 1, channels))
    return (base + random.normal(0, 30, (count, 8, 8, channels))).clip(0, 255).astype(np.uint8)


def images(pixels: np.ndarray) -> ImageSet:
    return ImageSet(pixels, np.arange(len(pixels)), "x")


def drifted(found: dict[str, Any]) -> set[str]:
    return {each["name"] for each in found["statistics"] if each["drift"]}


def test_new_draws_do_not_drift() -> None:
    for seed in range(1, 6):
        found = colour_drift(images(pictures(seed)), images(pictures(0)))
        assert not found["drift"]
        assert drifted(found) == set()
        assert "those of the real images" in str(found["verdict"])


CHANGES: dict[str, tuple[Any, set[str], str]] = {
    "red tint": (lambda x: np.concatenate([x[..., :1] + 20, x[..., 1:]], axis=-1), {"red"}, "more red by"),
    "less blue": (lambda x: np.concatenate([x[..., :2], x[..., 2:] - 20], axis=-1), {"blue"}, "less blue"),
    "brighter": (lambda x: x + 15, {"red", "green", "blue", "brightness"}, "brighter by"),
    "flat": (lambda x: 120 + 0.6 * (x - 120), {"contrast"}, "flatter"),
    "pale": (lambda x: 0.5 * x + 0.5 * x.mean(axis=-1, keepdims=True), {"saturation"}, "paler"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_drift_is_named_with_its_direction(name: str) -> None:
    change, expected, words = CHANGES[name]
    tinted = change(pictures(1).astype(float)).clip(0, 255).astype(np.uint8)
    found = colour_drift(images(tinted), images(pictures(0)))
    assert found["drift"]
    assert expected <= drifted(found)
    assert words in str(found["verdict"])


def test_one_step_of_255_is_no_drift_however_many_images() -> None:
    found = colour_drift(images(pictures(1, 5000) + 1), images(pictures(0, 5000)))
    assert not found["drift"]


def test_histograms_and_their_distance() -> None:
    ours, theirs = pictures(1) // 2 + 40, pictures(0)
    found: dict[str, Any] = colour_drift(images(ours), images(theirs))
    for c, each in enumerate(found["histogram_distance"]):
        expected = wasserstein_distance(ours[..., c].ravel(), theirs[..., c].ravel())
        assert each["samples"] == pytest.approx(expected, rel=1e-6)
        assert 0 < each["halves"] < each["samples"] / 4
    for each in found["histograms"]:
        assert len(each["samples"]) == len(each["real"]) == 32
        assert sum(each["real"]) == pytest.approx(1, abs=1e-3)


def test_gray_images_have_no_saturation() -> None:
    found: dict[str, Any] = colour_drift(images(pictures(1, channels=1)), images(pictures(0, channels=1)))
    assert [each["name"] for each in found["statistics"]] == ["gray", "contrast"]
