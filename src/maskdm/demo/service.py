"""What the demo computes: images drawn, completed, on the way between two, beside their neighbours, and as the masked stage saw them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import maskdm
from maskdm.config import Data, Hardware, Sampling
from maskdm.data import Dataset, to_model_range, to_uint8
from maskdm.demo.masks import Masked, masked
from maskdm.demo.models import Opened, Shelf
from maskdm.demo.nearest import Found, Search
from maskdm.demo.uploads import read_mask, read_upload
from maskdm.demo.wishes import Wish
from maskdm.demo.work import WAITING, Job, Worker
from maskdm.engine import this_machine
from maskdm.errors import UserError
from maskdm.models import Denoiser
from maskdm.runs.directory import RunDirectory
from maskdm.runs.display import Display
from maskdm.runs.edit import Asked, EditRequest, draw_task, edit_settings
from maskdm.runs.sample import SampleRequest, draw_images, sampling_settings
from maskdm.runs.sets import dataset_of
from maskdm.runs.wishes import Film, Wishes, choose_labels, share_of
from maskdm.sampling import make_scheduler, seeded, slerp
from maskdm.sampling.tasks import Inpaint

Images = NDArray[np.uint8]
"""[n, channels, height, width]."""

PICTURES = 24
"""Of a computation on its way, at most: each is a file per image, and of latents has to be decoded."""

GRAY = 127
"""What stands for an image that is not begun."""

SEARCHES = 2
"""Data sets whose averages stay in memory."""


@dataclass(frozen=True)
class Drawn:
    """Images, and what they were drawn with: plain values."""

    images: Images
    used: dict[str, Any]


class Live(Film):
    """Shows images on their way from noise, and stops them where that was asked for."""

    def __init__(self, job: Job[Drawn], pipeline: maskdm.MaskDMPipeline, data: Data, num: int) -> None:
        super().__init__()
        self._job, self._pipeline, self._next = job, pipeline, 0
        self._images = np.full((num, data.channels, *data.image_size), GRAY, dtype=np.uint8)

    def take(self, numbers: Sequence[int], step: int, x: Tensor) -> None:
        """Show what these images are after a step; where the noise is larger than the image, scaled."""
        self._job.check()
        steps = len(self._pipeline.scheduler.timesteps)
        past = numbers[0] * steps + step * len(numbers)  # steps of single images
        if self._job.due and past >= self._next:
            self._next = past + len(self._images) * steps / PICTURES
            x = self._pipeline.to_pixels(x.float())
            self._images[list(numbers)] = to_uint8(x / x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)).cpu().numpy()
            what = "" if len(numbers) == len(self._images) else f", images {numbers[0] + 1} to {numbers[-1] + 1} of {len(self._images)}"
            self._job.show(f"step {step + 1} of {steps}{what}", self._images.copy())


@dataclass(frozen=True)
class Way(Wishes):
    """From the first image of a seed to the first of another."""

    seeds: tuple[int, int] = (0, 0)

    def noise(self, network: Denoiser, seed: int, numbers: range, num: int) -> Tensor | None:
        """On the arc between theirs."""
        shape = (1, network.config["in_channels"], *network.size)
        ends = [torch.randn(shape, generator=seeded(each, range(1))[0]) for each in self.seeds]
        return torch.cat([slerp(ends[0], ends[1], share_of(number, num)) for number in numbers])


class Service:
    """All that the page and the API ask for. Every method gives a job, or raises UserError at once."""

    def __init__(self, runs: Sequence[Path], waiting: int = WAITING) -> None:
        self.shelf, self.worker = Shelf(runs), Worker(waiting)
        self._datasets: dict[Path, Dataset] = {}
        self._searches: dict[Path, Search] = {}

    def close(self) -> None:
        """Stop everything."""
        self.worker.close()

    # --- drawing ---

    def generate(self, wish: Wish) -> Job[Drawn]:
        """Images 0 to num - 1 of the seed: those of `maskdm sample`."""
        self._check(wish)
        return self.worker.begin(lambda job: self._draw(job, wish, Wishes(), wish.labels))

    def morph(self, wish: Wish, seed: int) -> Job[Drawn]:
        """The way from image 0 of the wish's seed, and the first of its labels, to image 0 of `seed`, and the last of its labels."""
        self._check(wish)
        Wish(seed=seed)
        if wish.num < 2:
            raise UserError("a way has at least 2 images, its ends; ask for more")
        return self.worker.begin(lambda job: self._draw(job, wish, Way(between=(0, 0), seeds=(wish.seed, seed)), wish.labels))

    def _check(self, wish: Wish) -> None:
        """Raise UserError for what the network cannot do, before it is waited for."""
        traits = self.shelf.traits(wish.model)
        choose_labels(traits.classes, wish.labels, wish.num)
        sampling_settings(self.shelf.run(wish.model).config(), _request(wish))
        if wish.scheduler is not None and wish.scheduler not in traits.schedulers:
            raise UserError(f"scheduler {wish.scheduler} does not fit this network; use one of {', '.join(traits.schedulers)}")

    def _draw(self, job: Job[Drawn], wish: Wish, wishes: Wishes, labels: tuple[str, ...]) -> Drawn:
        opened, started = self._open(job, wish), time.perf_counter()
        pipeline, settings = opened.pipeline, sampling_settings(opened.config, _request(wish))
        pipeline.scheduler = make_scheduler(settings.scheduler, pipeline.config["schedule"], pipeline.config["target"])
        chosen = choose_labels(pipeline.config["class_names"], labels, wish.num, wishes.between)
        film = Live(job, pipeline, opened.config.data, wish.num)
        asked = Way(wishes.between, film=film, seeds=wishes.seeds) if isinstance(wishes, Way) else Wishes(film=film)
        precision = this_machine(Hardware()).precision
        images = draw_images(pipeline, settings, range(wish.num), chosen, wish.seed, precision, wishes=asked, num=wish.num)
        names = pipeline.config["class_names"]
        in_turn = [(labels or names)[i % len(labels or names)] for i in range(wish.num)] if names else None
        drawn = list(labels) if isinstance(wishes, Way) else in_turn
        return Drawn(images, _used(opened, wish, settings, drawn, time.perf_counter() - started))

    def _open(self, job: Job[Any], wish: Wish) -> Opened:
        job.check()
        job.show("reads the network")
        opened = self.shelf.open(wish.model)
        job.check()
        return opened

    # --- completing ---

    def upload(self, model: str | None, path: Path) -> NDArray[np.uint8]:
        """An uploaded image [channels, height, width] at the size of a model. Raises UserError."""
        self._refuse_latents(model)
        return read_upload(path, self.shelf.run(model).config().data)

    def _refuse_latents(self, model: str | None) -> None:
        """Before anything is painted in vain."""
        if self.shelf.traits(model).latent:
            name = self.shelf.find(model).name
            raise UserError(f"{name} draws latents, whose pixels are not known while they are drawn; inpaint with a run on pixels")

    def inpaint(self, wish: Wish, image: NDArray[np.uint8], layers: Sequence[Image.Image]) -> Job[Drawn]:
        """Images [num, ...] like `image` [channels, height, width], but for what is painted over in `layers`, which is drawn anew."""
        self._check(wish)
        self._refuse_latents(wish.model)
        data = self.shelf.run(wish.model).config().data
        if image.shape != (data.channels, *data.image_size):
            raise UserError("the image is of another size than this model's; choose it again")
        hidden = read_mask(list(layers), data)
        config = self.shelf.run(wish.model).config()
        edit_settings(_edit(wish, self.shelf.find(wish.model).run), config)
        return self.worker.begin(lambda job: self._inpaint(job, wish, image, hidden))

    def _inpaint(self, job: Job[Drawn], wish: Wish, image: NDArray[np.uint8], hidden: NDArray[np.bool_]) -> Drawn:
        opened, started, machine = self._open(job, wish), time.perf_counter(), this_machine(Hardware())
        request = _edit(wish, opened.model.run)
        settings = edit_settings(request, opened.config)
        pipeline = opened.pipeline
        pipeline.scheduler = make_scheduler(settings.scheduler, pipeline.config["schedule"], pipeline.config["target"])
        whole = to_model_range(torch.from_numpy(image)[None]).to(machine.device)
        task = Inpaint(whole, torch.from_numpy(~hidden).to(machine.device))
        film, numbers = Live(job, pipeline, opened.config.data, wish.num), range(wish.num)
        asked = Asked(task, task.invert(task.known))
        drawn, _ = draw_task(request, pipeline, settings, asked, machine, lambda step, x: film.take(numbers, step, x))
        return Drawn(to_uint8(drawn).cpu().numpy(), _used(opened, wish, settings, list(wish.labels) or None, time.perf_counter() - started))

    # --- what it was trained on ---

    def nearest(self, model: str | None, image: NDArray[np.uint8], num: int = 8) -> Job[Found]:
        """The training images that an image [channels, height, width] is most like."""
        run = self.shelf.run(model)
        if image.shape != (run.config().data.channels, *run.config().data.image_size):
            raise UserError("the image is of another size than the images this model was trained on")

        def work(job: Job[Found]) -> Found:
            if run.path not in self._searches:
                dataset = self._dataset(run.path, job)
                job.show("looks through the training images")
                while len(self._searches) >= SEARCHES:
                    self._searches.pop(next(iter(self._searches)))
                self._searches[run.path] = Search(run.config(), dataset, job.check)
            return self._searches[run.path].find(image, num)

        return self.worker.begin(work)

    def masks(self, model: str | None, stage: str | None, number: int, seed: int) -> Job[Masked]:
        """A training image, by its number, and what a masked stage (None: the first) sees of it, several times over."""
        run = self.shelf.run(model)
        Wish(seed=seed)
        if number < 0:
            raise UserError(f"the image's number is {number}; give one from 0")
        return self.worker.begin(lambda job: masked(run.config(), self._dataset(run.path, job), stage, number, seed))

    def _dataset(self, path: Path, job: Job[Any]) -> Dataset:
        if path not in self._datasets:
            job.check()
            job.show("opens the training images")
            run = RunDirectory.existing(path)
            self._datasets[path] = dataset_of(run, run.config(), None, Display(quiet=True))
        return self._datasets[path]


def _request(wish: Wish) -> SampleRequest:
    return SampleRequest(
        Path(), Path(), wish.num, wish.steps, wish.scheduler_name, guidance=wish.guidance, seed=wish.seed, labels=wish.labels
    )


def _edit(wish: Wish, run: Path) -> EditRequest:
    guidance = wish.guidance if wish.labels else None  # the page always gives one
    return EditRequest(
        run, Path(), "inpaint", num=wish.num, steps=wish.steps, scheduler=wish.scheduler_name, guidance=guidance,
        labels=wish.labels, seed=wish.seed,
    )  # fmt: skip


def _used(opened: Opened, wish: Wish, settings: Sampling, labels: list[str] | None, seconds: float) -> dict[str, Any]:
    """What images were drawn with, and in which time."""
    return {
        "model": opened.model.name,
        "weights": opened.origin,
        "num": wish.num,
        "labels": labels,
        "seed": wish.seed,
        "steps": settings.steps,
        "scheduler": settings.scheduler,
        "guidance": settings.guidance,
        "seconds": round(seconds, 3),
    }
