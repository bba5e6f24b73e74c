"""One comparison out of several: `python -m benchmarks.pool CMP [CMP ...] --out DIR [--against ARM]`.

CMP: directories of `maskdm compare`, or their compare.json files, of the same arms, data, budget and settings but of other seeds
(`--first-seed`): run on several machines, or on one whenever it has time. Writes DIR/compare.json and compare.png as the command does, and
prints the table and the verdicts over all seeds. An arm and its rival of one seed have run side by side on one machine, so that their
quotient does not depend on which; times and FLOPs a second of different seeds do.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from maskdm.errors import UserError
from maskdm.runs.compare_results import Contest, summarize

SAME = ("budget", "data_hash", "config", "unit", "heldout_images", "flops")
"""What comparisons must have in common."""

BY_FEATURES = ("frechet_distance", "kernel_distance", "precision", "recall", "copies")
"""Figures that other features give other values: left out unless the network is one and the same."""


def pooled(records: list[dict[str, Any]], against: str | None = None) -> tuple[Contest, dict[str, Any]]:
    """The contest over all their seeds, the others `against` one arm (None: the first), and what it was about.

    Raises UserError where they do not belong together.
    """
    if any("first_seed" not in record for record in records):
        raise UserError("give what `maskdm compare` wrote: comparisons once pooled are not pooled again")
    first = records[0]
    arms = [name for name in first["arms"] if all(name in record["arms"] for record in records)]
    if not arms:
        raise UserError("the comparisons have no arm in common")
    if against is not None and against not in arms:
        raise UserError(f"--against {against} is no arm of all of them; there are {', '.join(arms)}")
    arms.sort(key=lambda name: name != against)
    for record in records:
        for key in SAME:
            if key not in record or record[key] != first.get(key):
                raise UserError(f"the comparisons differ in {key}, so their seeds cannot be pooled")
    for name in arms:
        if any(record["specs"][name] != first["specs"][name] for record in records):
            raise UserError(f"arm {name} is not the same in all of them")
        asked = [final.get("asked", {}) for record in records for final in record["finals"][name]]
        if len({(each.get("num"), each.get("reference")) for each in asked}) > 1:
            raise UserError(f"arm {name} was not measured with as many samples (--num) against the same images in all of them")
    seeds = [seed for record in records for seed in range(record["first_seed"], record["first_seed"] + record["seeds"])]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the comparisons have seeds in common ({', '.join(map(str, sorted(seeds)))}); give each once")
    alike = all(record["features"] == first["features"] for record in records)
    left_out = () if alike else BY_FEATURES
    curves = {arm: [list(map(_read, seed)) for record in records for seed in record["curves"][arm]] for arm in arms}
    finals = {
        arm: [{key: each[key] for key in each if key not in left_out} for record in records for each in record["finals"][arm]]
        for arm in arms
    }
    contest = Contest(curves, finals, first["unit"], frozenset(first["decaying"]))
    about = {key: first[key] for key in ("budget", "data", "data_hash", "config", "heldout_images", "flops", "specs", "networks")}
    return contest, about | {"seeds": len(seeds), "pooled_seeds": seeds, "environments": [record["environment"] for record in records]}


def _read(point: dict[str, Any]) -> dict[str, Any]:
    """A loss that is not a number is null in JSON."""
    return point | {"loss": math.nan if point["loss"] is None else point["loss"]}


def main() -> None:
    """Parse, pool, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", help="the arm that the others are compared with, in place of the first")
    given = parser.parse_args()
    files = [path / "compare.json" if path.is_dir() else path for path in given.comparisons]
    try:
        contest, about = pooled([json.loads(file.read_text()) for file in files], given.against)
    except (OSError, UserError) as error:
        raise SystemExit(f"error: {error}") from None
    given.out.mkdir(parents=True, exist_ok=True)
    print(summarize(contest, about, given.out))


if __name__ == "__main__":
    main()
