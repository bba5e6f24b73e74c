"""Samples measured against real images, with held-out real images measured the same way beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.colour import colour_drift
from maskdm.evaluation.copies import THRESHOLD, Matches, Searcher
from maskdm.evaluation.frechet import Statistics, frechet_distance, frechet_halves, frechet_infinity, frechet_standard_error
from maskdm.evaluation.images import Extractor, ImageSet
from maskdm.evaluation.intervals import Estimate, bootstrap_median_ratio, share
from maskdm.evaluation.kernel import kernel_distance
from maskdm.evaluation.manifold import manifold
from maskdm.evaluation.verdicts import verdicts

LEAST = 10
"""Fewest samples, training images and, unless there are none, held-out images."""

FEW = 5000
"""Below as many samples the kernel distance is the one to look at: the bias of the Frechet distance would be most of it."""

MOST_MATCHED, MOST_MANIFOLD = 2000, 10_000
"""Samples searched for copies; images on each side of precision and recall, and of the Frechet distance's standard error: beyond, the
intervals are narrow enough."""

LEAST_OF_CLASS, MOST_CLASSES = 20, 200
SHOWN = 16


@dataclass(frozen=True)
class Subject:
    """What is measured: samples (their labels those asked for), training images, held-out images, and the names of the classes.

    reference: what samples are compared with, where not with the training images, which then are searched for copies alone.
    """

    samples: ImageSet
    training: ImageSet
    heldout: ImageSet | None
    class_names: Sequence[str] = ()
    called: str = "training images"
    """What the training images are to be called, where they are other real images."""
    reference: ImageSet | None = None


@dataclass(frozen=True)
class Pair:
    """A sample and a training image, by their places."""

    sample: int
    training: int


@dataclass(frozen=True)
class Evaluation:
    """`measures`, ready for JSON; the first samples with their nearest training images; the pairs most like copies."""

    measures: dict[str, object]
    neighbours: list[Pair]
    worst: list[Pair]


def evaluate_samples(
    extractor: Extractor,
    subject: Subject,
    provenance: Mapping[str, object],
    max_reference: int | None = None,
    denoising: Mapping[str, object] | None = None,
) -> Evaluation:
    """Measure samples against real images, all of one size. The keys and their meaning: docs/evaluation.md.

    `x_interval` is the 95 % interval of `x`; `x_counts`, how many samples and real images it is of. Keys ending in `_heldout` hold the
    same measure of held-out real images: the value to reach; absent without such images. The reference is the training images unless the
    subject names another, or `max_reference` of them, drawn by a fixed seed. Precision, recall, density, coverage and
    `frechet_distance_matched` are of as many samples as held-out images are measured (`num_heldout`), since they depend on counts.
    `denoising`, from `overfitting`, takes part in the verdicts. UserError below 10 images.
    """
    for name, images in (("samples", subject.samples), (subject.called, subject.training), ("held-out images", subject.heldout)):
        if images is not None and len(images) < LEAST:
            raise UserError(f"an evaluation needs at least {LEAST} {name}, here {len(images)}; give more")
    everything, called = subject.training, subject.called
    if subject.reference is not None:
        everything, called = subject.reference, "images not trained on"
    places, reference = _some_of(everything, max_reference)
    heldout = None if subject.heldout is None else subject.heldout.part(subject.heldout.places(len(subject.samples)))
    fake, real = extractor.features(subject.samples), extractor.features(reference)
    new = None if heldout is None else extractor.features(heldout)
    measures: dict[str, object] = {
        "num_samples": len(fake),
        "num_reference": len(real),
        "num_heldout": 0 if new is None else len(new),
        "reference": f"{len(real)} of {len(everything)} {called}" + (", drawn with seed 0" if len(real) < len(everything) else ""),
        "headline": "kernel_distance" if len(fake) < FEW else "frechet_distance",
    }
    measures |= _frechet(fake, real, new) | _kernel(fake, real, new) | _manifold(fake, real, new)
    if extractor.network.is_fid:
        measures["fid"] = measures["frechet_distance"]
    measures |= _accuracies(extractor, subject, reference, heldout)
    knows = "class_accuracy" in measures
    measures["classes"] = _classes(extractor if knows else None, subject, reference, fake, real)
    if subject.reference is not None:
        places, trained = _some_of(subject.training, max_reference)
        real = extractor.features(trained)
    found, measures["copies"] = _copies(extractor, subject, heldout, places, fake, real)
    measures["colour"] = colour_drift(subject.samples, reference)
    if denoising is not None:
        measures["denoising"] = dict(denoising)
    measures |= {"features": extractor.network.provenance(), "provenance": dict(provenance)}
    among = "the training images" if subject.reference is None else called
    measures["verdicts"] = verdicts(measures, subject.called, among)
    shown = [Pair(i, int(found.feature_places[i])) for i in range(min(SHOWN, len(found.feature_places)))]
    order = np.argsort(found.ratios, kind="stable")[:SHOWN].tolist()
    searched = subject.samples.places(MOST_MATCHED)
    return Evaluation(
        measures,
        [Pair(int(searched[pair.sample]), pair.training) for pair in shown],
        [Pair(int(searched[i]), found.place(i)) for i in order],
    )


def _some_of(images: ImageSet, most: int | None) -> tuple[NDArray[np.int64], ImageSet]:
    """The places of at most so many of the images, drawn by a fixed seed, and these; all of them for None."""
    places = images.places(len(images) if most is None else most)
    return places, images.part(places) if len(places) < len(images) else images


def _put(name: str, estimate: Estimate | None) -> dict[str, object]:
    """A value and its interval as two keys; nothing for None."""
    return {} if estimate is None else {name: estimate.value, f"{name}_interval": [estimate.low, estimate.high]}


def _subset(features: Tensor, most: int) -> Tensor:
    """At most `most` of the vectors, drawn by a fixed seed."""
    if len(features) <= most:
        return features
    return features[torch.from_numpy(np.sort(np.random.default_rng(0).choice(len(features), most, replace=False)))]


def _frechet(fake: Tensor, real: Tensor, heldout: Tensor | None) -> dict[str, object]:
    of_fake, of_real = Statistics.of(fake), Statistics.of(real)
    some_fake, some_real = _subset(fake, MOST_MANIFOLD), _subset(real, MOST_MANIFOLD)
    error = frechet_standard_error(some_fake, some_real, of_fake, of_real)
    estimate = Estimate.around(frechet_distance(of_fake, of_real), error)
    found = _put("frechet_distance", estimate._replace(low=max(0.0, estimate.low)))
    found |= _put("frechet_distance_infinity", frechet_infinity(fake, real, error))
    halves = frechet_halves(real, len(fake))
    if halves is not None:
        found |= {"frechet_distance_halves": halves[0], "frechet_distance_halves_count": halves[1]}
    if heldout is not None:
        found["frechet_distance_matched"] = frechet_distance(Statistics.of(_subset(fake, len(heldout))), of_real)
        found["frechet_distance_heldout"] = frechet_distance(Statistics.of(heldout), of_real)
    return found


def _kernel(fake: Tensor, real: Tensor, heldout: Tensor | None) -> dict[str, object]:
    distance = kernel_distance(fake, real)
    found = _put("kernel_distance", distance.estimate) | {"kernel_distance_standard_error": distance.standard_error}
    found["kernel_distance_counts"] = list(distance.counts)
    return found if heldout is None else found | _put("kernel_distance_heldout", kernel_distance(heldout, real).estimate)


def _manifold(fake: Tensor, real: Tensor, heldout: Tensor | None) -> dict[str, object]:
    some = _subset(real, MOST_MANIFOLD)
    most = min(MOST_MANIFOLD, len(fake) if heldout is None else len(heldout))
    found: dict[str, object] = {"manifold_counts": [most, len(some)]}
    for name, estimate in manifold(some, _subset(fake, most))._asdict().items():
        found |= _put(name, estimate)
    if heldout is not None:
        for name, estimate in manifold(some, _subset(heldout, most))._asdict().items():
            found |= _put(f"{name}_heldout", estimate)
    return found


def _accuracies(extractor: Extractor, subject: Subject, reference: ImageSet, heldout: ImageSet | None) -> dict[str, object]:
    """Share of the images in whose class the network puts them, where it knows these classes: a network that is hardly better than
    chance on the real images (less than twice, or than half-way from chance to perfection) knows others, if as many."""
    num = len(subject.class_names)
    known = _recognised(extractor, reference, num)
    if known is None:
        return {}
    real = share(int(known.sum()), len(known))
    if real.low < min(2 / num, (1 + 1 / num) / 2):
        why = (
            f"the feature network puts only {100 * real.value:.1f} % of the real images in their class ({100 / num:.3g} % would be chance)"
        )
        return {"class_accuracy_left_out": f"Class accuracy is left out: {why}."}
    found = _put("class_accuracy_train", real)
    for suffix, images in (("", subject.samples), ("_heldout", heldout)):
        right = None if images is None else _recognised(extractor, images, num)
        if right is not None:
            found |= _put(f"class_accuracy{suffix}", share(int(right.sum()), len(right)))
    return found


def _recognised(extractor: Extractor, images: ImageSet, num_classes: int) -> NDArray[np.bool_] | None:
    """Of each image [n] whether the network puts it in its class; None where it has no classes or knows others."""
    if images.labels is None or num_classes < 2 or extractor.network.num_classes != num_classes:
        return None
    predicted = extractor.classes(images)
    return None if predicted is None else predicted == images.labels


def _classes(extractor: Extractor | None, subject: Subject, reference: ImageSet, fake: Tensor, real: Tensor) -> list[dict[str, object]]:
    """The kernel distance, and with an extractor the accuracy, of each class that has images enough."""
    asked, known = subject.samples.labels, reference.labels
    if asked is None or known is None:
        return []
    right = None if extractor is None else _recognised(extractor, subject.samples, len(subject.class_names))
    rows: list[dict[str, object]] = []
    for number, name in enumerate(subject.class_names[:MOST_CLASSES]):
        ours, theirs = np.flatnonzero(asked == number), np.flatnonzero(known == number)
        row: dict[str, object] = {"name": name, "num_samples": len(ours), "num_reference": len(theirs)}
        if min(len(ours), len(theirs)) >= LEAST_OF_CLASS:
            row |= _put("kernel_distance", kernel_distance(fake[torch.from_numpy(ours)], real[torch.from_numpy(theirs)]).estimate)
        if right is not None and len(ours):
            row |= _put("class_accuracy", share(int(right[ours].sum()), len(ours)))
        rows.append(row)
    return rows


def _copies(
    extractor: Extractor, subject: Subject, heldout: ImageSet | None, places: NDArray[np.int64], fake: Tensor, real: Tensor
) -> tuple[Matches, dict[str, object]]:
    searcher, searched = Searcher(subject.training, real, places), subject.samples.places(MOST_MATCHED)
    samples = subject.samples.part(searched) if len(searched) < len(subject.samples) else subject.samples
    ours = _match(searcher, extractor, samples, fake[torch.from_numpy(searched)])
    suspected = share(int(ours.suspected.sum()), len(samples))
    found: dict[str, object] = {"num_samples": len(samples), "count": int(ours.suspected.sum()), "threshold": THRESHOLD}
    found |= _put("share", suspected)
    if heldout is not None:
        new = _match(searcher, extractor, heldout, extractor.features(heldout))
        found |= _put("heldout_share", share(int(new.suspected.sum()), len(heldout)))
        found |= _put("features_ratio", bootstrap_median_ratio(ours.feature_distances, new.feature_distances))
        found |= _put("pixels_ratio", bootstrap_median_ratio(ours.pixel_distances, new.pixel_distances))
    found["worst"] = [_described(subject, ours, int(i), int(searched[i])) for i in np.argsort(ours.ratios, kind="stable")[:SHOWN]]
    return ours, found


def _match(searcher: Searcher, extractor: Extractor, images: ImageSet, features: Tensor) -> Matches:
    mirrored, parts = extractor.features(images, mirrored=True), list[Matches]()
    for first in range(0, len(images), 512):
        rows = slice(first, first + 512)
        parts.append(searcher.match(images.take(rows), features[rows], mirrored[rows]))
    return Matches.joined(parts)


def _described(subject: Subject, matches: Matches, image: int, sample: int) -> dict[str, object]:
    in_pixels, place = matches.in_pixels(image), matches.place(image)
    return {
        "sample": sample,
        "train": int(subject.training.rows[place]),
        "name": subject.training.name(place),
        "ratio": float(matches.ratios[image]),
        "space": "pixels" if in_pixels else "features",
        "mirrored": bool(matches.mirrored[image]) if in_pixels else None,
        "shift": matches.shifts[image].tolist() if in_pixels else None,
    }
