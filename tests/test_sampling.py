from __future__ import annotations

from itertools import product
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from maskdm.config import SCHEDULERS, Sampling
from maskdm.diffusion import Schedule, Target, alpha_sigma, convert
from maskdm.errors import UserError
from maskdm.masking import Route
from maskdm.models import Denoiser, DenoiserOutput, DiT, UViT
from maskdm.runs.sample import draw_images, fitting_batch
from maskdm.sampling import MaskDMPipeline, make_scheduler, offered, seeded, slerp
from maskdm.sampling.guides import Guide, guided, tiled

MEAN = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
ROOT = torch.tensor([[0.4, 0, 0, 0], [0.2, 0.3, 0, 0], [0, 0.1, 0.5, 0], [0.1, 0, 0.2, 0.2]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T


class GaussianDenoiser(Denoiser):
    """The exact denoiser of Gaussian data in four pixels: E[x0 | x_t] in closed form."""

    @register_to_config
    def __init__(self, schedule: str, target: str, sample_size: int = 2, in_channels: int = 1) -> None:
        super().__init__()
        self._set_geometry(sample_size, 1, 0)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, kept: Any = None, return_dict: bool = True) -> Any:
        x = sample.flatten(1).double()
        t = torch.as_tensor(timestep).double().expand(len(x))
        alpha, sigma = alpha_sigma(self.config["schedule"], t[:1])
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(4, dtype=torch.float64))
        x0 = MEAN + (x - alpha * MEAN) @ gain.T
        output = getattr(convert(self.config["schedule"], "x0", x0, x, t), self.config["target"])
        return DenoiserOutput(sample=output.view_as(sample).to(sample.dtype))


CASES = [
    (schedule, target, name)
    for schedule, target in [*product(["linear"], ["eps", "x0", "v"]), ("cosine", "v"), ("vp", "v"), ("flow", "v"), ("flow", "x0")]
    for name in offered(schedule)  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize(("schedule", "target", "name"), CASES)
def test_exact_denoiser_gives_the_mean_and_covariance_of_the_data(schedule: Schedule, target: Target, name: Any) -> None:
    pipeline = MaskDMPipeline(GaussianDenoiser(schedule, target), make_scheduler(name, schedule, target), target, schedule)
    pipeline.set_progress_bar_config(disable=True)
    last: list[Tensor] = []
    steps = 500 if name in ("ddpm", "euler-a") else 80  # the covariance of these two is right to order 1 / steps
    pipeline(4096, None, torch.Generator().manual_seed(0), steps, clip=False, output_type="pt", on_step=lambda _, x: last.append(x))
    x = last[-1].flatten(1).double()
    assert (x.mean(0) - MEAN).abs().max() < 0.03
    assert (x.T.cov() - COVARIANCE).abs().max() < 0.03


def test_every_scheduler_offered_is_one_of_the_settings() -> None:
    assert offered("linear") == SCHEDULERS
    with pytest.raises(UserError, match="scheduler pndm does not fit the rectified flow"):
        make_scheduler("pndm", "flow", "v")


def small(classes: int = 3, target: Target = "v") -> MaskDMPipeline:
    torch.manual_seed(0)
    model = UViT(8, 1, 2, width=32, depth=3, heads=2, num_classes=classes)
    pipeline = MaskDMPipeline(model.eval(), make_scheduler("ddim", "cosine", target), target, "cosine", [str(i) for i in range(classes)])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++", "dpm++sde", "euler-a", "sa"])
def test_an_image_does_not_depend_on_its_batch(name: Any) -> None:
    pipeline = small()
    pipeline.scheduler = make_scheduler(name, "cosine", "v")

    def draw(indices: range) -> Tensor:
        output: Any = pipeline(len(indices), [i % 3 for i in indices], seeded(5, indices), 10, eta=1.0, output_type="pt")
        return output.images

    together, apart = draw(range(5)), torch.cat([draw(range(2)), draw(range(2, 5))])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)
    assert (draw(range(1)) - draw(range(1, 2))).abs().max() > 0.05


def test_guidance_extrapolates_from_the_null_class() -> None:
    pipeline = small()
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 2])
    conditional, null = pipeline.unet(x, t, labels).sample, pipeline.unet(x, t, None).sample
    torch.testing.assert_close(
        guided(pipeline.unet, "cosine", x, t, labels, Guide(3.0), {}), null + 3.0 * (conditional - null), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(guided(pipeline.unet, "cosine", x, t, labels, Guide(), {}), conditional)
    negative = guided(pipeline.unet, "cosine", x, t, labels, Guide(3.0, negative=torch.tensor([1, 1])), {})
    other = pipeline.unet(x, t, torch.tensor([1, 1])).sample
    torch.testing.assert_close(negative, other + 3.0 * (conditional - other), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("classes", [0, 3])
def test_path_guidance_extrapolates_from_the_outer_blocks_alone(classes: int) -> None:
    torch.manual_seed(0)
    network = DiT(8, 1, 2, 16, 4, 2, num_classes=classes, fuse=1).eval()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipeline = MaskDMPipeline(network, make_scheduler("ddim", "cosine", "v"), "v", "cosine", ["a", "b", "c"][:classes])
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 2]) if classes else None
    all_shallow = Route(None, 1, 1, torch.tensor([True, True]))
    weak, strong = network(x, t, None, None, all_shallow).sample, network(x, t, labels).sample
    torch.testing.assert_close(
        guided(network, "cosine", x, t, labels, Guide(3.0, "path"), {}), weak + 3.0 * (strong - weak), atol=1e-5, rtol=1e-4
    )
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, None if labels is None else labels, num_inference_steps=2, guidance_scale=2.0, guide="path", output_type="pt")
    assert drawn.images.shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="guide path needs a network with fuse"):
        small()(2, num_inference_steps=1, guide="path")


def test_clipping_keeps_the_image_in_range_and_the_noise_consistent() -> None:
    pipeline = small(target="eps")
    x, t = 3 * torch.randn(2, 1, 8, 8), torch.tensor(600)
    output = 10 * torch.randn_like(x)
    prediction = convert("cosine", "eps", output, x, t.float().expand(2))
    clipped = pipeline._limited(prediction, x, t, 1.0)
    assert convert("cosine", "eps", clipped.eps, x, t.float().expand(2)).x0.abs().max() <= 1 + 1e-4
    assert torch.equal(pipeline._limited(prediction, x, t, None).eps, output)
    scaled = pipeline._limited(prediction, x, t, 0.9).x0
    assert scaled.abs().max() == 1 and 0.1 < (scaled.abs() == 1).float().mean() < 0.15  # a tenth lies above the quantile
    near = pipeline._limited(convert("cosine", "x0", torch.full_like(x, 0.5), x, t.float().expand(2)), x, t, 0.9).x0
    assert torch.equal(near, torch.full_like(x, 0.5))  # nothing is brightened


def test_labels_are_checked() -> None:
    with pytest.raises(UserError, match="knows no classes"):
        small(0)(1, [0])
    for bad in ([0], [0, 4], [0, -1]):
        with pytest.raises(UserError, match="one label per image"):
            small()(2, bad)


def test_saved_pipelines_open_again_and_unconditional_ones_in_the_stock_pipeline(tmp_path: Any) -> None:
    pipeline = small(0)
    pipeline.save_pretrained(tmp_path)
    again = MaskDMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    first: Any = pipeline(2, generator=seeded(0, range(2)), num_inference_steps=5, output_type="pt")
    second: Any = again(2, generator=seeded(0, range(2)), num_inference_steps=5, output_type="pt")
    assert torch.equal(first.images, second.images)
    assert (again.config["target"], again.config["schedule"]) == ("v", "cosine")
    again.scheduler = diffusers.UniPCMultistepScheduler.from_config(again.scheduler.config)
    third: Any = again(2, generator=seeded(0, range(2)), num_inference_steps=5, output_type="pil")
    assert third.images[0].size == (8, 8)
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    images: Any = stock(2, generator=torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np")
    # the stock pipeline draws the same noise and takes the same steps: only the consistent clipping is ours
    ours: Any = pipeline(2, generator=torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np")
    assert images.images.shape == (2, 8, 8, 1)
    assert abs(images.images - ours.images).mean() < 0.2


def test_the_batch_that_fits_is_halved_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, sizes = small(), list[int]()
    settings = Sampling(steps=2)
    expected = draw_images(pipeline, settings, range(7), [0] * 7, 3, "fp32", batch=7)
    plain = UViT.denoise

    def denoise(self: UViT, patches: Tensor, *rest: Any) -> Tensor:
        if len(patches) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        sizes.append(len(patches))
        return plain(self, patches, *rest)

    monkeypatch.setattr(UViT, "denoise", denoise)
    drawn = draw_images(pipeline, settings, range(7), [0] * 7, 3, "fp32")
    assert sizes == [1] * 14  # 7, 3, 1
    assert abs(drawn.astype(int) - expected).max() <= 1
    assert fitting_batch(pipeline) == 4096 // 16 and fitting_batch(pipeline, 3.0) == 4096 // 32


def test_half_precision_draws_about_the_same() -> None:
    pipeline = small()
    exact, rounded = (draw_images(pipeline, Sampling(steps=10), range(4), [0, 1, 2, 0], 3, p) for p in ("fp32", "bf16"))
    apart = abs(exact.astype(int) - rounded)
    assert 0 < apart.mean() < 3 and not (exact == rounded).all()


def images(pipeline: MaskDMPipeline, **settings: Any) -> Tensor:
    count = len(settings.get("class_labels", [0, 1]))
    asked = {"class_labels": [0, 1], "generator": seeded(0, range(count)), "num_inference_steps": 6, "output_type": "pt"} | settings
    drawn: Any = pipeline(count, **asked)
    return drawn.images


def evaluations(pipeline: MaskDMPipeline, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> int:
    sizes, plain = list[int](), type(pipeline.unet).denoise

    def denoise(self: Any, patches: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(patches))
        return plain(self, patches, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline.unet), "denoise", denoise)
        images(pipeline, **settings)
    return sum(sizes) // 2


def test_guidance_acts_in_its_window_and_costs_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = small()
    everywhere, plain = images(pipeline, guidance_scale=3.0), images(pipeline)
    assert torch.equal(images(pipeline, guidance_scale=3.0, guidance_window=(0.0, float("inf"))), everywhere)
    assert torch.equal(images(pipeline, guidance_scale=3.0, guidance_window=(1e6, 1e7)), plain)
    some = images(pipeline, guidance_scale=3.0, guidance_window=(0.3, 2.0))
    assert not torch.equal(some, everywhere) and not torch.equal(some, plain)
    counts = [
        evaluations(pipeline, monkeypatch, guidance_scale=3.0, guidance_window=window) for window in ((0.0, 1e9), (0.3, 2.0), (1e6, 1e7))
    ]
    assert counts[0] == 12 and 6 < counts[1] < 12 and counts[2] == 6
    with pytest.raises(UserError, match="guidance window is 2 to 1"):
        images(pipeline, guidance_scale=3.0, guidance_window=(2.0, 1.0))


def test_rescaled_guidance_has_the_contrast_of_none() -> None:
    pipeline = small()
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 2])
    plain, led, half, full = (guided(pipeline.unet, "cosine", x, t, labels, Guide(*how), {}) for how in (
        (1.0,), (8.0,), (8.0, "label", (0.0, 1e9), 0.5), (8.0, "label", (0.0, 1e9), 1.0),
    ))  # fmt: skip
    deviations = [each.std(dim=(1, 2, 3)) for each in (plain, led, half, full)]
    torch.testing.assert_close(deviations[3], deviations[0])
    torch.testing.assert_close(deviations[2], (deviations[0] + deviations[1]) / 2)


def test_autoguidance_leads_away_from_another_network() -> None:
    pipeline, weak = small(), small()
    for parameter in weak.unet.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 2])
    strong, poor = (network(x, t, labels).sample for network in (pipeline.unet, weak.unet))
    led = guided(pipeline.unet, "cosine", x, t, labels, Guide(2.0, "auto", weak=weak.unet), {})
    torch.testing.assert_close(led, poor + 2.0 * (strong - poor), atol=1e-5, rtol=1e-4)
    assert torch.equal(images(pipeline, guide="auto", guidance_scale=2.0, weak=pipeline.unet), images(pipeline))
    for wrong in ({"guide": "auto", "guidance_scale": 2.0}, {"guidance_scale": 2.0, "weak": weak.unet}):
        with pytest.raises(UserError, match="guide auto needs a weak network, and no other guide takes one"):
            images(pipeline, **wrong)


def test_a_mixture_of_classes_is_one_evaluation_of_the_mixed_embedding() -> None:
    pipeline = small()
    one_hot = torch.eye(4)[[0, 2]]
    torch.testing.assert_close(images(pipeline, class_labels=one_hot), images(pipeline, class_labels=[0, 2]))
    mixed = images(pipeline, class_labels=(one_hot + torch.eye(4)[[1, 1]]) / 2, guidance_scale=2.0, negative_labels=[0, 0])
    assert mixed.shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="weights of classes have the shape"):
        images(pipeline, class_labels=torch.eye(3)[[0, 2]])


def test_the_arc_between_two_noises_keeps_their_length_and_ends() -> None:
    first, last = torch.randn(2, 1, 1, 32, 32)
    assert torch.equal(slerp(first, last, 0.0), first) and torch.equal(slerp(first, last, 1.0), last)
    assert slerp(first, last, 0.5).norm() == pytest.approx((first.norm() + last.norm()).item() / 2, rel=0.01)
    torch.testing.assert_close(slerp(first, first.clone(), 0.3), first)
    pipeline = small()
    noise = torch.cat([torch.randn((1, 1, 8, 8), generator=each) for each in seeded(0, range(2))])
    assert torch.equal(images(pipeline, latents=noise), images(pipeline))
    with pytest.raises(UserError, match="latents have the shape"):
        images(pipeline, latents=noise[:1])


def test_a_larger_image_is_the_mean_of_its_windows() -> None:
    pipeline = small()
    x = torch.randn(2, 1, 12, 8)
    total = torch.zeros_like(x)
    for top in (0, 4):
        total[:, :, top : top + 8] += x[:, :, top : top + 8] * (top + 1)
    tops = iter((1, 5))
    found = tiled(pipeline.unet, x, lambda part: part * next(tops))
    torch.testing.assert_close(found, total / torch.tensor([1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1])[:, None])
    assert images(pipeline, height=12, width=20, guidance_scale=2.0).shape == (2, 1, 12, 20)
    assert torch.equal(images(pipeline, height=8, width=8), images(pipeline))
    with pytest.raises(UserError, match="smaller than the 8x8"):
        images(pipeline, height=4)
