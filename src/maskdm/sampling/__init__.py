"""From a trained network to images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maskdm.sampling.schedulers import make_scheduler, offered
from maskdm.sampling.seeds import seeded, slerp

if TYPE_CHECKING:
    from maskdm.sampling.pipeline import MaskDMPipeline

__all__ = ["MaskDMPipeline", "make_scheduler", "offered", "seeded", "slerp"]


def __getattr__(name: str) -> Any:
    """The pipeline, when first asked for: its base class imports all of diffusers' models, a second that training need not wait."""
    if name == "MaskDMPipeline":
        from maskdm.sampling.pipeline import MaskDMPipeline

        return MaskDMPipeline
    raise AttributeError(f"module 'maskdm.sampling' has no attribute '{name}'")
