"""The page: what stands where, and which control asks the service for what."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from maskdm.demo.answers import Answers
from maskdm.demo.masks import VIEWS
from maskdm.demo.models import Traits
from maskdm.demo.service import Service
from maskdm.demo.style import CSS, HEAD, theme
from maskdm.demo.uploads import MOST_BYTES
from maskdm.demo.wishes import MOST_IMAGES
from maskdm.errors import UserError

log = logging.getLogger(__name__)

AT_ONCE, QUEUED = 16, 64
"""Of gradio's own queue: the worker has a shorter one, which says so in a sentence."""

UNSEEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}
"""For all events: what they do is said in words, and they are no API. What comes in is looked at by `Answers` alone, which says in a
sentence what is wrong with it; gradio would decode pictures first, however large they are, and print tracebacks."""


class Page(gr.Blocks):
    """Takes of a browser's files what it has uploaded, and no others.

    Gradio itself, mounted in an application, would copy whatever file of this machine a request names, and fetch what address it names.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False) -> Any:
        """What a handler is called with. Raises gr.Error, in a sentence, for what no page of ours sends."""
        try:
            folder = Path(get_upload_folder()).resolve()
            if not all(Path(path).resolve().is_relative_to(folder) for path in _paths(inputs)):
                raise UserError("a file that was not uploaded")
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except Exception as error:
            if not isinstance(error, UserError):  # a stranger's, or a defect of ours
                log.warning("a request of the page was refused: %r", error)
            raise gr.Error("this is no request of this page's; load it again", print_exception=False) from error


def _paths(value: Any) -> Iterator[str]:
    """Of all files that are named in JSON."""
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _paths(each)
    if isinstance(value, dict) and "path" in value:
        yield str(value["path"])


@dataclass(frozen=True)
class Controls:
    """How images are asked for, in a tab."""

    labels: Any
    seed: Any
    steps: Any
    scheduler: Any
    guidance: Any

    @property
    def inputs(self) -> list[Any]:
        """In the order that `Answers` takes them."""
        return [self.labels, self.seed, self.steps, self.scheduler, self.guidance]

    @property
    def settings(self) -> list[Any]:
        """Those that follow the network."""
        return [self.labels, self.steps, self.scheduler, self.guidance]


def mount(app: Any, service: Service) -> Any:
    """The page at the root of a FastAPI application."""
    blocks = build(service)
    options: dict[str, Any] = {"footer_links": [], "run_history": False, "ssr_mode": False, "pwa": False, "mcp_server": False}
    return gr.mount_gradio_app(
        app, blocks, path="/", show_error=False, max_file_size=MOST_BYTES, theme=theme(), css=CSS, head=HEAD, **options
    )


def build(service: Service) -> gr.Blocks:
    """The page."""
    answers = Answers(service)
    with Page(title="maskdm demo", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=False) as blocks:
        names = answers.names()
        with gr.Row(elem_classes="head"):
            with gr.Column(scale=2, min_width=240):
                gr.HTML("<h1>maskdm demo</h1>", padding=False)
                about = gr.HTML(answers.about(names[0]), elem_id="about", padding=False)
            model = gr.Dropdown(names, value=names[0], label="network", elem_id="model", scale=1, min_width=240)
        drawn, known = gr.State(None), gr.State(None)
        with gr.Tabs() as tabs:
            generating = _generate(answers, model, drawn)
            inpainting, editor, told = _inpaint(answers, model, known)
            morphing = _morph(answers, model)
            compared = _compare(answers, names)
            stage = _masks(answers, model)
        generating.take.click(answers.take, [model, drawn, generating.chosen], [known, editor, told, tabs], **UNSEEN)
        inputs = [*generating.controls.settings, *inpainting.settings, *morphing]
        model.change(answers.adapt, [model], [about, stage, *inputs], **UNSEEN)
        blocks.load(answers.refresh, None, [generating.said, model, *compared], **UNSEEN)
    return blocks.queue(default_concurrency_limit=AT_ONCE, max_size=QUEUED, api_open=False)


@dataclass(frozen=True)
class Generating:
    """Of the tab Generate, what others need."""

    controls: Controls
    said: Any
    chosen: Any
    take: Any


def _controls(answers: Answers, own: bool = True) -> Controls:
    """own: begin with the settings of the network; else they are left empty, for each network's own."""
    traits = answers.first
    with gr.Row():
        labels = gr.Dropdown(
            list(traits.classes), multiselect=True, label="classes", visible=bool(traits.classes), allow_custom_value=True,
            info="in turn; or a mixture, 3:0.7+8:0.3", min_width=180,
        )  # fmt: skip
        seed = gr.Number(0, label="seed", precision=0, min_width=100)
    return Controls(labels, seed, *_sampling(traits, own))


def _sampling(traits: Traits, own: bool = True) -> tuple[Any, Any, Any]:
    """Steps, scheduler and guidance."""
    with gr.Accordion("sampling" if own else "sampling: each network's own where left empty", open=False), gr.Row():
        steps = gr.Number(traits.steps if own else None, label="steps", precision=0, min_width=90)
        scheduler = gr.Dropdown(list(traits.schedulers), value=traits.scheduler if own else None, label="scheduler", min_width=110)
        guidance = gr.Number(traits.guidance if own else None, label="guidance, 1 for none", visible=traits.guided, min_width=90)
    return steps, scheduler, guidance


def _gallery(label: str, name: str) -> Any:
    return gr.Gallery(
        label=label, elem_id=name, elem_classes=["tiles"], format="png", interactive=False, columns=8, object_fit="contain",
        buttons=["download", "fullscreen"], height="auto",
    )  # fmt: skip


def _buttons(text: str, name: str) -> tuple[Any, Any]:
    with gr.Row():
        go = gr.Button(text, variant="primary", elem_id=name, min_width=120)
        stop = gr.Button("Cancel", elem_id=f"{name}-cancel", min_width=100)
    return go, stop


def _generate(answers: Answers, model: Any, drawn: Any) -> Generating:
    with gr.Tab("Generate", id="generate"), gr.Row():
        with gr.Column(scale=1, min_width=300):
            num = gr.Slider(1, MOST_IMAGES, value=16, step=1, label="images")
            controls = _controls(answers)
            go, stop = _buttons("Generate", "go-generate")
            said = gr.HTML(elem_id="said-generate")
        with gr.Column(scale=2, min_width=300):
            gallery = _gallery("images", "images")
            chosen = gr.State(0)
            with gr.Row():
                near = gr.Button("Nearest training images", elem_id="go-nearest", min_width=240)
                take = gr.Button("Inpaint it", elem_id="go-take", min_width=120)
            neighbours = _gallery("nearest training images", "nearest")
            verdict = gr.HTML(elem_id="said-nearest")
    go.click(answers.generate, [model, num, *controls.inputs], [gallery, said, drawn, chosen], **UNSEEN)
    stop.click(answers.cancel, None, [said], queue=False, **UNSEEN)
    gallery.select(answers.choose, None, [chosen], **UNSEEN)
    near.click(answers.nearest, [model, drawn, chosen], [neighbours, verdict], **UNSEEN)
    return Generating(controls, said, chosen, take)


def _inpaint(answers: Answers, model: Any, known: Any) -> tuple[Controls, Any, Any]:
    with gr.Tab("Inpaint", id="inpaint"), gr.Row():
        with gr.Column(scale=1, min_width=300):
            upload = gr.UploadButton("Upload an image", elem_id="upload", file_types=["image"], size="md")
            editor = gr.ImageEditor(
                label="paint here", elem_id="editor", type="pil", image_mode="RGBA", format="png", sources=(),
                transforms=(), layers=False, buttons=[], canvas_size=(512, 512),
                brush=gr.Brush(default_size=48, colors=["#e0004d"], default_color="#e0004d", color_mode="fixed"),
            )  # fmt: skip
            num = gr.Slider(1, 16, value=4, step=1, label="images")
            controls = _controls(answers)
            go, stop = _buttons("Draw anew", "go-inpaint")
        with gr.Column(scale=1, min_width=300):
            said = gr.HTML(elem_id="said-inpaint")
            gallery = _gallery("images", "inpainted")
    upload.upload(answers.upload, [model, upload], [known, editor, said], **UNSEEN)
    go.click(answers.inpaint, [model, known, editor, num, *controls.inputs], [gallery, said], **UNSEEN)
    stop.click(answers.cancel, None, [said], queue=False, **UNSEEN)
    return controls, editor, said


def _morph(answers: Answers, model: Any) -> tuple[Any, ...]:
    traits = answers.first
    with gr.Tab("Morph", id="morph"), gr.Row():
        with gr.Column(scale=1, min_width=300):
            ends: list[Any] = []
            for number, which in enumerate(("first", "last")):
                with gr.Row():
                    ends += [gr.Number(number, label=f"{which} seed", precision=0, min_width=100)]
                    ends += [_class(traits, f"{which} class")]
            num = gr.Slider(2, 32, value=12, step=1, label="images on the way, the ends among them")
            settings = _sampling(traits)
            go, stop = _buttons("Morph", "go-morph")
            said = gr.HTML(elem_id="said-morph")
        with gr.Column(scale=2, min_width=300):
            film = gr.Image(label="the way", elem_id="film", interactive=False, buttons=["download"], height=280, type="filepath")
            gallery = _gallery("images", "way")
    go.click(answers.morph, [model, num, *ends, *settings], [gallery, said, film], **UNSEEN)
    stop.click(answers.cancel, None, [said], queue=False, **UNSEEN)
    return (ends[1], ends[3], *settings)


def _class(traits: Traits, label: str) -> Any:
    first = traits.classes[0] if traits.classes else None
    return gr.Dropdown(list(traits.classes), value=first, label=label, visible=bool(traits.classes), min_width=140)


def _compare(answers: Answers, names: list[str]) -> list[Any]:
    with gr.Tab("Compare", id="compare"):
        with gr.Row():
            models = [gr.Dropdown(names, value=names[min(i, len(names) - 1)], label=label, min_width=200) for i, label in enumerate("AB")]
        num = gr.Slider(1, 32, value=8, step=1, label="images, of the same noise")
        controls = _controls(answers, own=False)
        go, stop = _buttons("Compare", "go-compare")
        said = gr.HTML(elem_id="said-compare")
        with gr.Row():
            galleries = [_gallery(label, f"compare-{label}") for label in "AB"]
    go.click(answers.compare, [*models, num, *controls.inputs], [*galleries, said], **UNSEEN)
    stop.click(answers.cancel, None, [said], queue=False, **UNSEEN)
    models[0].change(answers.adapt_compared, [models[0]], [controls.labels], **UNSEEN)
    return models


def _masks(answers: Answers, model: Any) -> Any:
    with gr.Tab("Mask", id="mask"):
        with gr.Row():
            number = gr.Number(0, label="training image", precision=0, min_width=120)
            seed = gr.Number(0, label="seed of the mask", precision=0, min_width=120)
            stages = answers.stages(None)
            stage = gr.Dropdown(stages, value=stages[0] if stages else None, label="stage", min_width=160)
        with gr.Row():
            go = gr.Button("Show", variant="primary", elem_id="go-mask", min_width=100)
            others = [(gr.Button("Next image", min_width=100), number), (gr.Button("Another mask", min_width=100), seed)]
        said = gr.HTML(elem_id="said-mask")
        gallery = _gallery(f"a training image, and what {VIEWS} masks leave of it", "masked")
    show: dict[str, Any] = {"fn": answers.masks, "inputs": [model, stage, number, seed], "outputs": [gallery, said], **UNSEEN}
    go.click(**show)
    for button, which in others:
        button.click(answers.following, [which], [which], **UNSEEN).then(**show)
    return stage
