"""What is said of figures, above all where they cannot tell."""

from __future__ import annotations

from typing import Any

import pytest

from maskdm.evaluation.intervals import Estimate, share
from maskdm.evaluation.verdicts import verdicts


def put(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_interval": [estimate.low, estimate.high]}


def measures(copies: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    none_copied = {"num_samples": 1000, **put("share", share(0, 1000))}
    return {"num_samples": 1000, "headline": "kernel_distance", "copies": copies or none_copied, "features": {"dimensions": 128}} | more


def distances(heldout: int, frechet: tuple[float, float], ours: Estimate, new: Estimate, headline: str = "kernel_distance") -> list[str]:
    far = {"frechet_distance_matched": frechet[0], "frechet_distance_heldout": frechet[1]}
    kernel = put("kernel_distance", ours) | put("kernel_distance_heldout", new)
    found = verdicts(measures(**far, **kernel, num_heldout=heldout, headline=headline))
    return [each for each in found if "real images" in each]


NEAR, FAR, NEW = Estimate(0.02, 0.0, 0.04), Estimate(0.299, 0.289, 0.309), Estimate(0.01, -0.01, 0.03)


def test_few_held_out_images_do_not_make_bad_samples_good() -> None:
    # a Frechet distance of 20 images in 128 dimensions is all bias: 1.1 times whatever the samples are
    (said,) = distances(20, (110, 100), FAR, NEW)
    assert said == (
        "Samples are farther from the training images than new real images: "
        "kernel distance 0.299 (0.289 to 0.309), that of new real images 0.01 (-0.01 to 0.03)."
    )
    assert distances(20, (110, 100), FAR, NEW, headline="frechet_distance") == [said]


def test_samples_at_no_distance_are_not_called_far_where_new_images_are_below_it() -> None:
    # 359 digits held out by class are nearer to the others than independent ones would be: below 0, interval and all
    (said,) = distances(359, (1.57, 1), Estimate(-0.002, -0.008, 0.004), Estimate(-0.018, -0.025, -0.010))
    assert said.startswith("The kernel distance does not tell samples from real images (-0.002 (-0.008 to 0.004)); their Frechet")


def test_few_held_out_images_do_not_make_samples_good_either() -> None:
    for ratio in (1.0, 3.0):
        (said,) = distances(255, (ratio, 1), NEAR, NEW)
        assert said.startswith("Samples are not seen to be farther from the training images than new real images, which are few: kernel")


@pytest.mark.parametrize(
    ("ratio", "ours", "headline", "said"),
    [
        (1.05, NEAR, "kernel_distance", "Samples are as close to the training images as new real images: 1.1 times the Frechet"),
        (1.05, FAR, "kernel_distance", "Samples are farther from the training images than new real images: kernel distance 0.299"),
        (3.0, FAR, "kernel_distance", "Samples are visibly farther from the training images than new real images: kernel distance 0.299"),
        (3.0, NEAR, "kernel_distance", "The kernel distance does not tell samples from real images (0.02 (0 to 0.04)); their Frechet"),
        (3.0, NEAR, "frechet_distance", "Samples are visibly farther from the training images than new real images: 3 times"),
        (9.0, FAR, "frechet_distance", "Samples are much farther from the training images than new real images: 9 times"),
    ],
)
def test_with_enough_of_them_both_distances_are_heard(ratio: float, ours: Estimate, headline: str, said: str) -> None:
    assert distances(256, (ratio, 1), ours, NEW, headline)[0].startswith(said)


def test_copying_is_only_said_beside_held_out_images() -> None:
    ours = {"num_samples": 1000, **put("share", share(30, 1000))}
    assert verdicts(measures(ours), "real images")[0] == (
        "3 % of the samples (95 % interval 2.11 % to 4.25 %) look like near-copies of real images; "
        "without held-out images this cannot be told from chance."
    )
    said = verdicts(measures(ours | put("heldout_share", share(2, 1000))))[0]
    assert said.startswith("It copies: 3 %") and said.endswith("; of new real images 0.2 % look so.")
    assert verdicts(measures(ours | put("heldout_share", share(28, 1000))))[0].startswith("No sign of copying beyond chance: 3 %")
    assert verdicts(measures())[0].startswith("No sign of copying: none")


@pytest.mark.parametrize(
    ("ours", "real", "said"),
    [
        (share(36, 40), share(38, 40), "as recognisable as"),  # 5 % less, of 40
        (share(900, 1000), share(950, 1000), "a little less recognisable than"),
        (share(700, 1000), share(950, 1000), "clearly less recognisable than"),
        (share(990, 1000), share(900, 1000), "more typical of their class than"),
    ],
)
def test_accuracies_differ_where_their_intervals_say_so(ours: Estimate, real: Estimate, said: str) -> None:
    found = verdicts(measures(**put("class_accuracy", ours), **put("class_accuracy_heldout", real)))
    assert next(each for each in found if "recognis" in each or "typical" in each).startswith(f"Samples are {said} real images")
    assert ("less" in found[0]) == ("less" in said)  # bad news first


def test_variety_is_lacking_where_the_intervals_of_coverage_say_so() -> None:
    real = Estimate(0.6, 0.53, 0.67)
    for ours, lacking in ((Estimate(0.5, 0.43, 0.57), False), (Estimate(0.4, 0.33, 0.47), True)):
        found = verdicts(measures(**put("coverage", ours), **put("coverage_heldout", real)))
        assert ("Variety is lacking" in found[0]) == lacking


def test_an_accuracy_left_out_is_said() -> None:
    assert "Left out." in verdicts(measures(class_accuracy_left_out="Left out."))
