"""Training-free guidance: tasks, methods, what they cost, and what they find where the truth is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_sampling import COVARIANCE, MEAN, GaussianDenoiser, images, small
from torch import Tensor

from maskdm.config import SCHEDULERS
from maskdm.errors import UserError
from maskdm.sampling import MaskDMPipeline, make_scheduler, offered, seeded
from maskdm.sampling.guidance import METHODS, Moment, Steered, Steering
from maskdm.sampling.tasks import Colourise, Deblur, Fulfil, Inpaint, Linear, Palette, Task, Upscale


def tasks(truth: Tensor) -> dict[str, Task]:
    where = torch.zeros(truth.shape[-2:], dtype=torch.bool)
    where[:, : truth.shape[-1] // 2] = True
    deblur = Deblur(truth, 1.0)
    deblur.known = deblur.apply(truth)
    colours = torch.tensor([[-0.5], [0.8]]).expand(2, truth.shape[1])
    found: dict[str, Task] = {
        "inpaint": Inpaint(truth, where),
        "upscale": Upscale(torch.nn.functional.avg_pool2d(truth, 2), 2),
        "deblur": deblur,
        "palette": Palette(colours),
        "fulfil": Fulfil(lambda image: (image.mean(dim=(1, 2, 3)) - 0.7).square()),
    }
    return found | ({"colourise": Colourise(Colourise(truth[:, :1]).apply(truth))} if truth.shape[1] == 3 else {})


@pytest.mark.parametrize("name", ["inpaint", "upscale", "deblur", "colourise"])
def test_pseudo_inverses_are_such_and_steps_fulfil_the_task(name: str) -> None:
    truth, other = torch.rand(2, 2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    task = tasks(truth)[name]
    assert isinstance(task, Linear)
    a, back = task.apply, task.invert
    exact = {"atol": 1e-3 if name == "deblur" else 1e-6, "rtol": 0.0}
    if name != "deblur":  # some of its frequencies are given up
        torch.testing.assert_close(a(back(a(other))), a(other), **exact)
        torch.testing.assert_close(a(task.step(other)), task.known, **exact)
    torch.testing.assert_close(back(a(back(task.known))), back(task.known), **exact)
    assert task.loss(truth).max() < 1e-3 and task.loss(other).min() > 0.1 and task.loss(task.step(other)).max() < 1e-3
    assert (task.step(other) - truth).norm() < (other - truth).norm()


@pytest.mark.parametrize("name", ["palette", "fulfil"])
def test_steps_of_other_tasks_lower_their_loss(name: str) -> None:
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    task = tasks(image)[name]
    assert (task.loss(task.step(image)) < task.loss(image)).all()


def test_a_step_settles_where_the_loss_is_fulfilled() -> None:
    task = Fulfil(lambda image: (image.mean(dim=(1, 2, 3)) - 0.3).square())
    image = torch.full((1, 1, 8, 8), 0.301)
    for _ in range(3):
        after = task.step(image)
        assert task.loss(after) < task.loss(image)
        image = after
    far = torch.zeros(1, 1, 8, 8) - 0.9
    assert (task.step(far) - far).square().mean().sqrt().item() == pytest.approx(0.1)


def test_steps_of_a_linear_task_near_what_is_both_known_and_in_range() -> None:
    """A single projection, cut off, no longer gives what is known."""
    truth = (torch.rand(4, 1, 8, 8) < 0.5).float() * 2 - 1
    task = tasks(truth)["deblur"]
    moment = Moment(0, torch.tensor(500.0), None, "cosine")
    left = [task.loss(Steered(task, Steering(steps=steps))._stepped(moment, torch.zeros_like(truth))).mean() for steps in (1, 3)]
    assert left[1] < 0.8 * left[0] and left[0] > 0.01


def test_below_a_noise_level_a_loss_no_longer_leads_and_a_linear_task_does() -> None:
    pipeline, truth = small(), torch.rand(2, 1, 8, 8) * 2 - 1
    steering = Steering(through=False, window=(0.0, 20.0), fooled=1.0, repeats=2)
    evaluations: dict[str, int] = {}
    for name in ("inpaint", "fulfil"):
        guidance = Steered(tasks(truth)[name], steering)
        images(pipeline, guidance=guidance)
        evaluations[name] = guidance.cost.evaluations
    assert 6 < evaluations["fulfil"] < evaluations["inpaint"]


def test_a_second_call_knows_nothing_of_the_first() -> None:
    pipeline, truth = small(), torch.rand(2, 1, 8, 8) * 2 - 1
    guidance = Steered(tasks(truth)["inpaint"], Steering(reuse=4))
    first = images(pipeline, guidance=guidance)
    assert guidance._left > 0
    torch.testing.assert_close(images(pipeline, guidance=guidance), first, rtol=0, atol=0)


def gaussian(schedule: str = "cosine") -> MaskDMPipeline:
    pipeline = MaskDMPipeline(GaussianDenoiser(schedule, "v"), make_scheduler("ddim", schedule, "v"), "v", schedule)  # pyright: ignore
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: MaskDMPipeline, guidance: Steered, steps: int = 100, count: int = 2048) -> Tensor:
    last: list[Tensor] = []
    noise = torch.Generator().manual_seed(0)
    pipeline(count, None, noise, steps, clip=False, output_type="pt", on_step=lambda _, x: last.append(x), guidance=guidance)
    return last[-1]


def test_the_gradient_through_the_network_tells_of_what_is_not_known() -> None:
    known = torch.tensor([[[[0.6, 0.0], [0.0, -0.4]]]])
    where = torch.tensor([[True, False], [False, True]])
    guidance = Steered(Inpaint(known, where), Steering(through=True, steps=0, variance=0.1))
    x = drawn(gaussian(), guidance).flatten(1).double()
    of_known, rest = [0, 3], [1, 2]
    gain = COVARIANCE[rest][:, of_known] @ torch.linalg.inv(COVARIANCE[of_known][:, of_known])
    expected = MEAN[rest] + gain @ (known.flatten().double()[of_known] - MEAN[of_known])
    assert (x[:, of_known] - known.flatten()[of_known]).abs().max() < 0.01
    without, found = (MEAN[rest] - expected).abs(), (x.mean(0)[rest] - expected).abs()
    assert (found < 0.4 * without).all() and without.min() > 0.1  # PiGDM takes what is left unknown for equal in all directions: not exact


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["inpaint", "upscale", "deblur", "palette", "fulfil"])
def test_every_task_is_nearer_by_every_method(name: str, method: Any) -> None:
    pipeline = small()
    truth = torch.rand(2, 1, 8, 8) * 2 - 1
    task = tasks(truth)[name]
    guidance = Steered(task, METHODS[method], torch.Generator().manual_seed(0))
    plain, led = images(pipeline) * 2 - 1, images(pipeline, guidance=guidance) * 2 - 1
    assert task.loss(led).mean() < 0.9 * task.loss(plain).mean()
    if name == "inpaint" and method != "cheap":
        assert (led - truth)[..., :4].abs().max() < 0.02  # what is known is kept


def test_costs_are_counted_and_who_needs_no_pass_back_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, truth = small(), torch.rand(2, 1, 8, 8) * 2 - 1
    cost: dict[str, Any] = {}
    methods = METHODS | {"falling": Steering(through=False, repeats=3, falling=True, window=(0.02, 20.0), reuse=2)}
    for method, steering in methods.items():
        guidance = Steered(Inpaint(truth, torch.ones(8, 8, dtype=torch.bool)), steering)
        with monkeypatch.context() as patch:
            if not steering.through:
                patch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a pass back"))
            images(pipeline, guidance=guidance)
        cost[method] = guidance.cost
    assert (cost["full"].evaluations, cost["full"].backward) == (4 * 5 + 1, 4 * 5 + 1)  # six steps, the last once
    assert (cost["project"].evaluations, cost["project"].backward) == (6, 0)
    assert (cost["cheap"].evaluations, cost["cheap"].backward) == (2 * 4 + 2, 3)  # every fourth of nine in the window, and one outside
    assert 6 <= cost["falling"].evaluations <= 12 and cost["falling"].backward == 0


def test_a_window_a_kept_correction_and_settings_that_do_not_fit() -> None:
    pipeline, truth = small(), torch.rand(2, 1, 8, 8) * 2 - 1
    task = Inpaint(truth, torch.ones(8, 8, dtype=torch.bool))
    outside = Steered(task, Steering(through=False, window=(1e8, 1e9)))
    assert torch.equal(images(pipeline, guidance=outside), images(pipeline)) and outside.cost.evaluations == 6
    asked: list[int] = []
    plain = Inpaint.step
    task.step = lambda image: (asked.append(1), plain(task, image))[1]  # pyright: ignore
    images(pipeline, guidance=Steered(task, Steering(through=False, reuse=3)))
    assert len(asked) == 2  # of six steps
    for wrong, text in (
        ({"steps": -1}, "steps is -1"), ({"repeats": 0}, "repeats is 0"), ({"through": False, "steps": 0}, "neither"),
        ({"strength": float("nan")}, "strength is nan"), ({"variance": 0.0}, "variance is 0"),
        ({"window": (20.0, 0.02)}, "window is 20 to 0.02"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=text):
            Steering(**wrong)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("heun", "lms", "pndm")])
def test_every_scheduler_keeps_what_is_known(name: Any) -> None:
    pipeline, truth = small(), torch.rand(2, 1, 8, 8) * 2 - 1
    pipeline.scheduler = make_scheduler(name, "cosine", "v")
    where = torch.zeros(8, 8, dtype=torch.bool)
    where[:4] = True
    steering = Steering(through=False, steps=1, repeats=2)
    led = images(pipeline, num_inference_steps=30, guidance=Steered(Inpaint(truth, where), steering, torch.Generator().manual_seed(0)))
    assert (led * 2 - 1 - truth)[:, :, :4].abs().mean() < 0.05, name


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_a_sketch_is_kept_the_more_the_less_noise_is_put_on_it(schedule: Any) -> None:
    for name in offered(schedule):
        if name in ("heun", "pndm"):
            continue
        pipeline, truth = small(), torch.rand(2, 1, 8, 8) * 2 - 1
        pipeline.register_to_config(schedule=schedule)
        pipeline.scheduler = make_scheduler(name, schedule, "v")
        apart = [(images(pipeline, num_inference_steps=20, image=truth, strength=s) * 2 - 1 - truth).abs().mean() for s in (0.1, 0.5, 1.0)]
        assert apart[0] < 0.3 and apart[0] < apart[1] < apart[2] + 0.05, (name, apart)
    with pytest.raises(UserError, match="a strength above 0"):
        images(small(), image=truth, strength=0.0)
    assert len(seeded(0, range(2))) == 2
