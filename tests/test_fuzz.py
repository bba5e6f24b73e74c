"""Damaged files and configurations are taken or refused by name: never a traceback, a hang, or memory without bounds."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_helpers import settings

from maskdm.data import BrokenImage, decode, inspect, open_source
from maskdm.errors import UserError
from maskdm.settings import read_yaml
from tests.fuzz.configurations import TEXTS, attempt_configuration, line_mutant, yaml_mutant
from tests.fuzz.files import FORMATS, attempt, bombs, mutant, wholes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_some_damaged_files(kind: str) -> None:
    for number in range(25):
        attempt(kind, number)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["yaml", "line"])
def test_some_damaged_configurations(kind: str) -> None:
    for number in range(12):
        attempt_configuration(kind, number)


def test_a_case_is_the_same_for_ever() -> None:
    assert mutant("png", 3) == mutant("png", 3) != mutant("png", 4)
    assert yaml_mutant(500) == yaml_mutant(500) != yaml_mutant(501)
    assert line_mutant(5) == line_mutant(5) != line_mutant(6)


def test_undamaged_files_are_taken() -> None:
    for kind in FORMATS:
        for data in wholes(kind) if kind not in ("npy", "npz", "parquet") else ():
            assert decode(data, settings())[0].shape == (8, 8, 3)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_wrong_and_hostile_yaml_is_read_or_refused_in_a_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = str(file)
    try:
        assert isinstance(read_yaml(file), dict)
    except UserError as error:
        said = str(error)
    assert str(file) in said and "\n" not in said and len(said) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_key_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data:\n  flip: 0.5\n  heldout: 0.1\n  flip: 0\n")
    with pytest.raises(UserError, match="'flip' is given twice"):
        read_yaml(tmp_path / "c.yaml")


def test_aliases_within_bounds_are_taken(tmp_path: Path) -> None:
    text = "base: &b {lr: 1e-4}\nstages: [{<<: *b, name: a}, {<<: *b, name: b}]\n"
    (tmp_path / "c.yaml").write_text(text)
    assert read_yaml(tmp_path / "c.yaml") == yaml.safe_load(text)


def test_bombs_are_refused_before_they_go_off(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from tests.fuzz.files import bombs
from maskdm.config import Data
from maskdm.data import BrokenImage, decode, open_source
from maskdm.errors import UserError
for name, write in bombs().items():
    path = write(Path(sys.argv[1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode(path, Data(source="x", image_size=(8, 8))) if path.suffix == ".png" else open_source(str(path))
        print(name, "taken", end=" ")
    except (BrokenImage, UserError) as error:
        print(name, "refused", end=" ")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", "."])}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    for name, said, grown in map(str.split, done.stdout.splitlines()):
        assert said == "refused", name
        assert int(grown) < 100_000, name  # KiB
    assert len(done.stdout.splitlines()) == len(bombs())


def test_what_a_table_names_is_read_only_where_it_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.png").touch()
    os.truncate(tmp_path / "large.png", (1 << 30) + 1)
    for path, reason in ((Path("/dev/zero"), "not a file"), (tmp_path / "pipe", "not a file"), (tmp_path / "large.png", "1 GiB")):
        with pytest.raises(BrokenImage, match=reason):
            decode(path, settings())


def test_arrays_of_no_pixels_and_of_no_shape_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "empty.npy", np.zeros((3, 0, 8, 3), dtype=np.float32))
    np.savez(tmp_path / "scalar.npz", images=np.uint8(3), labels=np.array([1]))
    for name, reason in (("empty.npy", "no pixels"), ("scalar.npz", "has shape")):
        with pytest.raises(UserError, match=reason):
            open_source(str(tmp_path / name))


def test_cells_that_hold_no_image_are_listed_as_broken(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for cells in ([{"bytes": 5, "path": "x"}] * 2, [{"bytes": None, "path": 7}] * 2):
        parquet.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
        source = open_source(str(tmp_path / "t.parquet"))
        assert inspect(source).readable == 0
        with pytest.raises(BrokenImage, match="not the bytes of an image"):
            source.load(0)


@pytest.mark.slow  # about 3 minutes on two cores
@pytest.mark.timeout(3600)
def test_a_thousand_damaged_files_of_each_format_and_five_hundred_configurations() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.fuzz"], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["cases"] == 1000 * len(FORMATS) + 500
