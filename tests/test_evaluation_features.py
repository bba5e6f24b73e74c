from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdm.errors import UserError
from maskdm.evaluation import SelfNetwork, Statistics, cached_self, frechet_distance, load_self, nearest, train_self
from maskdm.evaluation import training as training_module
from maskdm.evaluation.training import augment

Digits = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Digits:
    from sklearn.datasets import load_digits

    pixels, classes = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(classes))
    images = torch.from_numpy((pixels[order] * (255 / 16)).round().astype(np.uint8)).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(classes[order]).long()
    return images[359:], labels[359:], images[:359], labels[:359]


@pytest.fixture(scope="module")
def network(digits: Digits) -> SelfNetwork:
    return train_self(*digits, seed=0, max_seconds=600.0, steps=120)


def test_supervised_network_knows_held_out_digits(network: SelfNetwork, digits: Digits) -> None:
    _, _, images, labels = digits
    predicted = network.predict(images)
    assert predicted is not None
    assert network.accuracy_heldout == pytest.approx(float((predicted == labels).double().mean()))
    assert float((predicted == labels).double().mean()) > 0.97
    assert network.name == "self (supervised, 10 classes)"
    assert not network.training.cut_short


def test_features_of_training_images_are_standardised_and_do_not_depend_on_the_batch(network: SelfNetwork, digits: Digits) -> None:
    features = network.features(digits[0])
    assert features.shape == (1438, network.dimensions)
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(128), atol=1e-3, rtol=0)
    torch.testing.assert_close(features.std(dim=0), torch.ones(128), atol=1e-3, rtol=0)
    torch.testing.assert_close(network.features(digits[0].numpy()[:100], batch=7), features[:100], atol=1e-4, rtol=1e-4)
    assert network.features(digits[0][:0]).shape == (0, 128)


def test_held_out_features_look_like_training_features(network: SelfNetwork, digits: Digits) -> None:
    train, heldout = network.features(digits[0]), network.features(digits[2])
    distance = frechet_distance(Statistics.of(heldout), Statistics.of(train))
    apart = frechet_distance(Statistics.of(network.features(255 - digits[2])), Statistics.of(train))
    assert distance < 2.8  # of a total variance of 128; sampling alone gives about 1 for 359 against 1 438 images
    assert apart > 20 * distance


def test_same_seed_same_network(digits: Digits) -> None:
    few = (digits[0][:200], digits[1][:200], digits[2][:20], digits[3][:20])
    first, again = (train_self(*few, seed=1, steps=4) for _ in range(2))
    assert first.hash == again.hash
    torch.testing.assert_close(first.features(digits[2]), again.features(digits[2]), atol=0, rtol=0)
    assert train_self(*few, seed=2, steps=4).hash != first.hash


def test_training_leaves_the_global_generator_alone(digits: Digits) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_self(*digits, seed=1, steps=2)
    torch.testing.assert_close(torch.rand(3), expected, atol=0, rtol=0)


def test_self_supervised_features_keep_digits_together(digits: Digits) -> None:
    train, train_labels, heldout, heldout_labels = digits
    network = train_self(train, None, heldout, None, seed=0, max_seconds=600.0, steps=60)
    assert network.name == "self (self-supervised)"
    assert network.predict(heldout) is None
    assert network.num_classes == 0
    assert network.accuracy_heldout is None
    found = nearest(network.features(heldout), network.features(train)).indices[:, 0]
    assert float((train_labels[found] == heldout_labels).double().mean()) > 0.85


def test_one_class_is_no_supervision(digits: Digits) -> None:
    same = torch.zeros(len(digits[0]), dtype=torch.int64)
    assert train_self(digits[0], same, digits[2], same[:359], seed=0, steps=1).predict(digits[2]) is None


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 20), (3, 96, 64), (3, 4, 4)])
def test_any_size_and_colour(shape: tuple[int, int, int]) -> None:
    images = torch.randint(0, 256, (24, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = train_self(images, torch.arange(24) % 3, images[:0], None, seed=0, steps=2)
    assert network.features(images).shape == (24, 128)
    assert torch.isfinite(network.features(images)).all()
    assert network.accuracy_heldout is None
    assert ("averaged down to 43 x 64" in network.preprocessing) == (shape == (3, 96, 64))


def test_a_network_that_gives_nan_is_refused(network: SelfNetwork, digits: Digits) -> None:
    broken = copy.deepcopy(network)
    broken.encoder.scale.running_mean.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"features of self \(supervised, 10 classes\) hold NaN"):
        broken.features(digits[2])


def test_images_mapped_from_a_file_are_read_in_pieces(network: SelfNetwork, digits: Digits, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", digits[2].numpy())
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    torch.testing.assert_close(network.features(mapped, batch=100), network.features(digits[2], batch=100), atol=0, rtol=0)
    assert mapped.flags.writeable is False


def test_save_and_load(network: SelfNetwork, digits: Digits, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "network.safetensors"
    network.save(path)
    loaded = load_self(path)
    assert loaded.num_classes == 10
    assert not loaded.is_fid
    assert loaded.provenance()["preprocessing"] == "each channel to mean 0 and deviation 1 over the training images"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert loaded.provenance() == network.provenance()
    torch.testing.assert_close(loaded.features(digits[2]), network.features(digits[2]), atol=0, rtol=0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="delete it"):
        load_self(path)
    path.write_bytes(bytes(content[:100]))
    with pytest.raises(UserError, match="delete it"):
        load_self(path)


def test_cache_trains_once_per_key_and_again_when_damaged(digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []

    def quick(*args: object, device: torch.device) -> SelfNetwork:
        trained.append(1)
        return train_self(*digits, seed=3, steps=1)

    monkeypatch.setattr(training_module, "train_self", quick)
    first = cached_self(tmp_path, "a", *digits, seed=3)
    assert cached_self(tmp_path, "a", *digits, seed=3).hash == first.hash
    assert len(trained) == 1
    cached_self(tmp_path, "b", *digits, seed=3)
    cached_self(tmp_path, "a", *digits, seed=4)
    assert len(trained) == 3
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert cached_self(tmp_path, "a", *digits, seed=3).hash == first.hash
    assert len(trained) == 4


def test_time_limit_ends_the_training_and_is_recorded(digits: Digits) -> None:
    network = train_self(*digits, seed=0, max_seconds=0.3, steps=5000)
    assert network.training.cut_short
    assert network.training.steps < 500
    assert network.provenance()["cut_short"] is True


def test_augmentation_moves_light_and_place_and_covers_a_square_alone() -> None:
    image = torch.zeros(200, 3, 16, 16)
    image[:, :, 8, 8] = 1
    seen = augment(image, torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[:, 0], seen[:, 2], atol=0, rtol=0)  # no channel is changed alone
    background = seen[:, 0].flatten(1).median(dim=1).values
    assert background.abs().max() <= 0.3
    assert background.std() > 0.1
    height = seen[:, 0].flatten(1).amax(dim=1) - background
    spots = (seen[:, 0] - background[:, None, None] > 0.6) & (height > 0.69)[:, None, None]
    visible = spots.flatten(1).any(dim=1)
    assert 150 < visible.sum() < 200  # the square covers the spot of some
    rows, columns = spots[visible].nonzero()[:, 1], spots[visible].nonzero()[:, 2]
    assert len(rows) == visible.sum()  # nothing is smeared over two pixels
    assert set(rows.tolist()) == set(columns.tolist()) == {6, 7, 8, 9, 10}
    covered = (seen[:, 0] == 0).flatten(1).sum(dim=1)
    assert (covered == 16).double().mean() > 0.9


def test_bad_images_are_named(network: SelfNetwork, digits: Digits) -> None:
    with pytest.raises(UserError, match=r"trained on images of 1 x 8 x 8 .* these are 3 x 8 x 8"):
        network.features(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match="at least 10 images, here 9"):
        train_self(digits[0][:9], digits[1][:9], digits[2], digits[3], seed=0)
