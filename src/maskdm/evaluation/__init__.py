"""How good samples are: a feature network of the real images alone, and distances in its features."""

from __future__ import annotations

from maskdm.evaluation.distances import (
    KernelDistance,
    PrecisionRecall,
    Statistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from maskdm.evaluation.evaluate import Evaluation, evaluate_samples
from maskdm.evaluation.features import FeatureNetwork, Images, Labels
from maskdm.evaluation.neighbours import Neighbours, nearest
from maskdm.evaluation.networks import is_self, load_network
from maskdm.evaluation.own import SelfNetwork, load_self
from maskdm.evaluation.training import cached_self, train_self

__all__ = [
    "Evaluation",
    "FeatureNetwork",
    "Images",
    "KernelDistance",
    "Labels",
    "Neighbours",
    "PrecisionRecall",
    "SelfNetwork",
    "Statistics",
    "cached_self",
    "evaluate_samples",
    "frechet_distance",
    "is_self",
    "kernel_distance",
    "load_network",
    "load_self",
    "nearest",
    "precision_recall",
    "train_self",
]
