"""maskdm: train your own image diffusion model in a fraction of the time, by masked pre-training and fine-tuning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["DiT", "MaskDMPipeline", "UViT", "__version__"]

if TYPE_CHECKING:
    from maskdm.models import DiT, UViT
    from maskdm.sampling import MaskDMPipeline

# diffusers looks the classes of a saved pipeline up here, and beside them the base class by which it knows how to load
# them; imported on first use, because `maskdm --help` must be quick
_HOMES = {"DiT": "maskdm.models", "UViT": "maskdm.models", "MaskDMPipeline": "maskdm.sampling", "ModelMixin": "diffusers"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'maskdm' has no attribute '{name}'")
