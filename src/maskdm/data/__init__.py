"""From a folder, table, array or built-in collection of images to batches of one shape."""

from __future__ import annotations

from maskdm.data.dataset import Dataset, duplicates
from maskdm.data.decode import BrokenImage, decode
from maskdm.data.feed import Feed
from maskdm.data.latents import Latents
from maskdm.data.loader import Batch, Loader, flip, to_model_range, to_uint8
from maskdm.data.prepare import prepare
from maskdm.data.source import Source
from maskdm.data.sources import open_source
from maskdm.data.summary import Summary, inspect

__all__ = [
    "Batch",
    "BrokenImage",
    "Dataset",
    "Feed",
    "Latents",
    "Loader",
    "Source",
    "Summary",
    "decode",
    "duplicates",
    "flip",
    "inspect",
    "open_source",
    "prepare",
    "to_model_range",
    "to_uint8",
]
