"""How good samples are: features of images, distances in them, copies, colours, and what all of it says."""

from __future__ import annotations

from maskdm.evaluation.colour import colour_drift
from maskdm.evaluation.copies import Matches, Searcher
from maskdm.evaluation.denoising import DenoisingLoss, denoising_loss, overfitting
from maskdm.evaluation.evaluate import Evaluation, Subject, evaluate_samples
from maskdm.evaluation.features import FeatureNetwork, Images, Labels
from maskdm.evaluation.frechet import (
    Statistics,
    frechet_distance,
    frechet_halves,
    frechet_infinity,
    frechet_ratio,
    frechet_standard_error,
)
from maskdm.evaluation.images import Extractor, ImageSet, digest
from maskdm.evaluation.intervals import Estimate
from maskdm.evaluation.kernel import KernelDistance, kernel_distance
from maskdm.evaluation.manifold import Manifold, manifold
from maskdm.evaluation.neighbours import Neighbours, nearest
from maskdm.evaluation.networks import is_self, load_network
from maskdm.evaluation.own import SelfNetwork, load_self
from maskdm.evaluation.pieces import Progress, fill
from maskdm.evaluation.training import cached_self, train_self

__all__ = [
    "DenoisingLoss",
    "Estimate",
    "Evaluation",
    "Extractor",
    "FeatureNetwork",
    "ImageSet",
    "Images",
    "KernelDistance",
    "Labels",
    "Manifold",
    "Matches",
    "Neighbours",
    "Progress",
    "Searcher",
    "SelfNetwork",
    "Statistics",
    "Subject",
    "cached_self",
    "colour_drift",
    "denoising_loss",
    "digest",
    "evaluate_samples",
    "fill",
    "frechet_distance",
    "frechet_halves",
    "frechet_infinity",
    "frechet_ratio",
    "frechet_standard_error",
    "is_self",
    "kernel_distance",
    "load_network",
    "load_self",
    "manifold",
    "nearest",
    "overfitting",
    "train_self",
]
