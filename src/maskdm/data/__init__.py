"""From a folder, table, array or built-in collection of images to batches of one shape."""

from __future__ import annotations

from maskdm.data.cache import cache_directory
from maskdm.data.dataset import Dataset, Pixels, duplicates
from maskdm.data.decode import BrokenImage, decode
from maskdm.data.feed import Feed
from maskdm.data.latents import Latents
from maskdm.data.loader import Batch, Loader, flip, to_model_range, to_uint8
from maskdm.data.packing import pack
from maskdm.data.prepare import prepare
from maskdm.data.shards import Loss, ShardDataset
from maskdm.data.source import Source
from maskdm.data.sources import open_source
from maskdm.data.stream import ShardLoader, make_loader
from maskdm.data.summary import Summary, inspect

__all__ = [
    "Batch",
    "BrokenImage",
    "Dataset",
    "Feed",
    "Latents",
    "Loader",
    "Loss",
    "Pixels",
    "ShardDataset",
    "ShardLoader",
    "Source",
    "Summary",
    "cache_directory",
    "decode",
    "duplicates",
    "flip",
    "inspect",
    "make_loader",
    "open_source",
    "pack",
    "prepare",
    "to_model_range",
    "to_uint8",
]
