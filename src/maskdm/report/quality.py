"""The parts of a run's page about its samples: how good, whether copied, whether off in colour, and how that was measured."""

from __future__ import annotations

import re

from maskdm.report import charts, images, page
from maskdm.report.page import Json, as_list, as_object, as_objects, count, estimate, finite, interval, number, percent, text, word
from maskdm.report.state import Run
from maskdm.report.training import early_stops, lost_trackers, trend

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
    ("... of two real parts", "frechet_distance_halves", number, "Two disjoint parts of the real images{each}."),
    ("Class accuracy", "class_accuracy", percent, "Share recognised as the class asked for, by a classifier of real images."),
    ("Precision", "precision", percent, "Share of the samples that lie among real images: are they plausible?"),
    ("Recall", "recall", percent, "Share of the real images that lie among samples: is their variety reached?"),
    ("Density", "density", number, "How densely real images lie around samples; 1 when as among themselves."),
    ("Coverage", "coverage", percent, "Share of the real images with a sample close by."),
)
_HELDOUT = {
    "frechet_distance_matched": "frechet_distance_heldout",
    "frechet_distance_infinity": "",
    "frechet_distance_halves": "",
}


def verdicts(run: Run) -> str:
    """What there is to say, in sentences; what leads up to a colon stands out."""
    said = [_stale(run), *map(_sentence, as_list(run.measures.get("verdicts"))), *early_stops(run), trend(run), *lost_trackers(run)]
    sentences: list[str] = []
    for sentence in filter(None, said):
        head, colon, rest = sentence.partition(": ")
        sentences.append(f"<b>{head}:</b> {rest}" if colon and len(head) <= 80 else sentence)
    return f'<div class="short"><h2>In short</h2>{page.bullets(sentences, "verdict")}</div>' if sentences else ""


def _sentence(verdict: object) -> str:
    """A verdict as escaped text, its shares unbroken at the end of a line."""
    return re.sub(r"(?<=\d) ?%", f"{page.GAP}%", text(verdict))


def headline(run: Run) -> tuple[str, str, str] | None:
    """Name, figure and remark of the distance to look at first."""
    key = str(run.measures.get("headline", "kernel_distance"))
    known = {name: title for title, name, _, _ in _MEASURES}
    if key not in known or finite(run.measures, key) is None:
        return None
    ends, real = interval(run.measures, key), finite(run.measures, _heldout(run.measures, key))
    span = f"{number(ends[0])} to {number(ends[1])}" if ends else ""
    new = f"new real images: {number(real)}" if real is not None else ""
    matched, floor = finite(run.measures, f"{key}_matched"), finite(run.measures, f"{key}_heldout")
    if not new and matched is not None and floor is not None:
        new = f"at equal counts {number(matched)}, new real images {number(floor)}"
    return _title(run.measures, key, known[key]), number(finite(run.measures, key)), "; ".join(filter(None, (span, new)))


def _heldout(measures: Json, key: str) -> str:
    """The key of the same measure of held-out images; none for a Frechet distance of other counts, which move it."""
    if key == "frechet_distance" and finite(measures, "num_samples") != finite(measures, "num_heldout"):
        return ""
    return _HELDOUT.get(key, f"{key}_heldout")


def _stale(run: Run) -> str:
    """A remark where the run went on after its samples were measured."""
    then = finite(run.measures, "train_seconds")
    if then is None or then >= 0.95 * run.seconds:
        return ""
    return f"Measured after {page.duration(then)} of training; the run has gone on since."


def _title(measures: Json, key: str, name: str) -> str:
    """Only the published network's distance is a FID."""
    return "FID" if key == "frechet_distance" and finite(measures, "fid") is not None else name


def quality(run: Run) -> str:
    """Every measure beside the same of held-out real images, by class, and what it rests on."""
    measures = run.measures
    if not measures:
        return '<p class="soft">Samples are not measured yet: <code>maskdm evaluate RUN</code> does it.</p>'
    rows: list[list[str]] = []
    first = measures.get("headline")
    each = finite(measures, "frechet_distance_halves_count")
    for name, key, show, meaning in sorted(_MEASURES, key=lambda measure: measure[1] != first):
        if measures.get(key) is not None:
            cells = [estimate(measures, which, show) for which in (key, _heldout(measures, key))]
            rows.append([_title(measures, key, name), *cells, meaning.format(each=f", {number(each)} each" if each else "")])
    features = as_object(measures.get("features"))
    carried = as_object(measures.get("provenance")) | {f"features: {key}": value for key, value in features.items()}
    origin = [f"{text(key)}: {text(value)}" for key, value in carried.items() if value is not None]
    note = (
        f"{count(measures, 'num_samples')} samples against {word(measures, 'reference')}; small: 95 % intervals over the draw of images. "
        f"Distances compare only within the same features ({word(features, 'name')}) and counts."
    )
    found = page.table("Measures", ["Measure", "Samples", "Held-out real images", "Meaning"], rows, wide=True)
    details = f"<details><summary>How it was measured</summary>{page.bullets(origin)}</details>"
    stale = f"<p>{_stale(run)}</p>" if _stale(run) else ""
    return f'{stale}{found}{_bias(measures)}<p class="soft">{note}</p>{_classes(measures)}{_history(run)}{details}'


def _bias(measures: Json) -> str:
    """How much of the Frechet distance the small number of images may make up, in words."""
    distance, halves = finite(measures, "frechet_distance"), finite(measures, "frechet_distance_halves")
    if distance is None or halves is None:
        return ""
    each = finite(measures, "frechet_distance_halves_count")
    size = f" ({number(each)} images each)" if each else ""
    said = f"Few images make a Frechet distance too large: even two halves of the real ones{size} are {number(halves)} apart."
    endless = finite(measures, "frechet_distance_infinity")
    if endless is not None:
        said += f" The samples' {number(distance)} would be about {number(endless)} with endless images."
    return f"<p>{said}</p>"


def _classes(measures: Json) -> str:
    """The classes, the one farthest from the real images first."""
    found = sorted(as_objects(measures.get("classes")), key=lambda each: -page.amount(each, "kernel_distance"))
    every = [end for each in found for end in interval(each, "kernel_distance") or (page.amount(each, "kernel_distance"),)]
    rows: list[list[str]] = []
    for each in found:
        low, high = min(0.0, *every), max(every)
        drawn = charts.whisker(finite(each, "kernel_distance"), interval(each, "kernel_distance"), low, high)
        row = [word(each, "name"), count(each, "num_samples"), estimate(each, "class_accuracy", percent)]
        rows.append([*row, estimate(each, "kernel_distance", number), drawn])
    if not rows:
        return ""
    shown = page.table("Classes", ["Class", "Samples", "Recognised", "Kernel distance", "from 0"], rows)
    return f"<details><summary>Class by class, the farthest from real first</summary>{shown}</details>"


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
        row += [count(each, "num_samples"), estimate(each, "kernel_distance", number), estimate(each, "frechet_distance", number)]
        rows.append([*row, f"{word(features, 'name')}{other}"])
    head = ["When", "Weights", "Sampler", "Guidance", "Samples", "Kernel distance", "Frechet distance", "Features"]
    return f"<details><summary>All evaluations ({len(run.evaluations)})</summary>{page.table('Evaluations', head, rows)}</details>"


def copies(run: Run) -> str:
    """The share of suspected copies, the worst pairs, and typical neighbours."""
    found = as_object(run.measures.get("copies"))
    below = "Above: samples, not chosen. Below each: the training image nearest in features. Alike is good; the same picture is a copy."
    nearest = images.strip(run.folder / "neighbours.png", "Samples above the training images nearest to them", below)
    if not found:
        return nearest
    rows = [["Suspected near-copies", *(estimate(found, key, percent) for key in ("share", "heldout_share"))]]
    for space in ("features", "pixels"):
        if finite(found, f"{space}_ratio") is not None:
            rows.append([f"Nearest training image, in {space}", estimate(found, f"{space}_ratio", number), "1"])
    shown = page.table("Suspected copies", ["", "Samples", "New real images"], rows)
    limit = (
        f"Suspected: the nearest training image is less than {count(found, 'threshold')} times as far away as the tenth nearest. "
        "Nearest: its median distance, that of new real (held-out) images being 1; far below 1 is copying."
    )
    note = "The most suspicious: each sample above the training image that it resembles, the worst pair first."
    worst = images.strip(run.folder / "copies.png", "The samples most like training images, above those", note)
    return f'{shown}<p class="soft">{limit}</p>{worst}{_pairs(found)}{nearest}'


def _pairs(found: Json) -> str:
    rows: list[list[str]] = []
    for pair in as_objects(found.get("worst")):
        shift = [number(finite({"by": by}, "by")) for by in as_list(pair.get("shift"))]
        how = ["mirrored"] if pair.get("mirrored") else []
        how += [f"shifted by {', '.join(shift)}"] if any(by != "0" for by in shift) else []
        place = ", ".join([word(pair, "space"), *how])
        rows.append([f"#{count(pair, 'sample')}", word(pair, "name"), count(pair, "ratio"), place])
    table = page.table("Most suspicious pairs", ["Sample", "Training image", "Ratio", "Seen in"], rows)
    return f"<details><summary>These pairs by name</summary>{table}</details>" if rows else ""


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
    moved = {str(each.get("channel")): each for each in as_objects(found.get("histogram_distance"))}
    drawn: list[str] = []
    for each in as_objects(found.get("histograms")):
        name = str(each.get("channel"))
        far = moved.get(name, {})
        note = f"{count(far, 'samples')} of 255 apart; real halves: {count(far, 'halves')}" if far else ""
        drawn.append(charts.histogram(name, _shares(each, "samples"), _shares(each, "real"), note))
    table = page.table("Colour and contrast", ["Of the range", "Samples", "Real", "Difference", "Verdict"], rows)
    note = '<p class="soft">Line: samples; filled: real images; left dark, right bright; heights are roots of the shares.</p>'
    return f'<p>{_sentence(found.get("verdict", ""))}</p>{table}<div class="row">{"".join(drawn)}</div>{note}'


def _shares(record: Json, key: str) -> list[float]:
    found = [finite({"share": share}, "share") for share in as_list(record.get(key))]
    return [share for share in found if share is not None]
