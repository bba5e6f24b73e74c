"""Feature networks of others: loaded by SPEC from files, never fetched unasked, and refused by name where they do not fit."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_helpers import SHARED
from PIL import Image
from torch import Tensor, nn

from maskdm.errors import UserError
from maskdm.evaluation import FeatureNetwork, inception, is_self, load_network
from maskdm.evaluation.inception import Inception, InceptionNetwork, stretch
from maskdm.evaluation.preparation import IMAGENET_MEAN, IMAGENET_STD, Preparation
from maskdm.evaluation.resnet import ResNet, ResNetNetwork
from maskdm.evaluation.training import accuracy_of
from maskdm.evaluation.weights import sha256_of

CPU = torch.device("cpu")
RESNET56 = SHARED / "weights" / "cifar10-resnet56-4bfd9763.th"
CIFAR = SHARED / "cifar10-test.parquet"


def pictures(count: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def random_state(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights that neither fade nor explode on the way through a deep network."""
    generator, state = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for key, value in module.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
        elif key.endswith("running_var"):
            state[key] = torch.rand(value.shape, generator=generator) + 0.5
        elif value.ndim > 1:
            state[key] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif "bn" in key and key.endswith("weight"):
            state[key] = torch.rand(value.shape, generator=generator) * 0.4 + 1.0
        else:
            state[key] = torch.randn(value.shape, generator=generator) * 0.1
    return state


def load(spec: str, cache: Path = Path("nowhere")) -> FeatureNetwork:
    return load_network(spec, cache, CPU)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here may reach for the network."""
    import socket

    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return


# which network


def test_self_needs_the_data_and_is_not_loaded_from_a_file() -> None:
    assert is_self("self")
    assert not is_self("inception")
    assert not is_self("self:somewhere")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("incepton", r"no feature network is called 'incepton'; did you mean inception\?; choose from self, inception, "),
        ("onnx", r"choose from .*onnx:PATH"),
        ("onnx:", r"choose from .*onnx:PATH"),
        ("resnet", r"choose from .*resnet:PATH"),
        ("dino:x", r"did you mean dinov2\?"),
        ("self:x", r"did you mean self\?"),
        ("", r"choose from"),
        ("timm:vit_small", r"timm needs torchvision, which breaks diffusers .* give onnx:PATH"),
    ],
)
def test_an_unknown_network_is_refused_with_the_choices(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        load(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["inception", "resnet", "onnx"])
def test_a_file_that_is_absent_a_directory_or_damaged_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is no file .*none\.bin"):
        load(f"{kind}:{tmp_path / 'none.bin'}")
    with pytest.raises(UserError, match=f"{tmp_path.name} is a directory"):
        load(f"{kind}:{tmp_path}")
    damaged = tmp_path / "damaged.bin"
    for content in (b"", b"garbage", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00", bytes(range(256)) * 20):
        damaged.write_bytes(content)
        monkeypatch.setattr(inception, "SHA256", sha256_of(damaged))
        with pytest.raises(UserError, match=r"damaged\.bin is damaged") as raised:
            load(f"{kind}:{damaged}")
        assert "\n" not in str(raised.value)


class Trap:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": Trap(tmp_path / "written")}}, tmp_path / "trap.th")
    with pytest.raises(UserError, match=r"trap\.th is damaged or holds more than tensors, and no code of a file is run"):
        load(f"resnet:{tmp_path / 'trap.th'}")
    assert not (tmp_path / "written").exists()


# what the images go through


def test_images_are_resized_by_pillow_with_antialiasing_and_scaled() -> None:
    images = pictures(3, 3, 40, 50)
    prepared = Preparation((10, 12), IMAGENET_MEAN, IMAGENET_STD)(images)
    for image, found in zip(images, prepared, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((12, 10), Image.Resampling.BILINEAR)
        wanted = (np.asarray(picture) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        torch.testing.assert_close(found, torch.from_numpy(wanted.transpose(2, 0, 1)).float(), atol=1e-5, rtol=0)
    every_fourth = torch.zeros(1, 1, 40, 40, dtype=torch.uint8)
    every_fourth[..., ::4] = 255  # all white or all black to one who skips pixels
    shrunk = Preparation((10, 10), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(every_fourth)
    assert shrunk.min() > 40 and shrunk.max() < 80


def test_gray_is_repeated_and_other_channels_refused() -> None:
    plain = Preparation(None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    gray = pictures(2, 1, 5, 6)
    torch.testing.assert_close(plain(gray), gray.expand(-1, 3, -1, -1).float(), atol=0, rtol=0)
    with pytest.raises(UserError, match="the images have 4 channels"):
        plain(pictures(2, 4, 5, 6))


def test_the_shorter_side_is_resized_and_the_middle_cut_out() -> None:
    preparation = Preparation(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), crop=(4, 6), resample=Image.Resampling.BICUBIC)
    image = pictures(1, 3, 16, 32)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((16, 8), Image.Resampling.BICUBIC).crop((5, 2, 11, 6))
    torch.testing.assert_close(preparation(image)[0], torch.from_numpy(np.array(picture)).permute(2, 0, 1).float(), atol=0, rtol=0)
    assert str(preparation) == "resized to shorter side 8 (Pillow, bicubic, antialiased), cut to the middle 6 x 4, RGB in 0..255"


# the published FID network


def meta_inception() -> Inception:
    with torch.device("meta"):
        return Inception()


@pytest.fixture(scope="module")
def inception_state() -> dict[str, Tensor]:
    return random_state(meta_inception())


@pytest.fixture
def inception_file(inception_state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights in a file of the published names, which is taken for the published one."""
    path = tmp_path / "published" / "weights.pth"
    path.parent.mkdir()
    torch.save(inception_state, path)
    monkeypatch.setattr(inception, "SHA256", sha256_of(path))
    monkeypatch.setattr(inception, "URL", path.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return path


def test_inception_gives_what_the_reference_implementation_gave(inception_file: Path) -> None:
    network = load(f"inception:{inception_file}")
    features = network.features(torch.cat([pictures(2, 3, 32, 32), 255 - pictures(2, 3, 32, 32)]), batch=3)
    assert features.shape == (4, network.dimensions) == (4, 2048)
    # torch-fidelity 0.4.0, with these weights and images
    wanted = [[0.17176, 1.10958, 21.2253, 586.6727], [0.0, 1.04497, 25.7341, 591.2289], [0.0, 1.46731, 18.5008, 599.0550]]
    torch.testing.assert_close(features[:3, [0, 500, 1000, 2047]], torch.tensor(wanted), atol=2e-3, rtol=1e-4)
    assert network.predict(pictures(2, 3, 32, 32)) is None
    assert network.is_fid
    assert network.provenance() == {
        "name": "Inception-v3 2015-12-05 (FID)",
        "hash": sha256_of(inception_file),
        "dimensions": 2048,
        "preprocessing": "resized to 299 x 299 (bilinear as in TensorFlow 1, not antialiased), RGB in 0..255, minus 128, over 128",
    }
    gray = pictures(1, 1, 20, 30)
    torch.testing.assert_close(network.features(gray), network.features(gray.expand(-1, 3, -1, -1)))


def test_inception_agrees_with_torch_fidelity(
    inception_state: dict[str, Tensor], inception_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec("torch_fidelity")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("needs torch_fidelity")
    package = types.ModuleType("torch_fidelity")  # its own __init__ needs torchvision
    package.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    reference = module.FeatureExtractorInceptionV3("reference", ["2048"], feature_extractor_weights_path=str(inception_file))
    assert set(reference.state_dict()) == set(inception_state)
    network = load(f"inception:{inception_file}")
    for size in ((32, 32), (299, 299), (320, 240)):
        images = pictures(2, 3, *size)
        torch.testing.assert_close(network.features(images), reference(images)[0], atol=1e-2, rtol=1e-4)


def test_inception_has_the_published_weights_by_name_and_size() -> None:
    state = meta_inception().state_dict()
    assert len(state) == 566
    assert sum(value.numel() for value in state.values()) == 23_885_486
    for key, shape in {
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch5x5_2.bn.running_mean": (64,),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6c.branch7x7dbl_5.conv.weight": (192, 160, 1, 7),
        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "fc.weight": (1008, 2048),
    }.items():
        assert tuple(state[key].shape) == shape, key


def test_resizing_as_in_tensorflow_1_has_no_half_pixel() -> None:
    row = torch.tensor([0.0, 10.0, 40.0])[None, None, None]
    torch.testing.assert_close(stretch(row, 3, 6).flatten(), torch.tensor([0.0, 5.0, 10.0, 25.0, 40.0, 40.0]), atol=0, rtol=0)
    torch.testing.assert_close(stretch(row.transpose(2, 3), 2, 6).flatten(), stretch(row, 3, 6).flatten(), atol=0, rtol=0)
    many = torch.arange(100.0)[None, None, None]
    torch.testing.assert_close(stretch(many, 3, 10).flatten(), torch.arange(0.0, 100.0, 10.0), atol=1e-4, rtol=0)  # skips pixels


def test_another_file_is_not_called_inception(inception_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"6726825d\.pth is not the published FID network: its SHA-256 begins .*, not 6726825d; fetch it"):
        load(f"inception:{path}")
    assert not InceptionNetwork("other", "0" * 64, 2048, 0, "", 32, meta_inception(), CPU).is_fid


def test_inception_is_found_in_the_cache_and_else_says_how_to_fetch_it(inception_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"not in .*cache; `inception:download` fetches them .*6726825d|inception:PATH"):
        load("inception", cache)
    assert not cache.exists()
    kept = tmp_path / "torch" / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"  # where pytorch-fid keeps it
    kept.parent.mkdir(parents=True)
    inception_file.rename(kept)
    assert load("inception", cache).is_fid
    cache.mkdir()
    kept.rename(cache / "weights-inception-2015-12-05-6726825d.pth")
    assert load("inception", cache).is_fid


def test_inception_is_fetched_on_request_and_checked(inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    assert load("inception:download", cache).is_fid
    assert [file.name for file in cache.iterdir()] == ["weights-inception-2015-12-05-6726825d.pth"]
    (cache / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"half")
    assert load("inception:download", cache).is_fid
    inception_file.write_bytes(b"somebody else's")
    assert load("inception:download", cache).is_fid  # once is enough
    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"cannot fetch file:.*invalid hash value .*; fetch it by hand"):
        load("inception:download", other)
    assert not list(other.iterdir())
    monkeypatch.setattr(inception, "URL", (tmp_path / "absent").as_uri())
    with pytest.raises(UserError, match=r"cannot fetch file:.*absent: .*; fetch it by hand and give inception:PATH"):
        load("inception:download", other)


# ResNets for CIFAR


@pytest.fixture
def resnet_state() -> dict[str, Tensor]:
    return random_state(ResNet((4, 6, 9), (1, 2, 1), 7))


def test_resnet_reads_its_shape_from_the_weights(resnet_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(resnet_state, tmp_path / "bare.pt")
    older = {f"module.{key}": value for key, value in resnet_state.items() if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": older, "best_prec1": 93.0}, tmp_path / "wrapped.th")
    network, wrapped = load(f"resnet:{tmp_path / 'bare.pt'}"), load(f"resnet:{tmp_path / 'wrapped.th'}")
    images = pictures(5, 3, 32, 32)
    torch.testing.assert_close(network.features(images), wrapped.features(images, batch=2), atol=1e-5, rtol=1e-5)
    assert (network.name, network.dimensions, network.num_classes) == ("ResNet-10 (7 classes)", 9, 7)
    assert network.hash == sha256_of(tmp_path / "bare.pt")
    assert not network.is_fid
    scores = F.linear(network.features(images), resnet_state["linear.weight"], resnet_state["linear.bias"])
    predicted = network.predict(images)
    assert predicted is not None
    assert torch.equal(predicted, scores.argmax(dim=1))
    assert accuracy_of(network, images, predicted) == 1.0
    assert network.features(pictures(2, 1, 48, 20)).shape == (2, 9)


def test_resnet_shortcuts_take_every_second_pixel_and_add_zero_channels() -> None:
    model = ResNet((2, 4, 6), (1, 1, 1), 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every branch gives nothing, and the shortcuts alone are left
        model.conv1.weight[:, :, 1, 1] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        model.bn1.weight.fill_(1.0)
    image = torch.rand(1, 3, 8, 8)
    expected = torch.zeros(1, 6)
    expected[:, 2:4] = image[:, :2, ::4, ::4].mean(dim=(2, 3))
    torch.testing.assert_close(model(image), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"linear.weight": None}, r"is no CIFAR ResNet .*: linear\.weight is missing"),
        ({"layer2.1.bn1.bias": None}, r": layer2\.1\.bn1\.bias is missing"),
        ({"layer2.0.shortcut.0.weight": torch.zeros(6, 4, 1, 1)}, r": it has layer2\.0\.shortcut\.0\.weight"),
        ({"layer3.0.conv2.weight": torch.zeros(9, 9, 1, 1)}, r": layer3\.0\.conv2\.weight is \(9, 9, 1, 1\), not \(9, 9, 3, 3\)"),
    ],
)
def test_a_file_that_is_no_such_resnet_is_refused(
    resnet_state: dict[str, Tensor], change: dict[str, Tensor | None], said: str, tmp_path: Path
) -> None:
    changed = {key: value for key, value in (resnet_state | change).items() if value is not None}
    torch.save(changed, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt " + r".*" + said):
        load(f"resnet:{tmp_path / 'other.pt'}")


@pytest.mark.parametrize(("content", "said"), [([1, 2], "holds a list"), ({"epoch": 3}, "holds epoch, a int, where")])
def test_a_file_that_is_no_state_dict_is_refused(content: object, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=said):
        load(f"resnet:{tmp_path / 'other.pt'}")


def test_the_published_resnet_56_knows_cifar10() -> None:
    if not RESNET56.is_file() or not CIFAR.is_file():
        pytest.skip(f"needs {RESNET56} and {CIFAR}")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = next(parquet.ParquetFile(CIFAR).iter_batches(batch_size=500)).to_pylist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows])
    labels = np.array([row["label"] for row in rows])
    network = load(f"resnet:{RESNET56}")
    assert isinstance(network, ResNetNetwork)
    assert network.name == "ResNet-56 (10 classes)"
    accuracy = accuracy_of(network, np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels)
    assert accuracy is not None
    assert 0.78 < accuracy < 0.89  # 83.2 % of all 10 000: this copy of the images is JPEG
