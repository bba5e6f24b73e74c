from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskdm.evaluation
from maskdm.engine import Ranks
from maskdm.errors import UserError
from maskdm.evaluation import (
    Evaluation,
    Extractor,
    FeatureNetwork,
    ImageSet,
    Statistics,
    Subject,
    digest,
    evaluate_samples,
    frechet_distance,
    train_self,
)
from maskdm.runs.evaluate import summary

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


def image_set(images: Tensor, key: str, labels: Tensor | None = None) -> ImageSet:
    pixels = images.permute(0, 2, 3, 1).numpy()
    return ImageSet(
        pixels, np.arange(len(pixels)), digest(key, pixels.ravel().astype(np.int64)), None if labels is None else labels.numpy()
    )


@pytest.fixture(scope="module")
def extractor(network: FeatureNetwork, tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    return Extractor(network, tmp_path_factory.mktemp("features"), Ranks())


NAMES = tuple("0123456789")


def evaluate(extractor: Extractor, digits: Digits, samples: Tensor, labels: Tensor | None = None, **options: Any) -> Evaluation:
    train, train_labels, rest, rest_labels = digits
    heldout = image_set(rest[:359], "heldout", rest_labels[:359])
    subject = Subject(image_set(samples, "samples", labels), image_set(train, "train", train_labels), heldout, NAMES)
    return evaluate_samples(extractor, subject, {"seed": 7}, **options)


def number(found: Evaluation, key: str) -> float:
    value = found.measures[key]
    assert isinstance(value, float)
    return value


def copies(found: Evaluation) -> dict[str, Any]:
    value = found.measures["copies"]
    assert isinstance(value, dict)
    return value


def test_perfect_samples_measure_as_held_out_images_do(extractor: Extractor, digits: Digits) -> None:
    found = evaluate(extractor, digits, digits[2][359:], digits[3][359:])
    assert number(found, "class_accuracy") > 0.95
    assert number(found, "frechet_distance") == pytest.approx(number(found, "frechet_distance_matched"), rel=1e-9)
    assert 0.6 < number(found, "frechet_distance") / number(found, "frechet_distance_heldout") < 1.6
    assert 0.6 < copies(found)["features_ratio"] < 1.6
    assert 0.9 < copies(found)["pixels_ratio"] < 1.1
    assert copies(found)["share"] < 0.02
    for name in ("precision", "recall", "coverage"):
        assert abs(number(found, name) - number(found, f"{name}_heldout")) < 0.1
    low, high = found.measures["kernel_distance_interval"]  # type: ignore[misc]
    assert low < 0.02 and high > -0.02
    said = " ".join(found.measures["verdicts"])  # type: ignore[arg-type]
    assert "No sign of copying" in said and "Colours and contrast are those" in said and "Variety" not in said


def bad_samples(real: Tensor, labels: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8, generator=generator)
    blurred = F.avg_pool2d(real.float(), 3, stride=1, padding=1).round().to(torch.uint8)
    return {"noise": noise, "blurred": blurred, "dropped": real[labels < 5], "inverted": 255 - real}


@pytest.mark.parametrize("name", ["noise", "blurred", "dropped", "inverted"])
def test_bad_samples_are_farther_than_held_out_images(extractor: Extractor, digits: Digits, name: str) -> None:
    found = evaluate(extractor, digits, bad_samples(digits[2][359:], digits[3][359:])[name])
    assert number(found, "frechet_distance") > 4 * number(found, "frechet_distance_heldout")
    assert number(found, "frechet_distance_matched") > 4 * number(found, "frechet_distance_heldout")
    error = number(found, "kernel_distance_standard_error")
    assert number(found, "kernel_distance") - number(found, "kernel_distance_heldout") > 4 * error
    worse = "recall" if name == "dropped" else "precision"
    assert number(found, worse) < number(found, f"{worse}_heldout") - 0.1
    said = " ".join(found.measures["verdicts"])  # type: ignore[arg-type]
    assert "farther from the training images" in said
    assert ("Variety is lacking" in said) or name != "dropped"


def test_copies_are_suspected_named_and_called_by_their_name(extractor: Extractor, digits: Digits) -> None:
    found = evaluate(extractor, digits, digits[0][40:140], digits[1][40:140])
    assert copies(found)["share"] == 1
    assert copies(found)["heldout_share"] < 0.05
    assert copies(found)["pixels_ratio"] == pytest.approx(0, abs=1e-5)
    assert [pair.training for pair in found.neighbours] == list(range(40, 56))
    assert all(pair.training == pair.sample + 40 for pair in found.worst)
    assert copies(found)["worst"][0]["name"].startswith("#")
    assert "It copies: 100.0 %" in found.measures["verdicts"][0]  # type: ignore[index]


def test_accuracy_is_of_the_class_requested_and_a_second_judge_agrees(extractor: Extractor, digits: Digits) -> None:
    from sklearn.svm import SVC

    train, train_labels, rest, labels = digits
    samples, right = rest[359:], labels[359:]
    half = right.clone()
    half[::2] = (half[::2] + 1) % 10
    second = SVC(C=10).fit(train.flatten(1).numpy(), train_labels.numpy())
    judged = torch.from_numpy(second.predict(samples.flatten(1).numpy()))
    for requested in (right, half):
        found = evaluate(extractor, digits, samples, requested)
        assert number(found, "class_accuracy") == pytest.approx(float((judged == requested).double().mean()), abs=0.03)
        classes: Any = found.measures["classes"]
        assert sum(row["num_samples"] for row in classes) == 359
        weighted = sum(row["class_accuracy"] * row["num_samples"] for row in classes) / 359
        assert weighted == pytest.approx(number(found, "class_accuracy"))


def test_a_network_of_other_classes_is_no_judge(extractor: Extractor, digits: Digits) -> None:
    train, train_labels, rest, labels = digits
    other = (train_labels * 3 + 1) % 10  # as many classes, in another order
    subject = Subject(image_set(rest[359:], "s", labels[359:]), image_set(train, "t", other), None, NAMES)
    found: Any = evaluate_samples(extractor, subject, {}).measures
    assert [key for key in found if key.startswith("class_accuracy")] == ["class_accuracy_left_out"]
    assert found["class_accuracy_left_out"] in found["verdicts"]
    assert all("kernel_distance" in row and "class_accuracy" not in row for row in found["classes"])


def test_two_classes_have_an_accuracy_too(digits: Digits, tmp_path: Path) -> None:
    train, train_labels, rest, labels = (part[:300] for part in digits)
    network = train_self(train, train_labels % 2, rest, labels % 2, seed=0, max_seconds=600.0, steps=60)
    subject = Subject(image_set(rest, "s", labels % 2), image_set(train, "t", train_labels % 2), None, ("even", "odd"))
    found: Any = evaluate_samples(Extractor(network, tmp_path, Ranks()), subject, {}).measures
    assert found["class_accuracy"] > 0.85
    assert "class_accuracy_left_out" not in found


def test_every_image_is_put_in_a_class_once(extractor: Extractor, digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    true = FeatureNetwork.predict

    def counted(network: FeatureNetwork, images: Any, batch: int | None = None) -> Any:
        seen.append(len(images))
        return true(network, images, batch)

    monkeypatch.setattr(FeatureNetwork, "predict", counted)
    fresh = Extractor(extractor.network, extractor.folder / "fresh", Ranks())
    first = evaluate(fresh, digits, digits[2][359:], digits[3][359:]).measures
    assert sum(seen) == len(digits[0]) + 359 + 359
    assert evaluate(fresh, digits, digits[2][359:], digits[3][359:]).measures == first
    assert sum(seen) == len(digits[0]) + 359 + 359


def test_a_class_that_went_wrong_stands_out(extractor: Extractor, digits: Digits) -> None:
    samples, labels = digits[2][359:].clone(), digits[3][359:]
    samples[labels == 3] = samples[labels == 3].flip(-2)
    rows: Any = evaluate(extractor, digits, samples, labels).measures["classes"]
    worst = max(rows, key=lambda row: row["kernel_distance"])
    assert worst["name"] == "3"
    assert worst["kernel_distance_interval"][0] > 0


def test_counts_keys_and_provenance_are_ready_for_json(extractor: Extractor, digits: Digits) -> None:
    train, train_labels, rest, _ = digits
    subject = Subject(image_set(rest[359:], "s"), image_set(train, "t", train_labels), image_set(rest[:100], "h"), NAMES)
    found = evaluate_samples(extractor, subject, {"steps": 50}, 300)
    written = json.loads(json.dumps(found.measures, allow_nan=False))
    assert (written["num_samples"], written["num_reference"], written["num_heldout"]) == (359, 300, 100)
    assert written["reference"] == "300 of 1079 training images, drawn with seed 0"
    assert written["headline"] == "kernel_distance"
    assert "class_accuracy" not in written and "class_accuracy_heldout" not in written and "denoising" not in written
    assert written["class_accuracy_train"] > 0.95
    assert written["frechet_distance_matched"] > written["frechet_distance"]  # fewer images, more bias
    assert written["frechet_distance_halves_count"] == 150
    assert written["kernel_distance_counts"] == [359, 300]
    assert written["manifold_counts"] == [100, 300]
    assert written["features"] == extractor.network.provenance()
    assert written["provenance"] == {"steps": 50}
    assert "fid" not in json.dumps(written).lower()
    assert any("two disjoint parts of the real images, 150 each" in line for line in summary(written))
    assert len(found.neighbours) == len(found.worst) == 16
    for key, value in written.items():
        if f"{key}_interval" in written:
            low, high = written[f"{key}_interval"]
            assert low <= value <= high
    assert {"frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"} <= {
        key.removesuffix("_interval") for key in written if key.endswith("_interval")
    }


def test_samples_are_compared_with_another_reference_and_copies_sought_among_the_training_images(
    extractor: Extractor, digits: Digits
) -> None:
    """A network that repeats its 100 training images is not near to 979 others for it, and is found out."""
    train, _, rest, _ = digits
    few, others, heldout = image_set(train[:100], "few"), image_set(train[100:], "others"), image_set(rest[:359], "heldout")
    samples = image_set(train[:100].repeat(3, 1, 1, 1), "repeated")
    against_few = evaluate_samples(extractor, Subject(samples, few, heldout), {})
    found = evaluate_samples(extractor, Subject(samples, few, heldout, reference=others), {})
    assert found.measures["reference"] == "979 of 979 images not trained on"
    assert copies(found)["share"] == copies(against_few)["share"] == 1
    assert number(against_few, "frechet_distance") == pytest.approx(0, abs=1e-2) and number(found, "frechet_distance") > 0.1
    assert max(pair.training for pair in found.neighbours) < 100
    drawn = evaluate_samples(extractor, Subject(samples, few, heldout, reference=others), {}, 50)
    assert drawn.measures["reference"] == "50 of 979 images not trained on, drawn with seed 0" and copies(drawn)["share"] == 1


def test_neighbours_in_a_drawn_reference_are_places_of_the_whole_training_set(extractor: Extractor, digits: Digits) -> None:
    found = evaluate(extractor, digits, digits[0], max_reference=200)
    drawn = np.sort(np.random.default_rng(0).choice(len(digits[0]), 200, replace=False))
    assert {pair.training for pair in found.neighbours} <= set(drawn.tolist())
    assert max(pair.training for pair in found.neighbours) >= 200
    assert copies(found)["share"] == 1  # pixels are searched among all training images


def test_without_held_out_images_what_needs_them_is_absent(extractor: Extractor, digits: Digits) -> None:
    train, train_labels, rest, _ = digits
    subject = Subject(image_set(rest[359:], "s"), image_set(train, "t", train_labels), None)
    found = evaluate_samples(extractor, subject, {}).measures
    assert not [key for key in found if "heldout" in key and key != "num_heldout"]
    assert found["num_heldout"] == 0
    assert found["classes"] == []


def test_more_held_out_images_than_samples_are_matched_the_other_way(extractor: Extractor, digits: Digits) -> None:
    found = evaluate(extractor, digits, digits[2][359:459])
    assert found.measures["num_heldout"] == 100
    assert number(found, "frechet_distance") == pytest.approx(number(found, "frechet_distance_matched"), rel=1e-9)
    drawn = np.sort(np.random.default_rng(0).choice(359, 100, replace=False))
    network = extractor.network
    few, train = (Statistics.of(network.features(images)) for images in (digits[2][:359][torch.from_numpy(drawn)], digits[0]))
    assert number(found, "frechet_distance_heldout") == pytest.approx(frechet_distance(few, train), rel=1e-4)


def test_features_are_kept_by_network_and_content(extractor: Extractor, digits: Digits) -> None:
    kept = set(extractor.folder.iterdir())
    evaluate(extractor, digits, digits[2][359:459])
    assert set(extractor.folder.iterdir()) == kept
    evaluate(extractor, digits, digits[2][360:460])
    assert len(set(extractor.folder.iterdir()) - kept) == 2  # the samples and their mirror images


def test_too_few_images_are_refused(extractor: Extractor, digits: Digits) -> None:
    with pytest.raises(UserError, match="at least 10 samples, here 9"):
        evaluate(extractor, digits, digits[2][:9])


def test_public_names() -> None:
    assert maskdm.evaluation.__all__ == sorted(maskdm.evaluation.__all__)
    assert all(hasattr(maskdm.evaluation, name) for name in maskdm.evaluation.__all__)
