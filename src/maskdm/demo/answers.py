"""What the page's controls do: they ask the service, follow the work, and say in a sentence what became of it."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from maskdm.demo.masks import masked_stages
from maskdm.demo.service import Drawn, Service
from maskdm.demo.shown import canvas, captions_of, classes_of, command_of, sentence, tiles, used_in_words
from maskdm.demo.uploads import open_layers
from maskdm.demo.wishes import MOST_SEED, Wish, checked, wish_of
from maskdm.demo.work import Job, Stopped
from maskdm.errors import UserError
from maskdm.pictures import grid
from maskdm.runs.wishes import save_gif

Updates = Generator[tuple[Any, ...], None, None]

SAME = gr.skip()


class Answers:
    """The page's handlers. Those that draw yield, as the work goes on: a gallery, a sentence, and what comes at the end."""

    def __init__(self, service: Service) -> None:
        self.service, self.first = service, service.shelf.traits(None)
        self._jobs: dict[str | None, list[Job[Any]]] = {}
        self._lock = threading.Lock()

    # --- the networks ---

    def names(self) -> list[str]:
        """Of all networks, as they are now."""
        return [model.name for model in self.service.shelf.models()]

    def stages(self, name: str | None) -> list[str]:
        """That hide patches."""
        return masked_stages(self.service.shelf.run(name).config())

    def about(self, name: str | None) -> str:
        """What a network draws."""
        config, traits = self.service.shelf.run(name).config(), self.service.shelf.traits(name)
        height, width = config.data.image_size
        kind = "gray" if config.data.channels == 1 else "RGB"
        classes = f"{len(traits.classes)} classes" if traits.classes else "no classes"
        return sentence(
            f"{height} x {width} {kind}, {classes}{', drawn as latents' if traits.latent else ''}; {self.service.shelf.find(name).run}"
        )

    def adapt(self, name: Any) -> list[Any]:
        """A sentence, the stages, and the controls that follow the network: of Generate, Inpaint and Morph."""
        try:
            return self._adapted(_text(name, "the network"))
        except UserError as error:  # the run may be gone
            return [sentence(str(error), wrong=True), *[SAME] * 14]

    def _adapted(self, name: str | None) -> list[Any]:
        traits, stages = self.service.shelf.traits(name), self.stages(name)
        labels = gr.update(choices=list(traits.classes), value=[], visible=bool(traits.classes))
        ends = gr.update(choices=list(traits.classes), value=next(iter(traits.classes), None), visible=bool(traits.classes))
        settings = [
            gr.update(value=traits.steps),
            gr.update(choices=list(traits.schedulers), value=traits.scheduler),
            gr.update(value=traits.guidance, visible=traits.guided),
        ]
        stage = gr.update(choices=stages, value=next(iter(stages), None))
        return [self.about(name), stage, labels, *settings, labels, *settings, ends, ends, *settings]

    def adapt_compared(self, name: Any) -> Any:
        """The classes of the first of two networks."""
        try:
            classes = self.service.shelf.traits(_text(name, "the network")).classes
        except UserError:  # which is said when they are compared
            return SAME
        return gr.update(choices=list(classes), value=[], visible=bool(classes))

    def refresh(self) -> list[Any]:
        """A sentence, and the networks to choose from: a run that trains may have more by now."""
        return [sentence("ready"), *[gr.update(choices=self.names())] * 3]

    # --- drawing ---

    def generate(
        self, model: Any, num: Any, labels: Any, seed: Any, steps: Any, scheduler: Any, guidance: Any, request: gr.Request
    ) -> Updates:
        """Gallery, sentence, the images, the chosen one's number."""

        def done(drawn: Drawn) -> tuple[Any, ...]:
            found, said = self.service.shelf.find(drawn.used["model"]), used_in_words(drawn.used)
            if found.checkpoint is None:  # which is what `maskdm sample` takes
                said += f" The same by command: {command_of(found.run, drawn.used, tuple(map(str, labels or ())))}"
            return _gallery(drawn.images), sentence(said), drawn.images, 0

        yield from self._follow(
            lambda: self.service.generate(_wish(model, num, labels, seed, steps, scheduler, guidance)), done, request, 4
        )

    def inpaint(
        self, model: Any, known: Any, painted: Any, num: Any, labels: Any, seed: Any, steps: Any, scheduler: Any, guidance: Any,
        request: gr.Request,
    ) -> Updates:  # fmt: skip
        """Gallery, sentence."""

        def begin() -> Job[Drawn]:
            if known is None:
                raise UserError("there is no image yet: upload one, or take one from Generate")
            wish = _wish(model, num, labels, seed, steps, scheduler, guidance)
            return self.service.inpaint(wish, known, open_layers([Path(each["path"]) for each in (painted or {}).get("layers") or []]))

        yield from self._follow(begin, lambda drawn: (_gallery(drawn.images), sentence(used_in_words(drawn.used))), request, 2)

    def morph(
        self, model: Any, num: Any, seed: Any, first: Any, end: Any, last: Any, steps: Any, scheduler: Any, guidance: Any,
        request: gr.Request,
    ) -> Updates:  # fmt: skip
        """Gallery, sentence, the way as a GIF."""
        wanted = [each for each in (first or last, last or first) if each]

        def begin() -> Job[Drawn]:
            return self.service.morph(_wish(model, num, wanted, seed, steps, scheduler, guidance), _whole(end, "the last seed"))

        def done(drawn: Drawn) -> tuple[Any, ...]:
            number, path = tempfile.mkstemp(suffix=".gif", dir=os.environ.get("GRADIO_TEMP_DIR"))
            os.close(number)
            save_gif([grid(image[None], columns=1, tile=256) for image in drawn.images], Path(path))
            return _gallery(drawn.images), sentence(f"To seed {end or 0}. {used_in_words(drawn.used)}"), path

        yield from self._follow(begin, done, request, 3)

    def compare(
        self, one: Any, other: Any, num: Any, labels: Any, seed: Any, steps: Any, scheduler: Any, guidance: Any,
        request: gr.Request,
    ) -> Updates:  # fmt: skip
        """Two galleries, a sentence: first the one network draws, then the other."""
        words = ""
        yield gr.update(value=[]), gr.update(value=[]), sentence("begins")
        for side, model in enumerate((one, other)):
            last: tuple[Any, ...] = (SAME, SAME)

            def done(drawn: Drawn) -> tuple[Any, ...]:
                nonlocal words
                words += f"{' ' if words else ''}{drawn.used['model']}: {used_in_words(drawn.used)}"
                return _gallery(drawn.images), sentence(words)

            before = words
            wish = (model, num, labels, seed, steps, scheduler, guidance)
            for last in self._follow(lambda wish=wish: self.service.generate(_wish(*wish)), done, request, 2):
                yield (SAME, *last) if side else (last[0], SAME, last[1])
            if words == before:  # stopped, or refused
                return

    def cancel(self, request: gr.Request) -> str | dict[str, Any]:
        """Stop whatever this visitor has asked for; who follows it says so."""
        with self._lock:
            jobs = list(self._jobs.get(request.session_hash, []))
        stopped = [job.stop() for job in jobs]
        return SAME if any(stopped) else sentence("nothing is running")

    def _follow(self, begin: Callable[[], Job[Any]], done: Callable[[Any], tuple[Any, ...]], request: gr.Request, outputs: int) -> Updates:
        """A gallery, a sentence and nothing else while the work goes on, and at the end what `done` makes of it."""
        rest = (SAME,) * (outputs - 2)
        shown, job = "", None
        try:
            job = begin()
            with self._lock:
                self._jobs.setdefault(request.session_hash, []).append(job)
            for each in job.watch():
                shown = each.text
                yield (SAME if each.images is None else _gallery(each.images)), sentence(each.text), *rest
            yield done(job.result())
        except Stopped:
            yield SAME, sentence(f"stopped at {shown}" if shown.startswith("step") else "stopped"), *rest
        except UserError as error:
            yield SAME, sentence(str(error), wrong=True), *rest
        finally:
            if job is not None:
                self._forget(request.session_hash, job)

    def _forget(self, session: str | None, job: Job[Any]) -> None:
        job.stop()
        with self._lock:
            jobs = self._jobs.get(session, [])
            if job in jobs:
                jobs.remove(job)
            if not jobs:
                self._jobs.pop(session, None)

    # --- one image, further ---

    def choose(self, event: gr.SelectData) -> int:
        """The number of the image that was clicked on."""
        return event.index if isinstance(event.index, int) else 0

    def take(self, model: Any, drawn: Any, chosen: int) -> tuple[Any, ...]:
        """An image that was drawn, to be painted on: itself, the editor's, a sentence, the tab."""
        image = _chosen(drawn, chosen)
        if image is None:
            return SAME, SAME, sentence("generate something first, and click on an image", wrong=True), gr.Tabs(selected="inpaint")
        return (
            image,
            canvas(image),
            sentence(f"image {chosen} of Generate: paint over what is to be drawn anew"),
            gr.Tabs(selected="inpaint"),
        )

    def upload(self, model: Any, file: Any) -> tuple[Any, ...]:
        """An image from outside, to be painted on: itself, the editor's, a sentence."""
        try:
            if file is None:
                raise UserError("no file came; choose one")
            image = self.service.upload(_text(model, "the network"), Path(file["path"]))
        except UserError as error:
            return SAME, SAME, sentence(str(error), wrong=True)
        return image, canvas(image), sentence("uploaded, and brought to the network's size: paint over what is to be drawn anew")

    def nearest(self, model: Any, drawn: Any, chosen: int, request: gr.Request) -> Updates:
        """Gallery, sentence."""

        def begin() -> Job[Any]:
            image = _chosen(drawn, chosen)
            if image is None:
                raise UserError("generate something first, and click on an image")
            return self.service.nearest(_text(model, "the network"), image)

        def done(found: Any) -> tuple[Any, ...]:
            said = f"Image {chosen}. {found.verdict} In order: {', '.join(found.names)}."
            return _gallery(found.images, captions_of(found)), sentence(said)

        yield from self._follow(begin, done, request, 2)

    def following(self, number: Any) -> Any:
        """The number after one that is shown; what is none is left to be complained of."""
        return (number or 0) + 1 if isinstance(number or 0, int) and (number or 0) < MOST_SEED else SAME

    def masks(self, model: Any, stage: Any, number: Any, seed: Any, request: gr.Request) -> Updates:
        """Gallery, sentence."""

        def begin() -> Job[Any]:
            names = _text(model, "the network"), _text(stage, "the stage")
            return self.service.masks(*names, _whole(number, "the image's number"), _whole(seed, "the seed"))

        def done(masked: Any) -> tuple[Any, ...]:
            return _gallery(masked.images, ["image", *["seen"] * (len(masked.images) - 1)]), sentence(
                f"{masked.text} The image is {masked.name}."
            )

        yield from self._follow(begin, done, request, 2)


def _gallery(images: NDArray[np.uint8], captions: list[str] | None = None) -> Any:
    return gr.update(value=tiles(images, captions), elem_classes=classes_of(images, large=captions is not None))


def _chosen(drawn: Any, number: int) -> NDArray[np.uint8] | None:
    return None if drawn is None or not 0 <= number < len(drawn) else drawn[number]


def _whole(value: Any, name: str) -> int:
    """A whole number from a field, 0 where that is empty. Raises UserError."""
    return 0 if value is None else checked(value, name, int)


def _text(value: Any, name: str) -> str | None:
    """What was chosen in a list. Raises UserError."""
    return checked(value, name, str) if value else None


def _wish(model: Any, num: Any, labels: Any, seed: Any, steps: Any, scheduler: Any, guidance: Any) -> Wish:
    """What the controls ask for; an empty one as the run has it. Raises UserError."""
    given = {"model": model, "num": num, "labels": labels, "seed": seed, "steps": steps, "scheduler": scheduler or None}
    return wish_of(given | {"guidance": guidance})
