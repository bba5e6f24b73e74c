"""Samples measured against real images, with held-out real images measured the same way beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.distances import Statistics, frechet_distance, kernel_distance, precision_recall
from maskdm.evaluation.features import FeatureNetwork, Images, Labels, label_tensor, take
from maskdm.evaluation.neighbours import nearest
from maskdm.evaluation.training import accuracy_of

LEAST = 10
"""Fewest samples, training images and, unless there are none, held-out images."""

MAX_REFERENCE = 20_000
SHOWN = 16
_SEED = 0
_PIXELS = 32


@dataclass(frozen=True)
class Evaluation:
    """`measures`, ready for JSON, and the index of the training image nearest, in features, to each of the first 16 samples."""

    measures: dict[str, object]
    nearest_indices: Int[Tensor, " _"]


@dataclass(frozen=True)
class _Side:
    """One set of images: features, and pixels at no more than 32 x 32, flat."""

    features: Float[Tensor, "_ _"]
    pixels: UInt8[Tensor, "_ _"]

    def some(self, rows: NDArray[np.int64]) -> _Side:
        chosen = torch.from_numpy(rows)
        return _Side(self.features[chosen], self.pixels[chosen])


def evaluate_samples(
    network: FeatureNetwork,
    samples: Images,
    requested_labels: Labels | None,
    train_images: Images,
    train_labels: Labels | None,
    heldout_images: Images,
    heldout_labels: Labels | None,
    provenance: Mapping[str, object],
    max_reference: int = MAX_REFERENCE,
) -> Evaluation:
    """Measure samples, all [N, C, H, W] of one size, by a network trained on the same real images.

    Keys ending in `_heldout` hold the same measure of held-out real images: the value to reach. They are None without
    held-out images, as the accuracies are without labels. Frechet and precision / recall depend on counts:
    `frechet_distance` is of all samples; `frechet_distance_matched`, `precision` and `recall` are of as many samples as
    held-out images are measured (`num_heldout`, at most `num_samples`), drawn by a fixed seed. `kernel_distance` is unbiased.
    `nearest_train`: median distance to the nearest reference image, in features and in pixels (root mean square difference,
    0..255, at 32 pixels at most), and samples / held-out, which copying brings towards 0.
    The reference is the training images, or `max_reference` of them, drawn by a fixed seed. UserError below 10 images.
    """
    for name, images in (("samples", samples), ("training images", train_images), ("held-out images", heldout_images)):
        if len(images) < LEAST and not (images is heldout_images and not len(images)):
            raise UserError(f"an evaluation needs at least {LEAST} {name}, here {len(images)}; give more")
    reference_rows = _draw(len(train_images), max_reference)
    reference, fake = _side(network, take(train_images, reference_rows)), _side(network, samples)
    measures: dict[str, object] = {
        "num_samples": len(samples),
        "num_reference": len(reference_rows),
        "num_heldout": min(len(heldout_images), len(samples)),
        "reference": f"{len(reference_rows)} of {len(train_images)} training images" + _drawn(reference_rows, train_images),
        "class_accuracy": accuracy_of(network, samples, requested_labels),
        "class_accuracy_train": _accuracy(network, train_images, train_labels, reference_rows),
        "class_accuracy_heldout": accuracy_of(network, heldout_images, heldout_labels),
    }
    heldout = None
    if len(heldout_images):
        heldout = _side(network, take(heldout_images, _draw(len(heldout_images), len(samples))))
    measures |= _distances(reference, fake, heldout)
    found, measures["nearest_train"] = _nearest_train(reference, fake, heldout)
    measures |= {"features": network.provenance(), "provenance": dict(provenance)}
    return Evaluation(measures, torch.from_numpy(reference_rows)[found[:SHOWN]])


def _draw(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `count` indices, ascending."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(_SEED).choice(count, most, replace=False))


def _drawn(rows: NDArray[np.int64], images: Images) -> str:
    return f", drawn with seed {_SEED}" if len(rows) < len(images) else ""


def _accuracy(network: FeatureNetwork, images: Images, labels: Labels | None, rows: NDArray[np.int64]) -> float | None:
    return None if labels is None else accuracy_of(network, take(images, rows), label_tensor(labels)[torch.from_numpy(rows)])


def _side(network: FeatureNetwork, images: Images, batch: int = 1024) -> _Side:
    pixels = [_shrink(take(images, slice(first, first + batch))) for first in range(0, len(images), batch)]
    return _Side(network.features(images), torch.cat(pixels))


def _shrink(images: UInt8[Tensor, "n _ _ _"]) -> UInt8[Tensor, "n _"]:
    height, width = images.shape[2:]
    scale = min(1.0, _PIXELS / max(height, width))
    if scale < 1:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        images = F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)
    return images.flatten(1)


def _distances(reference: _Side, fake: _Side, heldout: _Side | None) -> dict[str, object]:
    matched = fake if heldout is None else fake.some(_draw(len(fake.features), len(heldout.features)))
    covered = precision_recall(reference.features, matched.features)
    found: dict[str, object] = {
        "frechet_distance": _frechet(fake, reference),
        "frechet_distance_matched": None,
        "frechet_distance_heldout": None,
        "kernel_distance": _kernel(fake, reference),
        "kernel_distance_heldout": None,
        "precision": covered.precision,
        "precision_heldout": None,
        "recall": covered.recall,
        "recall_heldout": None,
    }
    if heldout is not None:
        found["frechet_distance_matched"] = _frechet(matched, reference)
        found["frechet_distance_heldout"] = _frechet(heldout, reference)
        found["kernel_distance_heldout"] = _kernel(heldout, reference)
        found["precision_heldout"], found["recall_heldout"] = precision_recall(reference.features, heldout.features)
    return found


def _frechet(side: _Side, reference: _Side) -> float:
    return frechet_distance(Statistics.of(side.features), Statistics.of(reference.features))


def _kernel(side: _Side, reference: _Side) -> dict[str, float]:
    return kernel_distance(side.features, reference.features)._asdict()


def _nearest_train(reference: _Side, fake: _Side, heldout: _Side | None) -> tuple[Tensor, dict[str, float | None]]:
    """The nearest reference image of each sample, in features, and the medians."""
    by_features, by_pixels = nearest(fake.features, reference.features), nearest(fake.pixels, reference.pixels)
    per_value = fake.pixels.shape[1] ** 0.5
    medians: dict[str, float | None] = {
        "features_samples": float(by_features.distances.median()),
        "features_heldout": None,
        "features_ratio": None,
        "pixels_samples": float(by_pixels.distances.median()) / per_value,
        "pixels_heldout": None,
        "pixels_ratio": None,
    }
    if heldout is not None:
        features = float(nearest(heldout.features, reference.features).distances.median())
        pixels = float(nearest(heldout.pixels, reference.pixels).distances.median()) / per_value
        medians |= {"features_heldout": features, "features_ratio": _ratio(medians["features_samples"], features)}
        medians |= {"pixels_heldout": pixels, "pixels_ratio": _ratio(medians["pixels_samples"], pixels)}
    return by_features.indices[:, 0], medians


def _ratio(samples: float | None, heldout: float) -> float | None:
    """None where the held-out images are themselves copies of training images: there is nothing to compare with."""
    return None if samples is None or heldout == 0 else samples / heldout
