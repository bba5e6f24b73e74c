"""The parts of a run's page about its samples: how good, whether copied, whether off in colour, and how that was measured."""

from __future__ import annotations

from collections.abc import Callable

from maskdm.report import charts, page
from maskdm.report.page import Json, as_list, as_object, as_objects, count, finite, number, percent, text, word
from maskdm.report.state import Run
from maskdm.report.training import interval, trend

_MEASURES = (
    (
        "Kernel distance",
        "kernel_distance",
        number,
        "Distance to the real images; unbiased, about 0 when as good as new. Lower is better.",
    ),
    ("Frechet distance", "frechet_distance", number, "The same question in another way; too large for few images. Lower is better."),
    ("... at equal counts", "frechet_distance_matched", number, "Of as many samples as held-out images: the fair comparison."),
    (
        "... of endless images",
        "frechet_distance_infinity",
        number,
        "Continued to endless images: free of the bias of their number.",
    ),
    ("... of two real halves", "frechet_distance_halves", number, "What perfect samples would get at this number of images."),
    ("Class accuracy", "class_accuracy", percent, "Share recognised as the class asked for, by a classifier of real images."),
    ("Precision", "precision", percent, "Share of the samples that lie among real images: are they plausible?"),
    ("Recall", "recall", percent, "Share of the real images that lie among samples: is their variety reached?"),
    ("Density", "density", number, "How densely real images lie around samples; 1 when as among themselves."),
    ("Coverage", "coverage", percent, "Share of the real images with a sample close by."),
)
_HELDOUT = {
    "frechet_distance": "frechet_distance_heldout",
    "frechet_distance_matched": "frechet_distance_heldout",
    "frechet_distance_infinity": "",
    "frechet_distance_halves": "",
}


def verdicts(run: Run) -> str:
    """What there is to say, in sentences."""
    said = [*map(text, as_list(run.measures.get("verdicts"))), trend(run)]
    return page.bullets([sentence for sentence in said if sentence], "verdict")


def measured(measures: Json, key: str, show: Callable[[float | None], str]) -> str:
    """A figure for people, its interval below it."""
    ends = interval(measures, key)
    span = f"<small>{show(ends[0])} to {show(ends[1])}</small>" if ends else ""
    return show(finite(measures, key)) + span


def quality(run: Run) -> str:
    """Every measure beside the same of held-out real images, by class, and what it rests on."""
    measures = run.measures
    if not measures:
        return '<p class="soft">Samples are not measured yet: <code>maskdm evaluate RUN</code> does it.</p>'
    rows: list[list[str]] = []
    for name, key, show, meaning in _MEASURES:
        if measures.get(key) is not None:
            title = "FID" if key == "frechet_distance" and measures.get("fid") is not None else name
            rows.append([title, measured(measures, key, show), measured(measures, _HELDOUT.get(key, f"{key}_heldout"), show), meaning])
    features = as_object(measures.get("features"))
    carried = as_object(measures.get("provenance")) | {f"features: {key}": value for key, value in features.items()}
    origin = [f"{text(key)}: {text(value)}" for key, value in carried.items() if value is not None]
    note = (
        f"{count(measures, 'num_samples')} samples against {word(measures, 'reference')}; small: 95 % intervals over the draw of images. "
        f"Distances compare only within the same features ({word(features, 'name')}) and counts."
    )
    found = page.table("Measures", ["Measure", "Samples", "Held-out real images", "Meaning"], rows, wide=True)
    details = f"<details><summary>How it was measured</summary>{page.bullets(origin)}</details>"
    return f'{found}<p class="soft">{note}</p>{_classes(measures)}{_history(run)}{details}'


def _classes(measures: Json) -> str:
    rows = [
        [
            word(each, "name"),
            count(each, "num_samples"),
            measured(each, "class_accuracy", percent),
            measured(each, "kernel_distance", number),
        ]
        for each in as_objects(measures.get("classes"))
    ]
    if not rows:
        return ""
    drawn = page.table("Classes", ["Class", "Samples", "Recognised", "Kernel distance"], rows)
    return f"<details><summary>Class by class</summary>{drawn}</details>"


def _history(run: Run) -> str:
    """All evaluations, those that compare with the latest marked."""
    if len(run.evaluations) < 2:
        return ""
    latest = as_object(run.measures.get("features")).get("hash")
    rows: list[list[str]] = []
    for each in run.evaluations[-30:]:
        how, features = as_object(each.get("provenance")), as_object(each.get("features"))
        other = "" if features.get("hash") == latest else "<small>other features: does not compare</small>"
        row = [word(how, "created"), word(how, "weights"), f"{word(how, 'scheduler')}, {word(how, 'steps')} steps", count(how, "guidance")]
        row += [count(each, "num_samples"), measured(each, "kernel_distance", number), measured(each, "frechet_distance", number)]
        rows.append([*row, f"{word(features, 'name')}{other}"])
    head = ["When", "Weights", "Sampler", "Guidance", "Samples", "Kernel distance", "Frechet distance", "Features"]
    return f"<details><summary>All evaluations ({len(run.evaluations)})</summary>{page.table('Evaluations', head, rows)}</details>"


def copies(run: Run) -> str:
    """The share of suspected copies, the worst pairs, and typical neighbours."""
    found = as_object(run.measures.get("copies"))
    if not found:
        return ""
    shares = [
        ["Samples", measured(found, "share", percent), "near-copies of training images"],
        ["Held-out real images", measured(found, "heldout_share", percent), "what this test says of new images: to be expected"],
    ]
    shown = page.table("Suspected copies", ["Of", "Suspected", ""], shares, wide=True)
    note = "Each column: a sample above the training image that it resembles most suspiciously, the most suspicious first."
    shown += page.figure(run.folder / "copies.png", "The samples most like training images, above those", note, 900)
    rows = [
        [
            f"#{count(pair, 'sample')}",
            word(pair, "name"),
            count(pair, "ratio"),
            f"{word(pair, 'space')}{', mirrored' if pair.get('mirrored') else ''}",
        ]
        for pair in as_objects(found.get("worst"))
    ]
    table = page.table("Most suspicious pairs", ["Sample", "Training image", "Ratio", "Seen in"], rows)
    limit = f"Suspected: the nearest training image is less than {count(found, 'threshold')} times as far away as the tenth nearest."
    shown += f'<p class="soft">{limit}</p><details><summary>The pairs by name</summary>{table}</details>'
    below = "Above: samples, not chosen. Below each: the training image nearest in features. Alike is good; the same picture is a copy."
    return shown + page.figure(run.folder / "neighbours.png", "Samples above the training images nearest to them", below, 900)


def colour(run: Run) -> str:
    """Brightness, contrast, saturation and histograms beside those of real images."""
    found = as_object(run.measures.get("colour"))
    if not found:
        return ""
    rows: list[list[str]] = []
    for each in as_objects(found.get("statistics")):
        ends = interval({"difference_interval": each.get("interval")}, "difference")
        span = f"<small>{percent(ends[0])} to {percent(ends[1])}</small>" if ends else ""
        verdict = "<b>drift</b>" if each.get("drift") else "as real"
        shares = [percent(finite(each, key)) for key in ("samples", "real")]
        rows.append([word(each, "name"), *shares, percent(finite(each, "difference")) + span, verdict])
    drawn = [
        charts.histogram(str(each.get("channel")), *(_shares(each, key) for key in ("samples", "real")))
        for each in as_objects(found.get("histograms"))
    ]
    table = page.table("Colour and contrast", ["Of the range", "Samples", "Real", "Difference", "Verdict"], rows)
    note = '<p class="soft">Line: samples; filled: real images; left dark, right bright.</p>'
    return f'<p>{word(found, "verdict")}</p>{table}<div class="row">{"".join(drawn)}</div>{note}'


def _shares(record: Json, key: str) -> list[float]:
    found = [finite({"share": share}, "share") for share in as_list(record.get(key))]
    return [share for share in found if share is not None]
