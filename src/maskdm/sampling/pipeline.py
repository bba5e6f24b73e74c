"""A diffusers pipeline around a denoiser: any diffusers scheduler, class labels, guidance, a seed per image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from maskdm.config import GuideName
from maskdm.diffusion import Target, convert
from maskdm.errors import UserError
from maskdm.masking import Route
from maskdm.models import Denoiser
from maskdm.sampling.conditions import conditions
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
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw `batch_size` images.

        class_labels: one per image, the null class (or None) for unconditional. generator: one, or one per image.
        guidance_scale: 1 for none; above, guidance away from the null class (guide "label", arXiv 2207.12598), of conditional networks
        only, or from what the outer blocks alone predict without a class (guide "path", arXiv 2510.21986), of networks with `fuse` only.
        clip: keep the predicted image within [-1, 1] at each step. eta: 0..1, for ddim. on_step: called with the step
        number and x_t. output_type: "pil", "np" [B, H, W, C] in 0..1, or "pt" [B, C, H, W] in 0..1.
        Raises UserError for labels that do not fit.
        """
        labels = self._labels(class_labels, batch_size)
        clip = clip and self.vae is None  # latents have no bounds
        if guide == "path" and not self.unet.fuse:
            raise UserError("guide path needs a network with fuse, and this one has none; use guide label")
        asked = conditions(self.unet, guidance_scale, guide, num_inference_steps)
        guided = self.unet.guidance_dial is None and guidance_scale != 1 and (guide == "path" or self.unet.num_classes > 0)
        shape = (batch_size, self.unet.config["in_channels"], *self.unet.size)
        x = randn_tensor(shape, generator=generator, device=self.device)
        if "clip_sample" in self.scheduler.config:  # on in the saved folder, for stock pipelines, which do not clip themselves
            self.scheduler.register_to_config(clip_sample=clip)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}
        steps: Any = self.progress_bar(self.scheduler.timesteps)  # pyright: ignore[reportCallIssue] - diffusers binds it oddly
        for number, t in enumerate(steps):
            model_input = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            output = self._predict(model_input, t, labels, guidance_scale if guided else 1.0, guide, asked)
            x = self.scheduler.step(self._for_scheduler(output, model_input, t, clip), t, x, **extra).prev_sample
            if on_step is not None:
                on_step(number, x)
        images = (self.to_pixels(x) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            array = images.permute(0, 2, 3, 1).float().cpu().numpy()
            images = self.numpy_to_pil(array) if output_type == "pil" else array
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def to_pixels(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in about -1..1 from what the network learned: the same, or decoded latents."""
        if self.vae is None:
            return x
        mean, std = (torch.tensor(self.config[name], device=self.vae.device)[:, None, None] for name in ("latent_mean", "latent_std"))
        latents = x.to(self.vae.device) * std + mean
        return torch.cat([self.vae.decode(part.to(self.vae.dtype)).sample for part in latents.split(DECODED)]).to(x.device)

    def _labels(self, labels: list[int] | Tensor | None, batch: int) -> Tensor | None:
        null = self.unet.num_classes
        if labels is None:
            return None if null == 0 else torch.full((batch,), null, device=self.device)
        labels = torch.as_tensor(labels, device=self.device)
        if null == 0:
            raise UserError("this model knows no classes; leave the labels out")
        if labels.shape != (batch,) or labels.min() < 0 or labels.max() > null:
            raise UserError(f"give one label per image, from 0 to {null - 1} ({null} for none): {batch} images, labels {labels.tolist()}")
        return labels

    def _predict(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None,
        guidance: float,
        guide: GuideName = "label",
        asked: Mapping[str, float] = MappingProxyType({}),
    ) -> Tensor:
        if guidance == 1.0:
            return self.unet(x, t, labels, **asked).sample
        null = None if labels is None else torch.full_like(labels, self.unet.num_classes)
        if guide == "path":
            nothing = Route(torch.zeros(len(x), 0, dtype=torch.int64, device=x.device), self.unet.fuse, self.unet.fuse)
            return torch.lerp(self.unet(x, t, null, route=nothing, **asked).sample, self.unet(x, t, labels, **asked).sample, guidance)
        assert labels is not None and null is not None
        conditional, unconditional = self.unet(torch.cat([x, x]), t, torch.cat([labels, null]), **asked).sample.chunk(2)
        return torch.lerp(unconditional, conditional, guidance)

    def _for_scheduler(self, output: Tensor, x: Tensor, t: Tensor, clip: bool) -> Tensor:
        """The network's output as the scheduler wants it, with the image clipped."""
        target: Target = self.config["target"]
        wanted = TARGETS[prediction_type(self.scheduler)]
        if not clip and wanted == target:
            return output
        times = t.to(x).expand(x.shape[0])
        prediction = convert(self.config["schedule"], target, output, x, times)
        if clip:
            prediction = convert(self.config["schedule"], "x0", prediction.x0.clamp(-1, 1), x, times)
        return getattr(prediction, wanted)
