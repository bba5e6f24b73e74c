from __future__ import annotations

import diffusers
import pytest
import torch

from maskdm.config import Diffusion, LogitNormalTimesteps, MinSNRWeight, UniformTimesteps
from maskdm.diffusion import Schedule, Target, add_noise, alpha_sigma, betas, convert, draw_times, drop_labels, loss_weight
from maskdm.errors import UserError

SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine", "vp", "flow")
TARGETS: tuple[Target, ...] = ("eps", "x0", "v")


def reference(schedule: str) -> diffusers.DDPMScheduler:
    if schedule == "vp":
        return diffusers.DDPMScheduler(trained_betas=betas("vp").tolist())
    return diffusers.DDPMScheduler(beta_schedule="linear" if schedule == "linear" else "squaredcos_cap_v2")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp"])
def test_noising_and_velocity_equal_those_of_diffusers(schedule: Schedule) -> None:
    x0, eps = torch.randn(1000, 2, 3, 3), torch.randn(1000, 2, 3, 3)
    t = torch.arange(1000)
    oracle = reference(schedule)
    noised = add_noise(Diffusion(schedule=schedule, target="v"), x0, eps, t.float())
    torch.testing.assert_close(noised.x_t, oracle.add_noise(x0, eps, t), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(noised.target, oracle.get_velocity(x0, eps, t), atol=2e-4, rtol=1e-4)


def test_flow_equals_that_of_diffusers() -> None:
    oracle = diffusers.FlowMatchEulerDiscreteScheduler()
    x0, eps = torch.randn(1000, 5), torch.randn(1000, 5)
    noised = add_noise(Diffusion(schedule="flow", target="v"), x0, eps, oracle.timesteps)
    torch.testing.assert_close(noised.x_t, oracle.scale_noise(x0, oracle.timesteps, eps))
    torch.testing.assert_close(noised.target, eps - x0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_conversions_round_trip(schedule: Schedule, target: Target) -> None:
    x0, eps = torch.randn(64, 7, dtype=torch.float64), torch.randn(64, 7, dtype=torch.float64)
    t = torch.linspace(5, 950, 64, dtype=torch.float64)
    alpha, sigma = (s[:, None] for s in alpha_sigma(schedule, t))
    x_t = alpha * x0 + sigma * eps
    v = eps - x0 if schedule == "flow" else alpha * eps - sigma * x0
    got = convert(schedule, target, {"eps": eps, "x0": x0, "v": v}[target], x_t, t)
    torch.testing.assert_close(got.x0, x0)
    torch.testing.assert_close(got.eps, eps)
    torch.testing.assert_close(got.v, v)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_signal_falls_and_noise_rises(schedule: Schedule) -> None:
    alpha, sigma = alpha_sigma(schedule, torch.linspace(0, 999, 5000, dtype=torch.float64))
    assert (alpha.diff() <= 0).all() and (sigma.diff() >= 0).all()
    assert alpha[0] > 0.99 and sigma[-1] > 0.99


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_times_are_uniform_over_the_schedule(schedule: Schedule) -> None:
    t = draw_times(Diffusion(schedule=schedule, target="v"), torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert t.min() >= 0 and t.max() <= (1000 if schedule == "flow" else 999)
    assert torch.equal(t, t.floor()) == (schedule in ("linear", "cosine"))
    counts = torch.histc(t, 10, 0, 1000)
    assert (counts / 10_000 - 1).abs().max() < 0.05


def test_logit_normal_times_have_its_median_and_quartiles() -> None:
    share = (torch.arange(10_000) + 0.5) / 10_000
    t = draw_times(Diffusion(schedule="flow", target="v", timesteps=LogitNormalTimesteps(0.5, 2.0)), share) / 1000
    quartiles = torch.logit(t.quantile(torch.tensor([0.25, 0.5, 0.75])))
    torch.testing.assert_close(quartiles, 0.5 + 2.0 * torch.tensor([-0.6745, 0.0, 0.6745]), atol=0.01, rtol=0)
    uniform = draw_times(Diffusion(schedule="flow", target="v", timesteps=UniformTimesteps()), share)
    torch.testing.assert_close(uniform / 1000, share)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp"])
def test_min_snr_weights_the_error_of_x0_by_min_snr_gamma(schedule: Schedule, target: Target) -> None:
    t = torch.tensor([10.0, 200.0, 500.0, 900.0], dtype=torch.float64)
    x0, eps = torch.randn(4, 50, dtype=torch.float64), torch.randn(4, 50, dtype=torch.float64)
    diffusion = Diffusion(schedule=schedule, target=target, weight=MinSNRWeight(5.0))
    noised = add_noise(diffusion, x0, eps, t)
    guess = noised.target + torch.randn(4, 50, dtype=torch.float64)
    error_x0 = (convert(schedule, target, guess, noised.x_t, t).x0 - x0).square().mean(1)
    alpha, sigma = alpha_sigma(schedule, t)
    expected = (alpha / sigma).square().clamp(max=5.0) * error_x0
    got = loss_weight(diffusion, t) * (guess - noised.target).square().mean(1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(loss_weight(Diffusion(schedule=schedule, target=target), t), torch.ones_like(t))


def test_flow_with_eps_is_refused() -> None:
    with pytest.raises(UserError, match=r"diffusion\.target eps"):
        Diffusion(schedule="flow", target="eps")


def test_dropped_labels_become_the_null_class() -> None:
    assert drop_labels(torch.tensor([3, 1, 2, -1]), torch.tensor([True, False, True, False]), 10).tolist() == [10, 1, 10, 10]
