"""A diffusers folder with the code of its pipeline and network beside the weights.

`DiffusionPipeline.from_pretrained(folder, custom_pipeline="maskdm_pipeline", trust_remote_code=True)` opens it where diffusers is, and
maskdm is not. diffusers takes one file for a pipeline and one for each component, so each has all it needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskdm.export.definitions import PACKAGE, Place, bundle
from maskdm.models import Denoiser
from maskdm.sampling import MaskDMPipeline

CODE = "maskdm_pipeline"
NETWORK = "maskdm_network"
"""Names of the files of code, without .py, and so of the modules that model_index.json names."""


def write_folder(pipeline: MaskDMPipeline, folder: Path) -> None:
    """Write the pipeline, its network's fp32 weights and their code into a folder, which is made.

    An unconditional one is named a DDPMPipeline in model_index.json, so that diffusers' own opens it too; ours is then asked for by
    `custom_pipeline`, which is right for a conditional one as well.
    """
    pipeline.save_pretrained(folder)
    index_file = folder / "model_index.json"
    index: dict[str, Any] = json.loads(index_file.read_text(encoding="utf-8"))
    components = [name for name, part in pipeline.components.items() if part is not None]
    index = {name: value for name, value in index.items() if value != [None, None]}
    for name in components:
        if index[name][0] == PACKAGE:
            network: object = pipeline.components[name]
            assert isinstance(network, Denoiser)
            text = bundle([_place(network)], f"The network {type(network).__name__}")
            (folder / name / f"{NETWORK}.py").write_text(text, encoding="utf-8")
            index[name][0] = NETWORK
    text = bundle([(MaskDMPipeline.__module__, MaskDMPipeline.__name__)], "The pipeline")
    (folder / f"{CODE}.py").write_text(text, encoding="utf-8")
    stock = pipeline.unet.num_classes == 0 and set(components) == {"unet", "scheduler"}
    index["_class_name"] = "DDPMPipeline" if stock else [CODE, MaskDMPipeline.__name__]
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _place(network: Denoiser) -> Place:
    """Where a network's class is defined; its `__module__` is the public home."""
    return type(network).denoise.__module__, type(network).__name__
