from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import digit, settings
from hypothesis import given
from hypothesis import strategies as st

from maskdm.data import Dataset, Feed, Loader, flip, open_source, prepare, to_model_range, to_uint8
from maskdm.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(open_source("digits"), settings(), tmp_path_factory.mktemp("cache"))


def test_every_epoch_is_a_permutation_of_its_own(data: Dataset) -> None:
    rows = np.arange(0, 300, 3, dtype=np.int64)
    loader = Loader(data, rows, seed=5)
    epochs = [loader.indices_at(epoch * 100, 100) for epoch in range(4)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), rows)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not np.array_equal(epochs[0], Loader(data, rows, seed=6).indices_at(0, 100))


@given(position=st.integers(0, 10**6), count=st.integers(0, 60), split=st.integers(0, 60))
def test_a_position_means_the_same_rows_whatever_came_before(data: Dataset, position: int, count: int, split: int) -> None:
    rows = np.arange(17, dtype=np.int64)
    fresh = Loader(data, rows, seed=1).indices_at(position, count)
    used = Loader(data, rows, seed=1)
    used.batch(3, 40)
    split = min(split, count)
    parts = [used.indices_at(position + split, count - split), used.indices_at(position, split)]
    assert np.array_equal(fresh, np.concatenate(parts[::-1]))
    assert fresh.dtype == np.int64


def test_batches_hold_the_images_and_labels_of_their_rows(data: Dataset) -> None:
    loader = Loader(data, np.arange(1797, dtype=np.int64), seed=0)
    batch = loader.batch(1790, 20)
    assert batch.images.shape == (20, 3, 8, 8)
    assert batch.images.is_contiguous()
    assert batch.labels is not None
    target = open_source("digits")
    for image, label, row in zip(batch.images, batch.labels, batch.rows, strict=True):
        assert np.array_equal(image[1].numpy(), np.asarray(digit(int(row))))
        assert int(label) == target.label(int(row))
    assert batch.rows.tolist() == loader.indices_at(1790, 20).tolist()


def test_batches_may_be_written_to_and_moved(data: Dataset) -> None:
    loader = Loader(data, np.arange(10, dtype=np.int64), seed=0)
    before = loader.batch(0, 4)
    loader.batch(0, 4).images.zero_()
    assert torch.equal(loader.batch(0, 4).images, before.images)
    assert before.to(torch.device("meta")).images.device.type == "meta"


def test_without_classes_there_are_no_labels(data: Dataset, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asarray(data.images[:4]))
    plain = prepare(open_source(str(tmp_path / "a.npy")), settings(), tmp_path / "cache")
    batch = Loader(plain, np.arange(4, dtype=np.int64), seed=0).batch(0, 3)
    assert batch.labels is None
    assert batch.to(torch.device("cpu")).labels is None


def test_the_order_is_the_same_in_another_process(data: Dataset) -> None:
    script = (
        "import numpy as np; from maskdm.data import Loader; from types import SimpleNamespace\n"
        "print(Loader(SimpleNamespace(), np.arange(50), 9).indices_at(70, 40).tolist())"
    )
    env = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    printed = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(Loader(data, np.arange(50, dtype=np.int64), 9).indices_at(70, 40).tolist())


def test_an_empty_loader_is_refused(data: Dataset) -> None:
    with pytest.raises(UserError, match="heldout"):
        Loader(data, np.zeros(0, dtype=np.int64), seed=0)


def test_model_range_and_back_is_exact() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    scaled = to_model_range(every)
    assert scaled.dtype == torch.float32
    assert (scaled.min().item(), scaled.max().item()) == (-1, 1)
    assert torch.equal(to_uint8(scaled), every)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0])).tolist() == [0, 255, 128]
    assert torch.equal(to_uint8(scaled.double()), every)


def test_flip_mirrors_the_masked_images_alone(data: Dataset) -> None:
    images = Loader(data, np.arange(10, dtype=np.int64), seed=0).batch(0, 2).images
    flipped = flip(images, torch.tensor([True, False]))
    assert torch.equal(flipped[0], images[0].flip(2))
    assert not torch.equal(flipped[0], images[0])
    assert torch.equal(flipped[1], images[1])


@pytest.mark.parametrize("way", ["read", "kept", "ahead"])
def test_a_feed_gives_the_loaders_batches(data: Dataset, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways of a GPU too, as far as a CPU goes: kept on the device, and read ahead by a thread."""
    loader = Loader(data, np.arange(100, dtype=np.int64), seed=0)
    feed = Feed(loader, torch.device("cpu"))
    if way == "kept":
        feed.keep()
        monkeypatch.setattr(loader, "batch", None)  # nothing is read any more
    elif way == "ahead":
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        feed.read_ahead()
    other = Loader(data, np.arange(100, dtype=np.int64), seed=0)
    for position, count in ((0, 7), (7, 7), (14, 3), (90, 20), (5, 1)):  # in order, another size, over the end of an epoch, and back
        got, expected = feed.batch(position, count), other.batch(position, count)
        assert torch.equal(got.images, expected.images) and torch.equal(got.rows, expected.rows)
        assert got.labels is not None and expected.labels is not None and torch.equal(got.labels, expected.labels)
    assert feed.seconds > 0
