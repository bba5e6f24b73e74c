"""A diffusers pipeline around a denoiser: any diffusers scheduler, class labels, guidance, a seed per image."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from maskdm.config import GuideName
from maskdm.diffusion import Prediction, convert
from maskdm.errors import UserError
from maskdm.models import Denoiser
from maskdm.sampling.conditions import conditions
from maskdm.sampling.guidance import Guidance, Moment
from maskdm.sampling.guides import Guide, Labels, as_labels, guided
from maskdm.sampling.schedulers import TARGETS, prediction_type

DECODED = 8
"""Images that an autoencoder decodes at a time."""


class MaskDMPipeline(DiffusionPipeline):
    """Draw images from a trained network.

    unet: the network (named as stock pipelines name it). scheduler: any diffusers scheduler for its noise schedule.
    target and schedule: what the network predicts and how it was noised. class_names: in the order of the labels. vae: the autoencoder
    whose latents the network learned, each channel at mean 0 and deviation 1; latent_mean and latent_std are what it was before.
    """

    _optional_components: ClassVar = ["vae"]

    def __init__(
        self,
        unet: Denoiser,
        scheduler: Any,
        target: str = "eps",
        schedule: str = "linear",
        class_names: list[str] | None = None,
        vae: Any = None,
        latent_mean: list[float] | None = None,
        latent_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        names, figures = list(class_names or []), {"latent_mean": list(latent_mean or []), "latent_std": list(latent_std or [])}
        self.register_to_config(target=target, schedule=schedule, class_names=names, **figures)

    unet: Denoiser
    scheduler: Any
    vae: Any

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: list[int] | Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        guide: GuideName = "label",
        clip: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        on_step: Callable[[int, Tensor], None] | None = None,
        *,
        guidance_window: tuple[float, float] = (0.0, float("inf")),
        guidance_rescale: float = 0.0,
        negative_labels: list[int] | Tensor | None = None,
        weak: Denoiser | None = None,
        threshold: float = 1.0,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Tensor | None = None,
        strength: float = 1.0,
        guidance: Guidance | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw `batch_size` images.

        class_labels: one per image, the null class (or None) for unconditional; or weights [B, classes + 1] of a mixture, which mixes the
        classes' embeddings. generator: one, or one per image. latents: noise [B, C, H, W] to start from, instead of the generator's.
        guidance_scale: 1 for none; above, guidance away from the null class or `negative_labels` (guide "label", arXiv 2207.12598),
        of conditional networks only; from what the outer blocks alone predict without a class (guide "path", arXiv 2510.21986), of networks
        with `fuse` only; or from what the network `weak` predicts (guide "auto", arXiv 2406.02507). It acts at noise levels within
        guidance_window, sigma / alpha (arXiv 2404.07724): elsewhere a step costs one evaluation. guidance_rescale: 0..1, how far the
        deviation of what guidance predicts is brought back to that without (arXiv 2305.08891, section 3.4).
        clip: keep the predicted image within [-1, 1] at each step; threshold: below 1 the quantile of its absolute values that is kept and
        scaled to 1, where it is larger (dynamic thresholding, arXiv 2205.11487). height and width: of an image larger than the network's,
        in what it learned (pixels or latents), drawn as overlapping windows averaged at each step (arXiv 2302.08113).
        image: [B, C, H, W] in -1..1 to start from, noised as far as `strength`, 0..1, of the steps go back (SDEdit, arXiv 2108.01073).
        guidance: called at each step between network and scheduler (sampling/guidance.py). eta: 0..1, for ddim. on_step: called with the
        step number and x_t. output_type: "pil", "np" [B, H, W, C] in 0..1, or "pt" [B, C, H, W] in 0..1.
        Raises UserError for what does not fit.
        """
        labels, negative = self._labels(class_labels, batch_size), self._labels(negative_labels, batch_size)
        limit = (threshold if clip else None) if self.vae is None else None  # latents have no bounds
        asked = conditions(self.unet, guidance_scale, guide, num_inference_steps)
        scale = 1.0 if self.unet.guidance_dial is not None else guidance_scale
        lead = Guide(scale, guide, guidance_window, guidance_rescale, negative, weak)
        lead.check(self.unet)
        shape = (batch_size, self.unet.config["in_channels"], height or self.unet.size[0], width or self.unet.size[1])
        x = self._noise(shape, generator, latents)
        if "clip_sample" in self.scheduler.config:  # on in the saved folder, for stock pipelines, which do not clip themselves
            self.scheduler.register_to_config(clip_sample=limit is not None)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        x, begin = self._noised(image, x, strength)
        predict = partial(self._predicted, labels=labels, lead=lead, asked=asked, limit=limit)
        x = self._stepped(x, begin, predict, guidance, limit is not None, self._accepted(generator, eta), on_step)
        images = self._as(output_type, (self.to_pixels(x) / 2 + 0.5).clamp(0, 1))
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def to_pixels(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in about -1..1 from what the network learned: the same, or decoded latents."""
        if self.vae is None:
            return x
        mean, std = (torch.tensor(self.config[name], device=self.vae.device)[:, None, None] for name in ("latent_mean", "latent_std"))
        latents = x.to(self.vae.device) * std + mean
        return torch.cat([self.vae.decode(part.to(self.vae.dtype)).sample for part in latents.split(DECODED)]).to(x.device)

    def _stepped(
        self,
        x: Tensor,
        begin: int,
        predict: Callable[[Tensor, Tensor], Prediction],
        guidance: Guidance | None,
        clip: bool,
        extra: dict[str, Any],
        on_step: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        """The scheduler's steps, from the one numbered `begin`."""
        times, scheduler = self.scheduler.timesteps[begin:], self.scheduler
        steps: Any = self.progress_bar(times)  # pyright: ignore[reportCallIssue] - diffusers binds it oddly
        for number, t in enumerate(steps):
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            if guidance is None:
                prediction = predict(seen, t)
            else:
                after = times[number + 1] if number + 1 < len(times) else None
                moment = Moment(number, t, after, self.config["schedule"], clip)
                changed, prediction = guidance(moment, seen, lambda noisy, t=t: predict(noisy, t))
                x = changed * (x.norm() / seen.norm()) if changed is not seen else x  # schedulers may hold it at another scale
            output = getattr(prediction, TARGETS[prediction_type(scheduler)])
            x = scheduler.step(output, t, x, **extra).prev_sample
            if on_step is not None:
                on_step(number, x)
        return x

    def _noised(self, image: Tensor | None, noise: Tensor, strength: float) -> tuple[Tensor, int]:
        """What the scheduler starts from: an image, or none, at the noise of a step, and the step's number."""
        if image is None:
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0), 0
        if image.shape != noise.shape or not 0 < strength <= 1:
            raise UserError(f"give an image of the shape {tuple(noise.shape)}, and a strength above 0, at most 1")
        times = self.scheduler.timesteps
        begin = min(len(times) - 1, len(times) - round(strength * len(times)))
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        add = self.scheduler.add_noise if hasattr(self.scheduler, "add_noise") else None
        at = times[begin : begin + 1]
        image = image.to(noise)
        noised = self.scheduler.scale_noise(image, at, noise) if add is None else add(image, noise, at.expand(len(image)))
        return noised, begin

    def _predicted(
        self, x: Tensor, t: Tensor, labels: Labels | None, lead: Guide, asked: dict[str, float], limit: float | None
    ) -> Prediction:
        return self._limited(self._guided(x, t, labels, lead, asked), x, t, limit)

    def _accepted(self, generator: torch.Generator | list[torch.Generator] | None, eta: float) -> dict[str, Any]:
        """Of these, what the scheduler's step takes."""
        known = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in known}

    def _as(self, output_type: str, images: Tensor) -> Any:
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None) -> Tensor:
        if any(side < least for side, least in zip(shape[2:], self.unet.size, strict=True)):
            raise UserError(f"images of {shape[2]}x{shape[3]} are smaller than the {self.unet.size[0]}x{self.unet.size[1]} of the network")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self.device)
        if tuple(latents.shape) != shape:
            raise UserError(f"latents have the shape {tuple(latents.shape)}; give {shape}")
        return latents.to(self.device)

    def _labels(self, labels: list[int] | Tensor | None, batch: int) -> Labels | None:
        null = self.unet.num_classes
        if labels is None:
            return None if null == 0 else torch.full((batch,), null, device=self.device)
        return as_labels(torch.as_tensor(labels, device=self.device), null, batch)

    def _guided(self, x: Tensor, t: Tensor, labels: Labels | None, lead: Guide, asked: dict[str, float]) -> Prediction:
        """What the network, guided, predicts at x_t."""
        output = guided(self.unet, self.config["schedule"], x, t, labels, lead, asked)
        return convert(self.config["schedule"], self.config["target"], output, x, t.to(x).expand(x.shape[0]))

    def _limited(self, prediction: Prediction, x: Tensor, t: Tensor, limit: float | None) -> Prediction:
        """The prediction with its image kept within [-1, 1], or within the quantile of its values that is scaled to that."""
        if limit is None:
            return prediction
        x0 = prediction.x0
        if limit < 1:
            most = x0.abs().flatten(1).float().quantile(limit, dim=1).clamp(min=1).to(x0)[:, None, None, None]
            x0 = x0.clamp(-most, most) / most
        return convert(self.config["schedule"], "x0", x0.clamp(-1, 1), x, t.to(x).expand(x.shape[0]))
