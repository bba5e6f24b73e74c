"""One run, described: a tree of frozen dataclasses, each field with its meaning beside its type.

Nothing here imports torch, so that the command line stays quick. `settings.py` reads and writes the tree.
Values of a closed union (a mask, a model, ...) are their own configuration; the modules that use them match on the type.
"""

from __future__ import annotations

from maskdm.config.lessons import Convert, Denoise, Guided, Halve, Lesson, Shortcut, is_halved
from maskdm.config.masks import BlockMask, CropMask, DecodeMask, DeferMask, Mask, NoMask, PatchMask, ReduceMask, RouteMask, ViewsMask
from maskdm.config.network import (
    Data,
    Diffusion,
    DiTConfig,
    LogitNormalTimesteps,
    MinSNRWeight,
    Model,
    Transform,
    UniformTimesteps,
    UniformWeight,
    UViTConfig,
    swiglu_width,
)
from maskdm.config.run import SHORTHANDS, Config
from maskdm.config.training import (
    SCHEDULERS,
    Budget,
    Ema,
    Evaluation,
    Guard,
    GuideName,
    Hardware,
    Intervals,
    Lora,
    Optimizer,
    Sampling,
    SchedulerName,
    Stage,
    TrackerName,
)

__all__ = [
    "SCHEDULERS",
    "SHORTHANDS",
    "BlockMask",
    "Budget",
    "Config",
    "Convert",
    "CropMask",
    "Data",
    "DecodeMask",
    "DeferMask",
    "Denoise",
    "DiTConfig",
    "Diffusion",
    "Ema",
    "Evaluation",
    "Guard",
    "GuideName",
    "Guided",
    "Halve",
    "Hardware",
    "Intervals",
    "Lesson",
    "LogitNormalTimesteps",
    "Lora",
    "Mask",
    "MinSNRWeight",
    "Model",
    "NoMask",
    "Optimizer",
    "PatchMask",
    "ReduceMask",
    "RouteMask",
    "Sampling",
    "SchedulerName",
    "Shortcut",
    "Stage",
    "TrackerName",
    "Transform",
    "UViTConfig",
    "UniformTimesteps",
    "UniformWeight",
    "ViewsMask",
    "is_halved",
    "swiglu_width",
]
