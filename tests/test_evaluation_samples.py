from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskdm.evaluation
from maskdm.errors import UserError
from maskdm.evaluation import Evaluation, FeatureNetwork, Statistics, evaluate_samples, frechet_distance, train_self

Digits = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Digits:
    from sklearn.datasets import load_digits

    pixels, classes = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = np.random.default_rng(1).permutation(len(classes))
    images = torch.from_numpy((pixels[order] * (255 / 16)).round().astype(np.uint8)).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(classes[order]).long()
    # the middle part plays a perfect model: real images that neither training nor held-out set contains
    return images[718:], labels[718:], images[:718], labels[:718]


@pytest.fixture(scope="module")
def network(digits: Digits) -> FeatureNetwork:
    train, labels, rest, rest_labels = digits
    return train_self(train, labels, rest[:359], rest_labels[:359], seed=0, max_seconds=600.0, steps=120)


def evaluate(network: FeatureNetwork, digits: Digits, samples: Tensor, labels: Tensor | None = None) -> Evaluation:
    train, train_labels, rest, rest_labels = digits
    return evaluate_samples(network, samples, labels, train, train_labels, rest[:359], rest_labels[:359], {"seed": 7})


def number(found: Evaluation, key: str) -> float:
    value = found.measures[key]
    if isinstance(value, dict):
        value = value["value"]
    assert isinstance(value, float)
    return value


def neighbours(found: Evaluation) -> dict[str, float]:
    value = found.measures["nearest_train"]
    assert isinstance(value, dict)
    return value


def test_perfect_samples_measure_as_held_out_images_do(network: FeatureNetwork, digits: Digits) -> None:
    found = evaluate(network, digits, digits[2][359:], digits[3][359:])
    assert number(found, "class_accuracy") > 0.95
    assert number(found, "frechet_distance") == number(found, "frechet_distance_matched")
    assert 0.6 < number(found, "frechet_distance") / number(found, "frechet_distance_heldout") < 1.6
    assert 0.6 < neighbours(found)["features_ratio"] < 1.6
    assert 0.9 < neighbours(found)["pixels_ratio"] < 1.1
    assert abs(number(found, "precision") - number(found, "precision_heldout")) < 0.1
    assert abs(number(found, "recall") - number(found, "recall_heldout")) < 0.1


def bad_samples(real: Tensor, labels: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8, generator=generator)
    blurred = F.avg_pool2d(real.float(), 3, stride=1, padding=1).round().to(torch.uint8)
    return {"noise": noise, "blurred": blurred, "dropped": real[labels < 5], "inverted": 255 - real}


@pytest.mark.parametrize("name", ["noise", "blurred", "dropped", "inverted"])
def test_bad_samples_are_farther_than_held_out_images(network: FeatureNetwork, digits: Digits, name: str) -> None:
    found = evaluate(network, digits, bad_samples(digits[2][359:], digits[3][359:])[name])
    assert number(found, "frechet_distance") > 4 * number(found, "frechet_distance_heldout")
    assert number(found, "frechet_distance_matched") > 4 * number(found, "frechet_distance_heldout")
    error = found.measures["kernel_distance"]
    assert isinstance(error, dict)
    assert number(found, "kernel_distance") - number(found, "kernel_distance_heldout") > 4 * error["standard_error"]
    worse = "recall" if name == "dropped" else "precision"
    assert number(found, worse) < number(found, f"{worse}_heldout") - 0.1


def test_copies_are_at_distance_zero_and_named(network: FeatureNetwork, digits: Digits) -> None:
    found = evaluate(network, digits, digits[0][40:140], digits[1][40:140])
    for key in ("features_samples", "features_ratio", "pixels_samples", "pixels_ratio"):
        assert neighbours(found)[key] == pytest.approx(0, abs=1e-5)
    assert neighbours(found)["pixels_heldout"] > 5
    assert found.nearest_indices.tolist() == list(range(40, 56))


def test_pixel_distances_are_root_mean_squares_of_gray_levels(network: FeatureNetwork, digits: Digits) -> None:
    dimmed = (digits[0][:50].float() + 3).clamp(max=255).to(torch.uint8)
    assert 1.5 < neighbours(evaluate(network, digits, dimmed))["pixels_samples"] <= 3


def test_accuracy_is_of_the_class_requested_and_a_second_judge_agrees(network: FeatureNetwork, digits: Digits) -> None:
    from sklearn.svm import SVC

    train, train_labels, rest, labels = digits
    samples, right = rest[359:], labels[359:]
    half = right.clone()
    half[::2] = (half[::2] + 1) % 10
    second = SVC(C=10).fit(train.flatten(1).numpy(), train_labels.numpy())
    judged = torch.from_numpy(second.predict(samples.flatten(1).numpy()))
    for requested in (right, half):
        found = number(evaluate(network, digits, samples, requested), "class_accuracy")
        assert found == pytest.approx(float((judged == requested).double().mean()), abs=0.03)


def test_counts_keys_and_provenance_are_ready_for_json(network: FeatureNetwork, digits: Digits) -> None:
    train, train_labels, rest, _ = digits
    found = evaluate_samples(
        network, rest[359:].numpy(), None, train.numpy(), train_labels.numpy(), rest[:100].numpy(), None, {"steps": 50}, 300
    )
    written = json.loads(json.dumps(found.measures, allow_nan=False))
    assert (written["num_samples"], written["num_reference"], written["num_heldout"]) == (359, 300, 100)
    assert written["reference"] == "300 of 1079 training images, drawn with seed 0"
    assert written["class_accuracy"] is None
    assert written["class_accuracy_heldout"] is None
    assert written["class_accuracy_train"] > 0.95
    assert written["frechet_distance_matched"] > written["frechet_distance"]  # fewer images, more bias
    assert written["features"] == network.provenance()
    assert written["provenance"] == {"steps": 50}
    assert "fid" not in json.dumps(written).lower()
    assert len(found.nearest_indices) == 16


def test_indices_of_a_drawn_reference_are_of_the_whole_training_set(network: FeatureNetwork, digits: Digits) -> None:
    train, train_labels, rest, _ = digits
    found = evaluate_samples(network, train, None, train, train_labels, rest[:20], None, {}, max_reference=200)
    drawn = np.sort(np.random.default_rng(0).choice(len(train), 200, replace=False))
    assert set(found.nearest_indices.tolist()) <= set(drawn.tolist())
    assert max(found.nearest_indices.tolist()) >= 200


def test_without_held_out_images_what_needs_them_is_none(network: FeatureNetwork, digits: Digits) -> None:
    train, train_labels, rest, _ = digits
    found = evaluate_samples(network, rest[359:], None, train, train_labels, rest[:0], None, {}).measures
    empty = [key for key, value in found.items() if value is None]
    assert empty == [
        "class_accuracy",
        "class_accuracy_heldout",
        "frechet_distance_matched",
        "frechet_distance_heldout",
        "kernel_distance_heldout",
        "precision_heldout",
        "recall_heldout",
    ]
    assert found["num_heldout"] == 0


def test_more_held_out_images_than_samples_are_matched_the_other_way(network: FeatureNetwork, digits: Digits) -> None:
    found = evaluate(network, digits, digits[2][359:459])
    assert found.measures["num_heldout"] == 100
    assert number(found, "frechet_distance") == number(found, "frechet_distance_matched")
    drawn = np.sort(np.random.default_rng(0).choice(359, 100, replace=False))
    few, train = (Statistics.of(network.features(images)) for images in (digits[2][:359][torch.from_numpy(drawn)], digits[0]))
    assert number(found, "frechet_distance_heldout") == pytest.approx(frechet_distance(few, train), rel=1e-4)


def test_too_few_images_are_refused(network: FeatureNetwork, digits: Digits) -> None:
    with pytest.raises(UserError, match="at least 10 samples, here 9"):
        evaluate(network, digits, digits[2][:9])


def test_public_names() -> None:
    assert maskdm.evaluation.__all__ == sorted(maskdm.evaluation.__all__)
    assert all(hasattr(maskdm.evaluation, name) for name in maskdm.evaluation.__all__)
