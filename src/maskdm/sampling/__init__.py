"""From a trained network to images."""

from __future__ import annotations

from maskdm.sampling.pipeline import MaskDMPipeline, seeded
from maskdm.sampling.schedulers import make_scheduler, offered

__all__ = ["MaskDMPipeline", "make_scheduler", "offered", "seeded"]
