"""Vision networks of the Transformers library (DINOv2, CLIP, ViT, ...) from a local folder, as `save_pretrained` writes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation.features import FeatureNetwork, batch_on
from maskdm.evaluation.preparation import Preparation, Triple
from maskdm.evaluation.weights import sha256_of

Family: TypeAlias = Literal["transformers", "dinov2", "clip"]
Reading: TypeAlias = Literal["projected image embedding", "pooled output", "mean of the tokens"]

_CLIP = ("clip", "clip_vision_model")
_FAMILIES: dict[Family, tuple[str, ...]] = {"transformers": (), "dinov2": ("dinov2", "dinov2_with_registers"), "clip": _CLIP}
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is fetched, and no code of a folder is run."""

_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


@dataclass(frozen=True)
class TransformersNetwork(FeatureNetwork):
    """A vision network of the Transformers library, and what of its output is read."""

    model: Any  # a transformers.PreTrainedModel; the library is imported only when it is used
    preparation: Preparation
    reading: Reading
    config_hash: str
    device: torch.device

    @property
    def further(self) -> dict[str, str]:
        """What is read, and SHA-256 of config.json: it sets what the same weights compute."""
        return {"reading": self.reading, "config_hash": self.config_hash}

    def embed(self, images: UInt8[Tensor, "n _ _ _"]) -> Float[Tensor, "n _"]:
        """What `reading` says, flat. DINOv2's pooled output is its class token after the last normalisation."""
        return _read(self.model(pixel_values=self.preparation(images).to(self.device)), self.reading)


def load_transformers(family: Family, folder: Path, device: torch.device) -> TransformersNetwork:
    """A network from config.json, preprocessor_config.json and model.safetensors; nothing is fetched and no pickle is read.

    CLIP gives its projected image embedding; others their pooled output, or the mean of the tokens where the weights hold
    no pooling. UserError for a folder that is none, is of another family, or does not hold all weights.
    """
    if not folder.is_dir():
        raise UserError(f"{family}:{folder} is no folder; give one with config.json and model.safetensors, as save_pretrained writes it")
    kind = str(read_json(folder / "config.json").get("model_type"))
    if _FAMILIES[family] and kind not in _FAMILIES[family]:
        raise UserError(f"{family}:{folder} holds a network of the type {kind}; give it as transformers:{folder}")
    preparation, digest = preparation_of(folder), _digest(folder)
    model, has_pooling = _load(folder, kind)
    try:
        with torch.no_grad():
            output = model(pixel_values=preparation(torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)))
    except Exception as error:  # whatever a network of somebody else's runs into
        raise UserError(f"{folder} fails on an image that is {preparation}: {first_line(error)}") from error
    reading: Reading = "mean of the tokens"
    if kind in _CLIP:
        reading = "projected image embedding"
    elif has_pooling and "pooler_output" in output:
        reading = "pooled output"
    name, dimensions = f"{folder.resolve().name} ({kind}, {reading})", _read(output, reading).shape[1]
    words, batch, config = str(preparation), batch_on(device), sha256_of(folder / "config.json")
    return TransformersNetwork(name, digest, dimensions, 0, words, batch, model.to(device), preparation, reading, config, device)


def _read(output: Any, reading: Reading) -> Tensor:
    match reading:
        case "projected image embedding":
            features: Tensor = output.image_embeds
        case "pooled output":
            features = output.pooler_output
        case "mean of the tokens":
            tokens: Tensor = output.last_hidden_state
            features = tokens.mean(dim=1) if tokens.ndim == 3 else tokens.mean(dim=(2, 3))
    return features.flatten(1)


def _load(folder: Path, kind: str) -> tuple[Any, bool]:
    """The network on the CPU, and whether the weights hold its pooling."""

    def choose(library: Any, config: Any) -> tuple[Any, Any]:
        if kind == "clip":  # both towers: the size of the projection stands above them, and the tower's own copy may differ
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        return library.CLIPVisionModelWithProjection if kind in _CLIP else library.AutoModel, config

    model, missing = read_model(folder, choose)
    if model.main_input_name != "pixel_values":
        raise UserError(f"{folder} holds a network of the type {kind}, which reads {model.main_input_name}, not images alone")
    refuse_missing(folder, [key for key in missing if not key.startswith("pooler.")])
    return model, not missing


def library_for(folder: Path) -> Any:
    """The Transformers library. UserError, naming what needs it, where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{folder} needs the Transformers library: pip install 'maskdm[transformers]'") from error
    return transformers


def read_model(folder: Path, choose: Callable[[Any, Any], tuple[Any, Any]]) -> tuple[Any, list[str]]:
    """A folder's network, on the CPU, in fp32 and frozen, and the names of weights that the folder lacks.

    choose: from the library and the folder's configuration to the network's class and its configuration.
    """
    library = library_for(folder)
    try:
        with quietly():
            kind, config = choose(library, library.AutoConfig.from_pretrained(folder, **LOCAL))
            model, info = kind.from_pretrained(folder, config=config, use_safetensors=True, output_loading_info=True, **LOCAL)
    except Exception as error:  # the library raises every kind of error for what stands in a folder
        raise UserError(f"{folder} cannot be loaded by the Transformers library: {first_line(error)}") from error
    return model.float().eval().requires_grad_(False), sorted(info["missing_keys"])


def refuse_missing(folder: Path, keys: list[str]) -> None:
    """UserError for weights that would be made up."""
    if keys:
        raise UserError(f"{folder} lacks {len(keys)} of the network's weights, such as {keys[0]}; save the whole network")


def preparation_of(folder: Path) -> Preparation:
    """What preprocessor_config.json says, done by Pillow: the library's own way needs torchvision. UserError for what is not known."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        about = read_json(path)
    else:  # what version 5 of the library writes for processors of several kinds
        about = read_json(folder / "processor_config.json", f"{path} is missing; copy it from where the network is published")
        about = about.get("image_processor", {})
    odd = [key for key, value in about.items() if key.startswith("do_") and value and key not in _STEPS]
    if odd or about.get("crop_pct") is not None:
        raise UserError(f"{path} asks for {odd[0] if odd else 'crop_pct'}, which is not known here; export the network and use onnx:PATH")
    try:
        unit = float(about.get("rescale_factor", 1 / 255)) if about.get("do_rescale", True) else 1.0
        plain = not about.get("do_normalize", True)
        mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (about["image_mean"], about["image_std"])
        crop = _sides(about["crop_size"]) if about.get("do_center_crop", "crop_size" in about) else None
        size = _size(about["size"], square=crop is None) if about.get("do_resize", True) else None
        resample = Image.Resampling(about.get("resample", Image.Resampling.BILINEAR))
        found = Preparation(size, _scaled(mean, unit), _scaled(std, unit), crop, resample)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot read {error} in it; size, crop_size, image_mean, image_std and resample are read") from error
    if crop and (size is None or max(crop) > (size if isinstance(size, int) else min(size))):
        raise UserError(f"{path} cuts out {crop[1]} x {crop[0]} of {size}; the size must be at least that")
    return found


def _size(size: Any, square: bool) -> tuple[int, int] | int:
    """A number alone is the shorter side where the middle is cut out, and both sides where not."""
    if isinstance(size, int):
        return (size, size) if square else size
    if set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return _sides(size)


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _scaled(values: Any, unit: float) -> Triple:
    red, green, blue = (float(value) / unit for value in values)
    return red, green, blue


def _digest(folder: Path) -> str:
    """SHA-256 of model.safetensors; where it is split, of the SHA-256 of its parts."""
    whole = folder / "model.safetensors"
    if whole.is_file():
        return sha256_of(whole)
    parts = sorted(folder.glob("model-*.safetensors"))
    if not parts:
        raise UserError(f"{folder} has no model.safetensors; pickled weights (pytorch_model.bin) are not read, for they can run code")
    return hashlib.sha256("".join(sha256_of(part) for part in parts).encode()).hexdigest()


def read_json(path: Path, absent: str | None = None) -> dict[str, Any]:
    """A file's settings. UserError, `absent` if given, where there are none."""
    if not path.is_file():
        raise UserError(absent or f"there is no {path}; give a folder as save_pretrained writes it")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no JSON of settings: {error}") from error


@contextmanager
def quietly() -> Generator[None]:
    """Without the library's progress bars and reports: what matters in them is an error here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """Of what an error says."""
    return str(error).strip().partition("\n")[0]
