"""Folders of the Transformers library as feature networks: tiny random ones, saved and read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maskdm.engine import Ranks
from maskdm.errors import UserError
from maskdm.evaluation import Extractor, FeatureNetwork, ImageSet, load_network
from maskdm.evaluation.weights import sha256_of

transformers = pytest.importorskip("transformers")

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
SQUARE = {"size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "resample": 2}


def pictures(count: int, channels: int = 3, height: int = 40, width: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def write(model: Any, folder: Path, processor: dict[str, Any] | None = None) -> Path:
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SQUARE if processor is None else processor))
    return folder


def load(spec: str) -> FeatureNetwork:
    return load_network(spec, Path("nowhere"), torch.device("cpu"))


def prepared(images: Tensor) -> Tensor:
    """What `SQUARE` says, done by hand."""
    arrays = [np.asarray(Image.fromarray(each.permute(1, 2, 0).numpy()).resize((28, 28), Image.Resampling.BILINEAR)) for each in images]
    pixels = (np.stack(arrays) / 255 - SQUARE["image_mean"]) / SQUARE["image_std"]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()


def close(found: Tensor, wanted: Tensor) -> None:
    assert wanted.std(dim=0).mean() > 1e-4  # images differ
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_dinov2_gives_the_class_token_of_the_last_layer(tmp_path: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**TOWER))
    folder = write(model, tmp_path / "tiny")
    network = load(f"dinov2:{folder}")
    images = pictures(5)
    wanted = model(pixel_values=prepared(images)).last_hidden_state[:, 0]
    close(network.features(images, batch=2), wanted)
    assert network.name == "tiny (dinov2, pooled output)"
    assert (network.dimensions, network.num_classes, network.is_fid) == (32, 0, False)
    assert network.hash == sha256_of(folder / "model.safetensors")
    assert network.preprocessing == (
        "resized to 28 x 28 (Pillow, bilinear, antialiased), RGB in 0..255, minus (127.5, 102, 76.5), over (127.5, 63.75, 51)"
    )
    assert network.predict(images) is None
    assert network.features(pictures(2, channels=1)).shape == (2, 32)
    close(load(f"transformers:{folder}").features(images), wanted)


@torch.no_grad()
def test_clip_gives_its_projected_embedding_from_one_tower_or_both(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        vision_config=TOWER,
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 100},
        projection_dim=24,
    )
    both = transformers.CLIPModel(config)
    tower = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(projection_dim=24, **TOWER))
    tower.vision_model.load_state_dict(both.vision_model.state_dict())
    tower.visual_projection.load_state_dict(both.visual_projection.state_dict())
    images = pictures(4)
    wanted = tower(pixel_values=prepared(images)).image_embeds
    for name, model in (("both", both), ("tower", tower)):
        network = load(f"clip:{write(model, tmp_path / name)}")
        assert network.dimensions == 24
        assert network.name.endswith("projected image embedding)")
        close(network.features(images), wanted)


@torch.no_grad()
def test_without_pooling_weights_the_tokens_are_averaged_and_it_is_said(tmp_path: Path) -> None:
    config = transformers.ViTConfig(num_labels=3, **TOWER)
    images = pictures(4)
    pooling = transformers.ViTModel(config)
    network = load(f"transformers:{write(pooling, tmp_path / 'pooling')}")
    assert network.name == "pooling (vit, pooled output)"
    close(network.features(images), pooling.eval()(pixel_values=prepared(images)).pooler_output)
    classifier = transformers.ViTForImageClassification(config)  # has none, and the library would make random ones up
    network = load(f"transformers:{write(classifier, tmp_path / 'classifier')}")
    assert network.name == "classifier (vit, mean of the tokens)"
    close(network.features(images), classifier.vit(pixel_values=prepared(images)).last_hidden_state.mean(dim=1))


def test_features_of_another_configuration_are_kept_apart(tmp_path: Path) -> None:
    folder = write(transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)), tmp_path / "tiny")
    images = ImageSet(pictures(11).permute(0, 2, 3, 1).contiguous().numpy(), np.arange(11), "some")
    before = Extractor(load(f"dinov2:{folder}"), tmp_path / "cache", Ranks())
    config = json.loads((folder / "config.json").read_text()) | {"hidden_act": "relu"}  # the same weights compute something else
    (folder / "config.json").write_text(json.dumps(config))
    after = Extractor(load(f"dinov2:{folder}"), tmp_path / "cache", Ranks())
    assert before.network.hash == after.network.hash
    assert not torch.allclose(before.features(images), after.features(images))
    close(after.features(images), after.network.features(pictures(11)))
    assert after.network.provenance()["reading"] == "pooled output"
    assert after.network.provenance()["config_hash"] == sha256_of(folder / "config.json")


@torch.no_grad()
def test_a_convolutional_network_is_read_too(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetModel(config)
    network = load(f"transformers:{write(model, tmp_path / 'resnet')}")
    images = pictures(3)
    assert network.dimensions == 12
    close(network.features(images), model.eval()(pixel_values=prepared(images)).pooler_output.flatten(1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        # facebook/dinov2-small, openai/clip-vit-base-patch32, google/vit-base-patch16-224, as published
        (
            {"do_resize": True, "size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}},
            "resized to shorter side 32 (Pillow, bicubic, antialiased), cut to the middle 28 x 28, ",
        ),
        ({"size": 28, "do_center_crop": True, "crop_size": 28}, "resized to shorter side 28 (Pillow, bicubic, antialiased), cut to "),
        ({"do_resize": True, "size": 28}, "resized to 28 x 28 (Pillow, bicubic, antialiased), RGB in 0..255, minus "),
    ],
)
def test_the_processor_of_the_folder_is_followed(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**TOWER))
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3, "do_normalize": True}
    network = load(f"transformers:{write(model, tmp_path / 'a', numbers | settings)}")
    assert network.preprocessing.startswith(said)
    assert network.preprocessing.endswith("RGB in 0..255, minus 127.5, over 63.75")
    assert network.features(pictures(2)).shape == (2, 32)
    unscaled = load(f"transformers:{write(model, tmp_path / 'b', numbers | settings | {'do_normalize': False})}")
    assert unscaled.preprocessing.endswith("RGB in 0..255, minus 0, over 255")


def test_a_processor_of_version_5_is_found_in_its_own_file(tmp_path: Path) -> None:
    folder = write(transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)), tmp_path / "a")
    plain = load(f"dinov2:{folder}").preprocessing
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json is missing; copy it"):
        load(f"dinov2:{folder}")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert load(f"dinov2:{folder}").preprocessing == plain


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"do_pad": True}, "asks for do_pad, which is not known here"),
        ({"crop_pct": 0.875}, "asks for crop_pct"),
        ({"size": {"longest_edge": 28}}, "cannot read 'height' in it"),
        ({"image_mean": [0.5]}, "cannot read"),
        ({"resample": 17}, "cannot read 17"),
        ({"crop_size": {"height": 40, "width": 28}}, "cuts out 28 x 40 of"),
        ({"size": {"height": 30, "width": 30}}, "fails on an image that is resized to 30 x 30"),
    ],
)
def test_a_processor_that_cannot_be_followed_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**TOWER))
    folder = write(model, tmp_path / "a", SQUARE | settings)
    with pytest.raises(UserError, match=said) as raised:
        load(f"transformers:{folder}")
    assert "\n" not in str(raised.value)


def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"clip:.*none is no folder"):
        load(f"clip:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no .*config\.json"):
        load(f"transformers:{tmp_path / 'empty'}")
    vit = write(transformers.ViTModel(transformers.ViTConfig(**TOWER)), tmp_path / "vit")
    for family in ("dinov2", "clip"):
        with pytest.raises(UserError, match=r"holds a network of the type vit; give it as transformers:"):
            load(f"{family}:{vit}")
    text = transformers.BertModel(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    )
    with pytest.raises(UserError, match=r"of the type bert, which reads input_ids, not images alone"):
        load(f"transformers:{write(text, tmp_path / 'text')}")
    weights = vit / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:200])
    with pytest.raises(UserError, match=r"vit cannot be loaded by the Transformers library: "):
        load(f"transformers:{vit}")
    weights.unlink()
    torch.save(text.state_dict(), vit / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"vit has no model\.safetensors; pickled weights .* are not read"):
        load(f"transformers:{vit}")
    (vit / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is no JSON"):
        load(f"transformers:{vit}")
    assert capfd.readouterr().out == ""


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write(transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)), tmp_path / "tiny")
    state = load_file(folder / "model.safetensors")
    lost = sorted(key for key in state if "layer.1" in key and "norm1" in key)
    assert lost
    save_file({key: value for key, value in state.items() if key not in lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"tiny lacks 2 of the network's weights, such as .*norm1\.bias"):
        load(f"dinov2:{folder}")


def test_split_weights_are_hashed_together(tmp_path: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**TOWER))
    whole = load(f"dinov2:{write(model, tmp_path / 'whole')}")
    folder = write(model, tmp_path / "split")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert not (folder / "model.safetensors").exists()
    split = load(f"dinov2:{folder}")
    assert split.hash != whole.hash
    close(split.features(pictures(3)), whole.features(pictures(3)))


def test_without_the_library_the_way_to_install_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)), tmp_path / "tiny")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'maskdm\[transformers\]'"):
        load(f"dinov2:{folder}")
