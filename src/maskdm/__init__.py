"""maskdm: train your own image diffusion model in a fraction of the time, by masked pre-training and fine-tuning."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from maskdm.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "DiT",
    "Interrupted",
    "MaskDMPipeline",
    "Run",
    "UViT",
    "UserError",
    "__version__",
    "compare",
    "evaluate_images",
    "train",
]

if TYPE_CHECKING:
    from maskdm.api import Run, compare, evaluate_images, train
    from maskdm.models import DiT, UViT
    from maskdm.runs import Interrupted
    from maskdm.sampling import MaskDMPipeline

# imported on first use, because `maskdm --help` must be quick. diffusers looks the classes of a saved pipeline up here, and beside
# them the base class by which it knows how to load them
_HOMES = {
    "DiT": "maskdm.models",
    "Interrupted": "maskdm.runs",
    "MaskDMPipeline": "maskdm.sampling",
    "ModelMixin": "diffusers",
    "Run": "maskdm.api",
    "UViT": "maskdm.models",
    "compare": "maskdm.api",
    "evaluate_images": "maskdm.api",
    "train": "maskdm.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        # before torch begins: threads that spin long while they wait make a step forty times slower when another process wants the cores
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'maskdm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
