"""What a comparison found: a table, a picture, compare.json, and verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.evaluation.intervals import Estimate, difference_of_shares
from maskdm.evaluation.speedups import Curve, Unit, Verdict, compare_curves, over_seeds
from maskdm.runs.directory import write_text

Record = dict[str, Any]
"""A measurement on the way: what was spent, and the held-out loss."""

FIGURES = {
    "loss": ("denoising", "heldout"),
    "distance": ("frechet_distance",),
    "kernel_distance": ("kernel_distance",),
    "precision": ("precision",),
    "recall": ("recall",),
    "copies": ("copies", "share"),
}
"""Figures of an arm, and where they stand in an evaluation."""

SHARES = frozenset({"precision", "recall", "copies"})
"""Of an arm's figures, those that lie in 0..1, whatever Student's interval of a few seeds says."""

LEAST_STEPS = 40
"""Two a turn; with fewer the turns are not of a length."""

AXES = {"seconds": ("training time, minutes", 60.0), "flops": ("FLOPs of training", 1.0), "images": ("images seen", 1.0)}


@dataclass(frozen=True)
class Contest:
    """Records and final measures of each arm, a list over seeds; the first arm is what the others are compared with."""

    records: Mapping[str, Sequence[Sequence[Record]]]
    finals: Mapping[str, Sequence[Mapping[str, Any]]]
    unit: Unit
    decaying: frozenset[str] = frozenset()
    """Arms whose learning rate falls: only their ends compare."""

    def curves(self, arm: str) -> list[Curve]:
        """The losses of an arm against its budget's unit."""
        return [Curve(tuple(float(r[self.unit]) for r in seed), tuple(float(r["loss"]) for r in seed)) for seed in self.records[arm]]


def summarize(contest: Contest, about: Mapping[str, Any], out: Path) -> str:
    """Write compare.json and compare.png; return the table and the verdicts."""
    arms = {name: _figures(contest, name) for name in contest.records}
    first, *others = contest.records
    verdicts = [_verdict(contest, name, first) for name in others]
    features = next((final["features"] for final in contest.finals[first] if "features" in final), None)  # not of one that diverged
    record = {**about, "features": features, "arms": arms, "verdicts": verdicts, "curves": contest.records, "finals": contest.finals}
    record |= {"unit": contest.unit, "decaying": sorted(contest.decaying)}
    write_text(out / "compare.json", json.dumps(_plain(record), indent=1))
    draw(contest, arms, out / "compare.png")
    lines = [_table(arms), *_speeds(arms), *(verdict["text"] for verdict in verdicts)]
    if len(others) > 2:
        lines.append(f"{len(others)} comparisons: of twenty arms that are the same as {first} one would seem different by chance")
    return "\n".join([*lines, f"picture: {out / 'compare.png'}", f"figures: {out / 'compare.json'}"])


def _figures(contest: Contest, arm: str) -> dict[str, Any]:
    """Means over seeds with Student's interval; of one seed, the evaluation's own interval where it has one."""
    last = [seed[-1] for seed in contest.records[arm]]
    found: dict[str, Any] = {"seeds": len(last)}
    for key, name in (("seconds", "time"), ("flops", "flops"), ("images", "images"), ("steps", "steps")):
        found |= _put(name, over_seeds([float(record[key]) for record in last]))
    for name, path in FIGURES.items():
        if (each := _estimates(contest.finals[arm], path)) is not None:
            found |= _put(name, each[0] if len(each) == 1 else _over_seeds(name, each, 0.0))
    found["stages"] = [_speed(contest, arm, number) for number in range(len(contest.finals[arm][0].get("stages", ())))]
    return found


def _speed(contest: Contest, arm: str, number: int) -> dict[str, Any]:
    """A stage's images per second, median over seeds, and what the arithmetic alone would give, against whole images' of any arm.

    Of any that trains the same network: one from elsewhere is only compared with itself.
    """
    here = [final["stages"][number] for final in contest.finals[arm]]
    rates = [stage["images_per_second"] for stage in here if stage["images_per_second"]]
    everywhere = [stage for finals in contest.finals.values() for final in finals for stage in final.get("stages", ())]
    alike = [stage for stage in everywhere if stage["mask"] == "none" and stage.get("network") == here[0].get("network")]
    whole = [stage["images_per_second"] for stage in alike if stage["images_per_second"]]
    rate = float(np.median(rates)) if rates else math.nan
    found = {key: here[0][key] for key in ("name", "mask", "batch", "lr", "ideal_speedup")}
    return found | {"images_per_second": rate, "speedup": rate / float(np.median(whole)) if whole else math.nan}


def _at(record: Any, path: Sequence[str]) -> Any:
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _estimates(finals: Sequence[Mapping[str, Any]], path: Sequence[str]) -> list[Estimate] | None:
    """A figure of each seed with the evaluation's own interval, NaN where it has none; None where a seed has no such figure."""
    values = [_at(final, path) for final in finals]
    own = [_at(final, (*path[:-1], f"{path[-1]}_interval")) or (math.nan, math.nan) for final in finals]
    return None if any(value is None for value in values) else [Estimate(float(v), *ends) for v, ends in zip(values, own, strict=True)]


def _over_seeds(name: str, each: Sequence[Estimate], least: float) -> Estimate:
    """Student's interval, which knows nothing of what a share can be: that of a share ends at `least` and 1.

    Nor is a share certain on which all seeds agree, such as no copy among few samples: it is as wide as samples alone make it, at least.
    """
    found = over_seeds([estimate.value for estimate in each])
    if name not in SHARES or len(each) < 2:
        return found
    down, up = (sum(halves) / len(each) ** 1.5 for halves in ([e.value - e.low for e in each], [e.high - e.value for e in each]))
    low, high = np.fmin(found.low, found.value - down), np.fmax(found.high, found.value + up)  # of a NaN and a number the number
    return Estimate(found.value, *np.clip([low, high], least, 1.0).tolist())


def _put(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_interval": [estimate.low, estimate.high]}


def _verdict(contest: Contest, arm: str, against: str) -> dict[str, Any]:
    """The speed-up, and the differences of the figures at the end, pairs of the same seed."""
    verdict: Verdict = compare_curves(arm, contest.curves(arm), against, contest.curves(against), contest.unit)
    found = asdict(verdict)
    for name, path in FIGURES.items():
        ours, theirs = (_estimates(contest.finals[each], path) for each in (arm, against))
        if ours is not None and theirs is not None:
            found |= _put(f"{name}_difference", _over_seeds(name, list(map(difference_of_shares, ours, theirs)), -1.0))
    if not math.isfinite(verdict.speedup):
        return found
    fewest = min(int(seed[-1]["steps"]) for name in (arm, against) for seed in contest.records[name])
    none = {"speedup": None, "low": None, "high": None, "bound": False}
    if fewest < LEAST_STEPS:
        return found | none | {"text": f"no verdict on {arm} and {against}: {fewest} steps are too few; give a longer budget"}
    ends = _ends(found)
    if contest.decaying & {arm, against}:
        nothing = "no difference shown there" if verdict.seeds > 1 else "of one seed they show nothing; repeat with --seeds 3"
        found |= none | {"text": f"{arm} and {against}: a learning rate falls, so only the ends compare"}
        ends = ends or [nothing]
    return found | {"text": "; ".join([found["text"], *ends, *_caveats(contest, arm, against)])}


def _ends(found: Mapping[str, Any]) -> list[str]:
    """What differs at the end beyond chance, in words."""
    words: list[str] = []
    for name, better in (("loss", -1), ("distance", -1), ("kernel_distance", -1), ("precision", 1), ("recall", 1)):
        low, high = found.get(f"{name}_difference_interval", (math.nan, math.nan))
        if low > 0 or high < 0:
            sign = "better" if (low > 0) == (better > 0) else "worse"
            near, far = sorted((abs(low), abs(high)))
            words.append(f"{name.replace('_', ' ')} {sign} by {abs(found[f'{name}_difference']):.3g} ({near:.3g} to {far:.3g})")
    return [f"at the end its {', its '.join(words)}"] if words else []


def _caveats(contest: Contest, arm: str, against: str) -> list[str]:
    pieces = {int(r["pieces"]) for name in (arm, against) for seed in contest.records[name] for r in seed}
    return ["memory ran out and some batches were computed in more pieces than others"] if len(pieces) > 1 else []


def _plain(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    shown = ("loss", "distance", "kernel_distance", "precision", "recall")
    head = ["arm", "time", "images", "FLOP", "held-out loss", "Frechet distance", "kernel distance", "precision", "recall"]
    rows = [head]
    for name, found in arms.items():
        row = [name, f"{found['time']:.0f} s", f"{found['images']:.0f}", f"{found['flops']:.2e}"]
        rows.append([*row, *(_cell(found, key) for key in shown)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _speeds(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line per masked stage: how much faster it went through images, and how much it should have."""
    stages = [(name, stage) for name, found in arms.items() for stage in found["stages"] if stage["mask"] != "none"]
    return [
        f"{name}, {stage['name']}: {stage['speedup']:.2f}x whole images' speed, {stage['ideal_speedup']:.2f}x by the arithmetic"
        for name, stage in stages
        if math.isfinite(stage["speedup"])
    ]


def _cell(found: Mapping[str, Any], key: str) -> str:
    if key not in found:
        return "-"
    low, high = found[f"{key}_interval"]
    return f"{found[key]:.4g}" + ("" if math.isnan(low) else f" ({low:.4g} to {high:.4g})")


def draw(contest: Contest, arms: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Losses against what was spent, means over seeds with the seeds behind them; and the distances at the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    unit = contest.unit
    panels = [unit, "flops" if unit != "flops" else "seconds"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 0.6))
    for axis, key in zip(axes, panels, strict=False):
        label, scale = AXES[key]
        for index, (name, seeds) in enumerate(contest.records.items()):
            color = f"C{index}"
            for seed in seeds:
                axis.plot([r[key] / scale for r in seed], [r["loss"] for r in seed], color=color, alpha=0.3, linewidth=0.8)
            costs, losses = (np.mean([[r[k] for r in seed] for seed in seeds], axis=0) for k in (key, "loss"))
            axis.plot(costs / scale, losses, color=color, label=name, linewidth=1.8)
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("held-out loss of whole images")
    axes[0].legend()
    # of few samples the Frechet distance is mostly its own bias
    few = any(final.get("headline") == "kernel_distance" for finals in contest.finals.values() for final in finals)
    key, label = ("kernel_distance", "kernel distance of samples") if few else ("distance", "Fr\u00e9chet distance of samples")
    shown = [name for name in arms if key in arms[name]]
    for index, name in enumerate(shown):
        low, high = arms[name][f"{key}_interval"]
        value = arms[name][key]
        error = None if math.isnan(low) else [[value - low], [high - value]]
        axes[2].errorbar([index], [value], yerr=error, fmt="o", capsize=4, color=f"C{list(arms).index(name)}")
    axes[2].set_xticks(range(len(shown)), shown, rotation=30, ha="right")
    axes[2].set_ylabel(label)
    axes[2].grid(alpha=0.3, axis="y")
    axes[2].margins(x=0.3)
    with rc_context({"axes.formatter.min_exponent": 3}):  # losses as 0.06, not as a product with a power of ten
        figure.savefig(file, dpi=120)
