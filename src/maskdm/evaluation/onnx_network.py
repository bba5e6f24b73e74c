"""Any network as a feature network, from an ONNX file, run by ONNX Runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from maskdm.errors import UserError, nearest
from maskdm.evaluation.features import FeatureNetwork, batch_on
from maskdm.evaluation.preparation import IMAGENET_MEAN, IMAGENET_STD, Preparation, Triple
from maskdm.evaluation.weights import existing_file

RANGES: dict[str, tuple[Triple, Triple]] = {
    "0-255": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "0-1": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    "-1-1": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
}
"""What a network wants its pixels to be, as mean and deviation of pixels in 0..255."""

_OPTIONS = ("range", "size", "output")
_TYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_PROBE = 224


@dataclass(frozen=True)
class OnnxModel:
    """A loaded file: its session, its image input, and how many images at a time it wants (None: any number)."""

    path: Path
    session: Any  # an onnxruntime.InferenceSession; the library is imported only when it is used
    input_name: str
    dtype: type[np.floating[Any]]
    fixed_batch: int | None
    size: tuple[int, int] | None

    def run(self, output: str | None, prepared: Float[Tensor, "n 3 _ _"]) -> list[NDArray[Any]]:
        """One output, or all of them. UserError where the network cannot take these images."""
        images = prepared.numpy().astype(self.dtype)
        found: list[list[NDArray[Any]]] = []
        step = self.fixed_batch or len(images)
        for first in range(0, len(images), step):
            piece = images[first : first + step]
            short = step - len(piece)
            filled = np.concatenate([piece, np.repeat(piece[-1:], short, axis=0)]) if short else piece
            try:
                outputs: list[NDArray[Any]] = self.session.run(None if output is None else [output], {self.input_name: filled})
            except Exception as error:  # whatever a network of somebody else's runs into
                hint = "" if self.size else "; give its size, such as ?size=224"
                raise UserError(f"{self.path} fails on images of {images.shape[3]} x {images.shape[2]}{hint}: {_line(error)}") from error
            found.append([each[: len(piece)] if each.ndim and len(each) == step else each for each in outputs])
        return [np.concatenate(parts) if parts[0].ndim else parts[0] for parts in zip(*found, strict=True)]


@dataclass(frozen=True)
class OnnxNetwork(FeatureNetwork):
    """A network from an ONNX file, and the output that is its features."""

    model: OnnxModel
    preparation: Preparation
    output: str

    @property
    def further(self) -> dict[str, str]:
        """The name of the output."""
        return {"output": self.output}

    def embed(self, images: UInt8[Tensor, "n _ _ _"]) -> Float[Tensor, "n _"]:
        """The output, flat."""
        return torch.from_numpy(self.model.run(self.output, self.preparation(images))[0].astype(np.float32)).flatten(1)


def load_onnx(location: str, device: torch.device) -> OnnxNetwork:
    """A network from `PATH` or `PATH?range=RANGE&size=SIDE&output=NAME`.

    It has one input [N, 3, H, W] and an output [N, D] or [N, D, 1, 1]: the one named `features`, or else the only one of that
    shape. An input named `pixels_0_255` says its range itself. UserError for everything that does not fit, naming it.
    """
    path, options = _options(location)
    content = existing_file(path).read_bytes()
    model = _open(path, content, device)
    preparation = _preparation(model, options)
    output, dimensions = _output(model, preparation, options)
    name, digest, batch = f"{path.stem} (ONNX)", hashlib.sha256(content).hexdigest(), model.fixed_batch or batch_on(device)
    return OnnxNetwork(name, digest, dimensions, 0, str(preparation), batch, model, preparation, output)


def _options(location: str) -> tuple[Path, dict[str, str]]:
    name, _, query = location.partition("?")
    options: dict[str, str] = {}
    for part in query.split("&") if query else []:
        key, _, value = part.partition("=")
        if key not in _OPTIONS or not value:
            hint = nearest(key, list(_OPTIONS))
            raise UserError(f"onnx:{location}: {part!r} is not one of range=..., size=..., output=...{hint}")
        options[key] = value
    return Path(name).expanduser(), options


def _open(path: Path, content: bytes, device: torch.device) -> OnnxModel:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"onnx:{path} needs ONNX Runtime: pip install 'maskdm[metrics]'") from error
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = torch.get_num_threads(), 1
    settings.log_severity_level = 4
    # weights in a second file would escape the hash, and ONNX Runtime would look for them in the working directory
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.absolute()))
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        # the same reason as features.py's: no TF32
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}))
    try:
        session: Any = onnxruntime.InferenceSession(content, settings, providers=providers)
    except Exception as error:  # ONNX Runtime's errors have no base of their own
        if "External data" in str(error):
            raise UserError(f"{path} keeps its weights in another file; save it as one (torch.onnx.export: external_data=False)") from error
        raise UserError(f"{path} is damaged, or nothing that ONNX Runtime can run: {_line(error)}") from error
    inputs = session.get_inputs()
    described = ", ".join(f"{each.name} {list(each.shape)}" for each in inputs)
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[1] != 3:
        raise UserError(f"{path} has the input {described}; a feature network has one, images of N x 3 x H x W")
    if inputs[0].type not in _TYPES:
        raise UserError(f"{path} reads {inputs[0].name} as {inputs[0].type}; a feature network reads float or float16")
    batch, _, height, width = (each if isinstance(each, int) else None for each in inputs[0].shape)
    known = (height or width, width or height)
    size = (known[0], known[1]) if known[0] and known[1] else None
    return OnnxModel(path, session, inputs[0].name, _TYPES[inputs[0].type], batch, size)


def _preparation(model: OnnxModel, options: Mapping[str, str]) -> Preparation:
    asked = options.get("range", "0-255" if model.input_name == "pixels_0_255" else "")
    if asked not in RANGES:
        said = f"range={asked} is not known" if asked else f"the range of its input {model.input_name} is not known"
        raise UserError(f"onnx:{model.path}: {said}; add ?range= and one of {', '.join(RANGES)}{nearest(asked, list(RANGES))}")
    size = model.size
    if "size" in options:
        if not options["size"].isdecimal() or int(options["size"]) < 1:
            raise UserError(f"onnx:{model.path}: size={options['size']} is not a number of pixels, such as size=224")
        side = int(options["size"])
        if size not in (None, (side, side)):
            raise UserError(f"onnx:{model.path}: size={side}, but the network reads {size[1]} x {size[0]} alone; leave size= out")
        size = (side, side)
    mean, std = RANGES[asked]
    return Preparation(size, mean, std)


def _output(model: OnnxModel, preparation: Preparation, options: Mapping[str, str]) -> tuple[str, int]:
    """The output of the features and its length, found by running the network on two gray images."""
    images = torch.full((2, 3, _PROBE, _PROBE), 128, dtype=torch.uint8)
    names = [each.name for each in model.session.get_outputs()]
    shapes = {name: found.shape for name, found in zip(names, model.run(None, preparation(images)), strict=True)}
    described = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    vectors = {name: shape[1] for name, shape in shapes.items() if _is_vector(shape)}
    chosen = options.get("output") or ("features" if "features" in vectors else None)
    if chosen is None and len(vectors) == 1:
        chosen = next(iter(vectors))
    if chosen is None and vectors:
        raise UserError(f"{model.path} has the outputs {', '.join(vectors)}; say which are the features, as ?output={next(iter(vectors))}")
    if chosen is None or chosen not in vectors:
        asked = f"output={chosen} is not one vector per image" if chosen else "no output is one vector per image"
        raise UserError(f"{model.path}: {asked}; for two images its outputs are {described}")
    return chosen, vectors[chosen]


def _is_vector(shape: tuple[int, ...]) -> bool:
    return shape[:1] == (2,) and (len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1)))


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
