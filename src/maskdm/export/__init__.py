"""A trained network in forms that open without maskdm: a diffusers folder with its code, ONNX, torch.export; and its card."""

from __future__ import annotations

from pathlib import Path

from maskdm.export.card import Facts, card
from maskdm.export.definitions import bundle
from maskdm.export.folder import CODE, write_folder
from maskdm.export.graphs import write_onnx, write_program

__all__ = ["CODE", "SAMPLER", "Facts", "bundle", "card", "write_folder", "write_onnx", "write_program"]

SAMPLER = Path(__file__).with_name("onnx_sample.py")
"""A script that draws images from an ONNX file, with numpy and onnxruntime alone."""
