"""A model card: README.md in the form that hubs read, filled from a run's files. What was not measured is said to be so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from maskdm.config import Config
from maskdm.export.folder import CODE

HUB_LICENCES = (
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "openrail", "creativeml-openrail-m", "gpl-3.0", "unknown", "other",
)  # fmt: skip
"""Names that hubs know; any other is given as `other`, with its name."""

MEASURES = (
    ("FID", "fid"),
    ("Frechet distance", "frechet_distance"),
    ("Kernel distance", "kernel_distance"),
    ("Precision", "precision"),
    ("Recall", "recall"),
    ("Density", "density"),
    ("Coverage", "coverage"),
    ("Class accuracy", "class_accuracy"),
)


@dataclass(frozen=True)
class Facts:
    """What a card is made of."""

    name: str
    licence: str
    config: Config
    info: Mapping[str, Any]
    """run.json"""
    measures: Mapping[str, Any] | None
    """metrics.json, where there is one."""
    same_weights: bool
    """Whether the figures are of the very weights that are exported."""
    origin: str
    """Where the weights come from, in words."""
    files: Mapping[str, float | None]
    """Graphs written, and how far their output is from the network's; None: not compared."""
    folder: bool
    """Whether there is a diffusers folder."""
    picture: bool
    """Whether there is a samples.png."""


def card(facts: Facts) -> str:
    """The text of README.md."""
    sections = [
        _front_matter(facts),
        f"# {facts.name}\n\n{_summary(facts)}",
        "![samples](samples.png)" if facts.picture else "",
        f"## How to use\n\n{_use(facts)}",
        f"## Data\n\n{_data(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Evaluation\n\n{_evaluation(facts)}",
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(facts)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(facts: Facts) -> str:
    known = facts.licence.lower() in HUB_LICENCES
    head: dict[str, Any] = {"license": facts.licence.lower() if known else "other"}
    if not known:
        head["license_name"] = re.sub(r"[^a-z0-9.]+", "-", facts.licence.lower()).strip("-")
    head |= {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["maskdm", "diffusion", "image-generation"],
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _summary(facts: Facts) -> str:
    data = facts.info["data"]
    classes = f" of {len(data['classes'])} classes" if data["classes"] else ""
    colour = "gray" if data["channels"] == 1 else "colour"
    return (
        f"A diffusion model that draws {colour} images of {data['height']} x {data['width']} pixels{classes}, trained by maskdm "
        f"{facts.info['version']}: {facts.info['model']}, {facts.info['parameters'] / 1e6:.3g} million parameters."
    )


def _use(facts: Facts) -> str:
    parts: list[str] = []
    conditional = bool(facts.info["data"]["classes"])
    if facts.folder:
        labels = "class_labels=[0, 0, 0, 0], guidance_scale=1.5, " if conditional else ""
        parts.append(
            "With diffusers (the code of pipeline and network is in this folder: read it, it is run):\n\n```python\n"
            "from diffusers import DiffusionPipeline\n\n"
            'path = "..."  # this folder, or its name on the hub\n'
            f'pipeline = DiffusionPipeline.from_pretrained(path, custom_pipeline="{CODE}", trust_remote_code=True)\n'
            f"images = pipeline(batch_size=4, {labels}num_inference_steps={facts.config.sampling.steps}).images\n```"
        )
        if not conditional:
            parts.append("diffusers' own `DDPMPipeline` opens it too (`trust_remote_code=True`, for the network).")
    for name, difference in facts.files.items():
        off = "not compared with the network here" if difference is None else f"at most {difference:.1g} from the network's output"
        how = "`python onnx_sample.py model.onnx 16 50 grid.png`, with numpy and onnxruntime alone" if name.endswith(".onnx") else ""
        parts.append(f"`{name}`{' (' + how + ')' if how else ''}: the network as a graph, its batch free; {off}.")
    return "\n\n".join(parts) or "`config.yaml` holds every setting."


def _data(facts: Facts) -> str:
    data = facts.info["data"]
    rows = [
        ("name", facts.config.data.source),
        ("images", f"{data['count']}: {data['train']} trained on, {data['heldout']} held out"),
        ("size", f"{data['height']} x {data['width']} pixels, {data['channels']} channel{'s' if data['channels'] > 1 else ''}"),
        ("licence", facts.licence if facts.licence != "unknown" else "unknown: whoever exported it has not said"),
    ]
    if data.get("num_broken", len(data["broken"])):
        rows.insert(2, ("left out", f"{data.get('num_broken', len(data['broken']))} files that could not be read"))
    if data["classes"]:
        shown = ", ".join(data["classes"][:40]) + (", ..." if len(data["classes"]) > 40 else "")
        rows.append(("classes", f"{len(data['classes'])}: {shown}"))
    return _table(("", ""), rows)


def _training(facts: Facts) -> str:
    environment, config = facts.info["environment"], facts.config
    stages = [
        (each["name"], each["mask"], str(each["batch"]), f"{each['lr']:g}", str(each["steps"]), f"{each['seconds'] / 60:.1f} min")
        for each in facts.info["stages"]
    ]
    machine = environment["cpu"] + (f", {environment['threads']} threads" if environment["device"] == "cpu" else "")
    lines = [
        f"- noise {config.diffusion.schedule}, target {config.diffusion.target}, weights fp32, training in {environment['precision']}",
        f"- hardware: {machine}; torch {environment['torch']}",
        f"- weights: {facts.origin}",
        "- every setting: `config.yaml`",
    ]
    if config.init is not None:
        lines.insert(0, f"- started from the run `{config.init}`")
    return _table(("stage", "mask", "batch", "lr", "steps", "time"), stages) + "\n\n" + "\n".join(lines)


def _evaluation(facts: Facts) -> str:
    found = facts.measures
    if found is None:
        return "Not measured."
    rows: list[tuple[str, ...]] = []
    for title, key in MEASURES:
        if key not in found:
            continue
        low, high = found.get(f"{key}_interval", (None, None))
        real = found.get(f"{key}_heldout")
        span = "" if low is None else f"{low:.4g} to {high:.4g}"
        rows.append((title, f"{found[key]:.4g}", span, "" if real is None else f"{real:.4g}"))
    how = found.get("provenance", {})
    sampler = f"sampler {how['scheduler']}, {how['steps']} steps, guidance {how['guidance']:g}" if "scheduler" in how else "sampler unknown"
    said = f"{found['num_samples']} samples against {found['reference']}; features: {found['features']['name']}"
    said += f" (hash {str(found['features'].get('hash', 'unknown'))[:12]}); {sampler}."
    other = "" if facts.same_weights else "\n\n**These figures are of other weights of the same run than those exported.**"
    table = _table(("measure", "value", "95 % interval", "the same of new real images"), rows)
    note = "No figure but one named FID is from the published Inception network, and none compares with figures of other features."
    return f"{said} {note}{other}\n\n{table}\n\n" + "\n".join(f"- {sentence}" for sentence in found.get("verdicts", []))


def _limits(facts: Facts) -> list[str]:
    data, found = facts.info["data"], facts.measures
    lines = [
        f"It has seen {data['train']} images and draws what is like them, with what they favour and what they lack.",
        f"It draws {data['height']} x {data['width']} pixels, and takes no text.",
    ]
    if found is None or "copies" not in found:
        lines.append("Whether it copies training images was not measured.")
    else:
        copies = found["copies"]
        high = f"{copies['share_interval'][1]:.1%}"
        lines.append(f"Near-copies of training images: {copies['count']} of {copies['num_samples']} samples (95 % interval: up to {high}).")
    if found is None:
        lines.append("Its quality was not measured.")
    if facts.info["status"] != "finished":
        lines.append(f"Its training had not come to its end ({facts.info['status']}).")
    if facts.licence == "unknown":
        lines.append("The licence of the images is not known: find out before you pass on the model or what it draws.")
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
