"""A data set's rows as the sets of images that an evaluation takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskdm.config import Config
from maskdm.data import Dataset
from maskdm.evaluation import ImageSet, digest

LEAST_HELDOUT = 10


def sets_of(config: Config, dataset: Dataset) -> tuple[ImageSet, ImageSet | None]:
    """A run's training and held-out images; None where too few are held out to measure."""
    training, heldout = dataset.split(config.data.heldout, config.seed)
    new = image_set(dataset, heldout, config.data.conditional) if len(heldout) >= LEAST_HELDOUT else None
    return image_set(dataset, training, config.data.conditional), new


def image_set(dataset: Dataset, rows: NDArray[np.int64], labelled: bool = True) -> ImageSet:
    """Some rows of a data set; with labels where every image has one."""
    known = labelled and dataset.labels is not None and bool((dataset.labels >= 0).all())
    labels = dataset.labels[rows] if known and dataset.labels is not None else None
    return ImageSet(dataset.images, rows, digest(dataset.content_hash, rows), labels, dataset.name_of)
