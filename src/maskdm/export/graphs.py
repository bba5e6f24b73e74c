"""A network as a graph: ONNX, and torch.export's. Inputs: sample, timestep [batch], class_labels [batch] where it has classes.

The batch is free, the size of the image is not. What a sampler must know beside stands in the file: an object in JSON under the key
`maskdm`, with `target`, `class_names`, `shape` of an image, and for each whole time `alpha` and `sigma` of x_t = alpha x0 + sigma eps
and the `by_eps` and `by_x0` of v = by_eps eps - by_x0 x0.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskdm.diffusion import NUM_STEPS, alpha_sigma
from maskdm.errors import UserError
from maskdm.models import Denoiser
from maskdm.sampling import MaskDMPipeline

INPUTS = ("sample", "timestep", "class_labels")
OUTPUT = "prediction"
TOLERANCE = 1e-4
"""Largest difference from the network itself, over its largest output where that is above 1."""
LARGEST = 1_800_000_000
"""Bytes of weights that an ONNX file can hold; more go into a file beside it."""


class _Plain(nn.Module):
    """A network as a function from tensors to a tensor."""

    def __init__(self, network: Denoiser) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network's prediction."""
        return self.network(sample, timestep, class_labels, return_dict=False)[0]


def write_onnx(pipeline: MaskDMPipeline, path: Path) -> float | None:
    """Write the network as ONNX; returns the largest difference of its output in onnxruntime, None where that is not installed.

    Raises UserError where onnx or onnxscript is not installed, and where the difference is too large.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"the format onnx needs {' and '.join(missing)}: pip install 'maskdm[export]'; or leave it out of --format")
    network = pipeline.unet
    inputs = _example(network, 2)
    with _quiet():
        program: Any = torch.onnx.export(
            _Plain(network),
            inputs,
            input_names=list(INPUTS[: len(inputs)]),
            output_names=[OUTPUT],
            dynamic_shapes=_free_batch(inputs),
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props["maskdm"] = json.dumps(facts(pipeline))
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    program.save(str(path), external_data=weights > LARGEST)
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {name: x.numpy() for name, x in zip(INPUTS, inputs, strict=False)})[0])

    return _check(network, run, path)


def write_program(pipeline: MaskDMPipeline, path: Path) -> float:
    """Write the network as torch.export does (`torch.export.load`); returns the largest difference of its output.

    Raises UserError where that is too large.
    """
    network = pipeline.unet
    inputs = _example(network, 2)
    with _quiet(), torch.no_grad():
        program = torch.export.export(_Plain(network), inputs, dynamic_shapes=_free_batch(inputs))
        torch.export.save(program, path, extra_files={"maskdm": json.dumps(facts(pipeline))})
        return _check(network, torch.export.load(path).module(), path)


def facts(pipeline: MaskDMPipeline) -> dict[str, Any]:
    """What a sampler must know beside the graph."""
    schedule: Any = pipeline.config["schedule"]
    times = torch.arange(NUM_STEPS + 1 if schedule == "flow" else NUM_STEPS, dtype=torch.float64)
    alpha, sigma = (value.tolist() for value in alpha_sigma(schedule, times))
    ones = [1.0] * len(times)
    return {
        "schedule": schedule,
        "target": pipeline.config["target"],
        "class_names": pipeline.config["class_names"],
        "shape": [pipeline.unet.config["in_channels"], *pipeline.unet.size],
        "alpha": alpha,
        "sigma": sigma,
        "by_eps": ones if schedule == "flow" else alpha,
        "by_x0": ones if schedule == "flow" else sigma,
    }


def _example(network: Denoiser, batch: int) -> tuple[Tensor, ...]:
    """Inputs of a batch, always the same."""
    generator = torch.Generator().manual_seed(batch)
    sample = torch.randn(batch, network.config["in_channels"], *network.size, generator=generator)
    times = torch.linspace(0, NUM_STEPS - 1, batch)
    if not network.num_classes:
        return sample, times
    return sample, times, torch.randint(network.num_classes + 1, (batch,), generator=generator)


def _free_batch(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch", min=1)
    return tuple({0: batch} for _ in inputs)


def _check(network: Denoiser, run: Any, path: Path) -> float:
    """The largest difference between what is written and the network, at batches of one and five."""
    largest = 0.0
    for batch in (1, 5):
        inputs = _example(network, batch)
        with torch.no_grad():
            wanted = network(*inputs, return_dict=False)[0]
            difference = (run(*inputs) - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
        largest = max(largest, difference)
    if not largest <= TOLERANCE:
        raise UserError(f"{path.name} does not compute what the network does (a difference of {largest:.1g}); leave it out of --format")
    return largest


@contextmanager
def _quiet() -> Generator[None]:
    """What the exporters say to their developers is left out."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
