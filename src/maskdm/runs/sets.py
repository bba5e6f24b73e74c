"""A run's data set, and its rows as the sets of images that an evaluation takes."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.config import Config
from maskdm.data import Dataset, ShardDataset, open_source, prepare
from maskdm.errors import UserError
from maskdm.evaluation import ImageSet, digest
from maskdm.runs.directory import RunDirectory
from maskdm.runs.display import Display
from maskdm.runs.store import cache_directory

LEAST_HELDOUT = 10

MOST_LEFT = 50_000
"""Images that a limit leaves out: as many as data sets are usually measured against, and no more, for all are read."""

CLASSES = "as in the training images"
"""How often each class is asked for where samples are measured; in the record of every such figure."""

GOLDEN = (5**0.5 - 1) / 2


def dataset_of(run: RunDirectory, config: Config, data: str | None, display: Display) -> Dataset:
    """The data that a run was trained on, found at `data` where it has moved. Raises UserError where it is other data."""
    try:
        source = open_source(data or config.data.source)
    except UserError as error:
        if data is not None:
            raise
        way = "go where it was trained, or give --data to `maskdm evaluate`, `edit` or `distil`"
        raise UserError(f"{error}; {run.path} was trained on it: {way}") from None
    with display.counting("decoding images") as progress:
        dataset = prepare(source, config.data, cache_directory(), progress)
    if not is_data_of(run, dataset):
        raise UserError(
            f"{source.name} is not the data that {run.path} was trained on, or has changed since; its held-out images are unknown"
        )
    return dataset


def is_data_of(run: RunDirectory, dataset: Dataset) -> bool:
    """Whether a run was trained on these images and classes, wherever they lie now and whenever their files were written."""
    known, labels = run.info()["data"], labels_hash(dataset)
    same_classes = known["classes"] in ([], list(dataset.class_names)) and known.get("labels_hash", labels) == labels
    return dataset.content_hash == known["content_hash"] and same_classes


def labels_hash(dataset: Dataset) -> str | None:
    """SHA-256, in hex, of the images' classes, by which images are held out whether they are learned or not; None where there are none."""
    return None if dataset.labels is None else hashlib.sha256(dataset.labels.astype(np.int64).tobytes()).hexdigest()


def sets_of(config: Config, dataset: Dataset) -> tuple[ImageSet, ImageSet | None]:
    """A run's training and held-out images; None where too few are held out to measure."""
    training, heldout = dataset.split(config.data.heldout, config.seed, config.data.limit)
    new = image_set(dataset, heldout, config.data.conditional) if len(heldout) >= LEAST_HELDOUT else None
    return image_set(dataset, training, config.data.conditional), new


def left_out(config: Config, dataset: Dataset) -> ImageSet | None:
    """What `data.limit` leaves out of the training images: with a limit samples are compared with these.

    Else a network that repeats its few images would come nearest to them. At most MOST_LEFT of them, drawn by a fixed seed. None without a
    limit, and where fewer are left than held out.
    """
    if config.data.limit is None:
        return None
    every, heldout = dataset.split(config.data.heldout, config.seed)
    rows = np.setdiff1d(every, dataset.split(config.data.heldout, config.seed, config.data.limit)[0])
    if len(rows) < max(LEAST_HELDOUT, len(heldout)):
        return None
    found = image_set(dataset, rows, config.data.conditional)
    return found.part(found.places(MOST_LEFT)) if len(found) > MOST_LEFT else found


def image_set(dataset: Dataset, rows: NDArray[np.int64], labelled: bool = True, whole: bool = True) -> ImageSet:
    """Some rows of a data set; with labels where every image has one. Unless `whole`, others may stand in for those that are lost."""
    known = labelled and dataset.labels is not None and bool((dataset.labels >= 0).all())
    labels = dataset.labels[rows] if known and dataset.labels is not None else None
    streams = not whole and isinstance(dataset, ShardDataset)
    key = digest(dataset.content_hash + (" or what stands in" if streams else ""), rows)  # features are kept under it
    return ImageSet(dataset.whole if whole else dataset.images, rows, key, labels, dataset.name_of)


def natural_labels(config: Config, dataset: Dataset, rows: NDArray[np.int64], num: int) -> list[int] | None:
    """A class for each of `num` samples, as often as among these rows, and so mixed that each beginning is about like the whole.

    None for a run without classes. Samples of all classes alike would differ from the real images where those are unbalanced.
    """
    if not config.data.conditional or dataset.labels is None:
        return None
    classes, found = np.unique(dataset.labels[rows], return_counts=True)
    counts, remainders = np.divmod(found * num, found.sum())
    counts[np.argsort(-remainders, kind="stable")[: num - counts.sum()]] += 1
    begins = np.arange(len(counts)) * GOLDEN % 1  # each class evenly over the samples; rare ones not all at the same place
    places = np.concatenate([(np.arange(count) + begin) / count for count, begin in zip(counts, begins, strict=True)])
    return np.repeat(classes, counts)[np.argsort(places, kind="stable")].tolist()


def images_and_labels(config: Config, dataset: Dataset, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Some rows for the network: uint8 or latents [n, channels, height, width], and classes [n], the null one where there is none."""
    images = dataset.field(rows).to(device)
    images = images[:, 0] if images.ndim == 5 else images
    if not config.data.conditional or dataset.labels is None:
        return images, None
    labels = torch.from_numpy(dataset.labels[rows])
    return images, torch.where(labels < 0, len(dataset.class_names), labels).to(device)
