"""ONNX files as feature networks: which input, which range, which output, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import SHARED
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskdm.engine import Ranks
from maskdm.errors import UserError
from maskdm.evaluation import Extractor, FeatureNetwork, ImageSet, load_network
from maskdm.evaluation.onnx_network import OnnxNetwork
from maskdm.evaluation.weights import sha256_of

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

MOBILENET = SHARED / "weights" / "mobilenetv2-imagenet-pool1280.onnx"
WEIGHTS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
Size = list[int | str]


def pictures(count: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def write(
    path: Path,
    shape: Size | None = None,
    name: str = "pixels_0_255",
    outputs: tuple[str, ...] = ("vectors",),
    kind: int = onnx.TensorProto.FLOAT,
    weights: NDArray[np.floating] = WEIGHTS,
    external: bool = False,
) -> Path:
    """Mean colour times `weights`. Outputs: `vectors` and `features` [N, 5], `means` [N, 3, 1, 1], `maps` as the input, `sum` []."""
    from onnx import helper, numpy_helper

    inner = kind if kind == onnx.TensorProto.FLOAT16 else onnx.TensorProto.FLOAT
    nodes = {
        "seen": [helper.make_node("Cast", [name], ["seen"], to=inner)],
        "means": [helper.make_node("GlobalAveragePool", ["seen"], ["means"])],
        "flat": [helper.make_node("Flatten", ["means"], ["flat"])],
        "vectors": [helper.make_node("MatMul", ["flat", "weights"], ["vectors"])],
        "features": [helper.make_node("Neg", ["vectors"], ["features"])],
        "maps": [helper.make_node("Neg", ["seen"], ["maps"])],
        "sum": [helper.make_node("ReduceSum", ["flat"], ["sum"], keepdims=0)],
    }
    ranks = {"means": 4, "vectors": 2, "features": 2, "maps": 4, "sum": 0}
    graph = helper.make_graph(
        [node for each in nodes.values() for node in each],
        "graph",
        [helper.make_tensor_value_info(name, kind, shape or ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info(output, inner, [None] * ranks[output]) for output in outputs],
        [numpy_helper.from_array(weights.astype(onnx.helper.tensor_dtype_to_np_dtype(inner)), "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if external:
        onnx.save(model, path, save_as_external_data=True, size_threshold=0, location=f"{path.name}.data")
    else:
        onnx.save(model, path)
    return path


def load(location: object) -> FeatureNetwork:
    return load_network(f"onnx:{location}", Path("nowhere"), torch.device("cpu"))


def expected(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1).mean(dim=(2, 3)) @ torch.from_numpy(WEIGHTS)


def test_features_are_the_networks_output(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.onnx")
    network = load(path)
    images = pictures(7, 3, 9, 12)
    torch.testing.assert_close(network.features(images, batch=3), expected(images))
    torch.testing.assert_close(network.features(images.numpy()), expected(images))
    torch.testing.assert_close(network.features(pictures(2, 1, 4, 4)), expected(pictures(2, 1, 4, 4)))
    assert network.features(images[:0]).shape == (0, 5)
    assert network.predict(images) is None
    assert not network.is_fid
    assert network.provenance() == {
        "name": "tiny (ONNX)",
        "hash": sha256_of(path),
        "dimensions": 5,
        "preprocessing": "RGB in 0..255",
        "output": "vectors",
    }


def test_features_of_another_output_are_kept_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.onnx", outputs=("vectors", "features"))
    pixels = pictures(12, 3, 4, 4).permute(0, 2, 3, 1).contiguous().numpy()
    images = ImageSet(pixels, np.arange(12), "some")
    for output, sign in (("vectors", 1), ("features", -1)):
        extractor = Extractor(load(f"{path}?range=0-255&output={output}"), tmp_path / "cache", Ranks())
        torch.testing.assert_close(extractor.features(images), sign * expected(pictures(12, 3, 4, 4)))
        assert extractor.network.provenance()["output"] == output


@pytest.mark.parametrize(
    ("value_range", "scaled"),
    [
        ("0-255", lambda x: x),
        ("0-1", lambda x: x / 255),
        ("-1-1", lambda x: x / 127.5 - 1),
        ("imagenet", lambda x: (x / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])),
    ],
)
def test_the_range_that_is_asked_for_is_what_the_network_gets(value_range: str, scaled: object, tmp_path: Path) -> None:
    assert callable(scaled)
    network = load(f"{write(tmp_path / 'tiny.onnx', name='x')}?range={value_range}")
    images = pictures(2, 3, 6, 6)
    wanted = scaled(images.numpy().astype(np.float64).mean(axis=(2, 3))) @ WEIGHTS
    torch.testing.assert_close(network.features(images), torch.from_numpy(wanted).float(), atol=1e-4, rtol=1e-4)


def test_images_are_resized_to_what_the_network_reads_or_to_what_is_asked(tmp_path: Path) -> None:
    images = pictures(2, 3, 30, 20)
    picture = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR) for image in images]
    wanted = expected(torch.from_numpy(np.stack([np.asarray(each) for each in picture])).permute(0, 3, 1, 2))
    fixed = load(write(tmp_path / "fixed.onnx", ["n", 3, 16, 16]))
    asked = load(f"{write(tmp_path / 'free.onnx')}?size=16")
    for network in (fixed, asked):
        torch.testing.assert_close(network.features(images), wanted)
        assert network.preprocessing == "resized to 16 x 16 (Pillow, bilinear, antialiased), RGB in 0..255"


def test_a_fixed_number_of_images_is_honoured(tmp_path: Path) -> None:
    network = load(write(tmp_path / "four.onnx", [4, 3, 8, 8]))
    images = pictures(6, 3, 8, 8)
    for batch in (None, 1, 5, 6):
        torch.testing.assert_close(network.features(images, batch=batch), expected(images))


def test_half_precision_is_fed_half_precision(tmp_path: Path) -> None:
    network = load(f"{write(tmp_path / 'half.onnx', name='x', kind=onnx.TensorProto.FLOAT16)}?range=0-1")
    images = pictures(2, 3, 8, 8)
    features = network.features(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected(images) / 255, atol=1e-2, rtol=1e-2)


def test_the_output_named_features_is_taken_else_the_only_vector(tmp_path: Path) -> None:
    images = pictures(3, 3, 8, 8)
    torch.testing.assert_close(
        load(write(tmp_path / "a.onnx", outputs=("vectors", "features", "maps"))).features(images), -expected(images)
    )
    torch.testing.assert_close(load(write(tmp_path / "b.onnx", outputs=("maps", "vectors", "sum"))).features(images), expected(images))
    pooled = load(write(tmp_path / "c.onnx", outputs=("means",)))
    assert pooled.dimensions == 3
    torch.testing.assert_close(pooled.features(images), images.float().mean(dim=(2, 3)))
    several = write(tmp_path / "d.onnx", outputs=("means", "vectors"))
    with pytest.raises(UserError, match=r"d\.onnx has the outputs means, vectors; say which are the features, as \?output=means"):
        load(several)
    torch.testing.assert_close(load(f"{several}?output=vectors&size=8").features(images), expected(images))
    with pytest.raises(UserError, match=r"output=other is not one vector per image; .* means \[2, 3, 1, 1\], vectors \[2, 5\]"):
        load(f"{several}?output=other")
    with pytest.raises(UserError, match=r"no output is one vector per image; .* maps \[2, 3, 224, 224\], sum \[\]"):
        load(write(tmp_path / "e.onnx", outputs=("maps", "sum")))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("", r"the range of its input x is not known; add \?range= and one of 0-255, 0-1, -1-1, imagenet"),
        ("?range=imagnet", r"range=imagnet is not known; .*; did you mean imagenet\?"),
        ("?rnage=0-1", r"'rnage=0-1' is not one of range=.*; did you mean range\?"),
        ("?range", r"'range' is not one of"),
        ("?range=0-1&size=big", r"size=big is not a number of pixels"),
        ("?range=0-1&size=0", r"size=0 is not a number of pixels"),
        ("?range=0-1&size=32", r"size=32, but the network reads 16 x 16 alone"),
    ],
)
def test_options_that_are_missing_or_wrong_are_named(query: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.onnx", ["n", 3, 16, 16], name="x")
    with pytest.raises(UserError, match=said):
        load(f"{path}{query}")


@pytest.mark.parametrize(
    ("shape", "kind", "said"),
    [
        (
            ["n", 16, 16, 3],
            onnx.TensorProto.FLOAT,
            r"has the input pixels_0_255 \['n', 16, 16, 3\]; a feature network has one, ",
        ),
        (["n", 1, 16, 16], onnx.TensorProto.FLOAT, r"has the input pixels_0_255 \['n', 1, 16, 16\]"),
        (["n", 3, 16, 16], onnx.TensorProto.DOUBLE, r"reads pixels_0_255 as tensor\(double\)"),
    ],
)
def test_a_network_that_reads_something_else_is_refused(shape: Size, kind: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load(write(tmp_path / "x.onnx", shape, kind=kind, weights=np.ones((shape[1], 5))))


def test_weights_outside_of_the_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where ONNX Runtime would find them
    path = write(tmp_path / "split.onnx", external=True)
    for location in (path, path.name):
        with pytest.raises(UserError, match=r"split\.onnx keeps its weights in another file; save it as one"):
            load(location)


def test_a_network_that_fails_on_the_images_or_gives_nan_is_named(tmp_path: Path) -> None:
    network = load(write(tmp_path / "nan.onnx", weights=np.full((3, 5), np.nan)))
    with pytest.raises(UserError, match=r"features of nan \(ONNX\) hold NaN or infinity"):
        network.features(pictures(2, 3, 8, 8))
    assert isinstance(network, OnnxNetwork)
    with pytest.raises(UserError, match=r"nan\.onnx fails on images of 8 x 9; give its size, such as \?size=224: "):
        network.model.run("absent", torch.zeros(1, 3, 9, 8))


def test_without_onnx_runtime_the_way_to_install_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'maskdm\[metrics\]'"):
        load(write(tmp_path / "tiny.onnx"))


@pytest.mark.skipif(not MOBILENET.is_file(), reason=f"no {MOBILENET}")
def test_mobilenet_sees_content_and_does_not_mind_the_batch() -> None:
    from sklearn.datasets import load_sample_images

    china, flower = (torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images)
    images = torch.stack([china, china.roll(3, dims=2), flower, flower.roll(3, dims=2)])
    network = load(MOBILENET)
    features = network.features(images)
    assert features.shape == (4, network.dimensions) == (4, 1280)
    assert network.preprocessing == "resized to 224 x 224 (Pillow, bilinear, antialiased), RGB in 0..255"
    torch.testing.assert_close(network.features(images, batch=1), features, atol=1e-3, rtol=1e-3)
    distances = torch.cdist(features, features)
    assert distances[0, 1] < 0.5 * distances[0, 2] and distances[2, 3] < 0.5 * distances[1, 3]
