"""What benchmarks.transfer makes of what it is given and of what was found; the training is `maskdm`'s own."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.transfer import Few, chosen, ratios


def test_a_set_is_named_with_what_is_taken_of_it() -> None:
    assert Few.parse("flowers=a/b:c.parquet:300+1000/flip") == Few("flowers", "a/b:c.parquet", (300, 1000), True)
    assert Few.parse("emoji=e.parquet:300") == Few("emoji", "e.parquet", (300,), False)
    for wrong in ("e.parquet:300", "emoji=e.parquet", "emoji=e.parquet:many", "emoji=e.parquet:300/flop"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not NAME="):
            Few.parse(wrong)


def test_images_are_left_out_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "e.parquet"
    images = [{"bytes": b"", "path": name} for name in ("emoji_u1f44b.png", "emoji_u1f44b_1f3fb.png", "emoji_u1f44b_1f3ff.png")]
    pq.write_table(pa.table({"image": images}), file)
    given = argparse.Namespace(drop="1f3f[b-f]", out=tmp_path / "out")
    left = pq.read_table(chosen(given, Few("emoji", str(file), (1,), False)))
    assert [image["path"] for image in left["image"].to_pylist()] == ["emoji_u1f44b.png"]
    assert chosen(argparse.Namespace(drop=None, out=tmp_path), Few("emoji", str(file), (1,), False)) == str(file)


def test_distances_are_compared_seed_by_seed() -> None:
    def finals(*values: float) -> list[dict[str, Any]]:
        return [{"frechet_distance": value, "kernel_distance": value / 100 - 0.02} for value in values]

    found = {"finals": {"masked": finals(3.0, 6.0, 4.0), "scratch": finals(6.0, 12.0, 8.0), "whole": finals(3.0, 1.0, 4.0)}}
    of_scratch, kernel, of_whole, negative = ratios(found)
    assert (of_scratch["against"], of_whole["against"], of_scratch["seeds"]) == ("scratch", "whole", 3)
    assert of_scratch["ratio"] == pytest.approx(0.5) == of_scratch["low"] == of_scratch["high"]
    assert kernel["ratio"] == pytest.approx(math.exp(sum(math.log(a / b) for a, b in ((1, 4), (4, 10), (2, 6))) / 3))
    assert of_whole["low"] < 1 < of_whole["high"] and negative["ratio"] is None
    found["finals"]["masked"][1] = {}
    assert all(row["ratio"] is None for row in ratios(found))
    one = {"finals": {name: finals(3.0) for name in ("masked", "scratch", "whole")}}
    assert [(row["ratio"], row["low"]) for row in ratios(one)] == [(pytest.approx(1.0), None)] * 4
