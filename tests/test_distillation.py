"""Distillation: the student begins as its teacher, halving is exact where the answer is known, and a run is a run like any other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.distillation import student_at
from maskdm.arithmetic import flops, stage_flops
from maskdm.cli import run_command
from maskdm.config import (
    Budget,
    Config,
    DiTConfig,
    Guided,
    Halve,
    Lesson,
    Mask,
    Model,
    NoMask,
    PatchMask,
    Sampling,
    Shortcut,
    Stage,
    UViTConfig,
    ViewsMask,
    is_halved,
)
from maskdm.data import Dataset, Loader, open_source, prepare
from maskdm.diffusion import Schedule, add_noise, alpha_sigma
from maskdm.distillation import (
    Asked,
    ddim_step,
    distillation_loss,
    guided,
    halving_target,
    in_range,
    places,
    sampling_time,
    scales,
    seen_error,
)
from maskdm.draws import draw_lesson, draw_step
from maskdm.engine import Trainer, checkpoint, transfer
from maskdm.errors import UserError
from maskdm.models import Denoiser, build
from maskdm.recipes import recipe
from maskdm.recipes.distil import Plan, distil
from maskdm.runs.directory import RunDirectory
from maskdm.runs.sample import draw_images, sampling_in_stage
from maskdm.runs.store import load_pipeline, make_pipeline
from maskdm.sampling import MaskDMPipeline, guides, make_scheduler, seeded
from maskdm.settings import from_plain, override, to_plain

CPU = torch.device("cpu")
UVIT = UViTConfig(width=16, depth=3, heads=2, patch=2)
DIT = DiTConfig(width=16, depth=2, heads=2, patch=2)
HERE = (7, 3, 0, 16, 16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(open_source("digits"), recipe("digits", "digits").data, tmp_path_factory.mktemp("cache"), None)


def config(*lessons: Lesson, model: Model = UVIT, mask: Mask = NoMask(), steps: int = 4, shortcuts: int = 0) -> Config:  # noqa: B008
    base = recipe("digits", "digits")
    stages = tuple(
        Stage(f"stage-{number}", Budget(steps=steps), mask, lesson, batch=16, lr=3e-3, start_from="ema")
        for number, lesson in enumerate(lessons)
    )
    dialled = replace(model, dial=(1.0, 4.0), shortcuts=shortcuts)
    made = replace(base, model=dialled, stages=stages, init="teacher", ema=replace(base.ema, snapshots=0))
    return from_plain(to_plain(made))


def trainer(settings: Config, dataset: Dataset) -> Trainer:
    torch.manual_seed(0)
    model = build(settings.model, settings.data, 10)
    shake(model)
    indices, _ = dataset.split(0.2, 0)
    return Trainer(settings, Loader(dataset, indices, settings.seed), model, CPU, "fp32")


def shake(model: Denoiser, dials: bool = False) -> None:
    """Random weights everywhere, as after training; the dials stay as they are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if dials or not name.startswith(("guidance_dial.", "steps_dial.")):
                parameter.add_(0.1 * torch.randn_like(parameter))


# --- networks that take numbers ---


@pytest.mark.parametrize("model", [UVIT, DIT])
def test_a_network_given_dials_is_the_one_before_whatever_it_is_told(model: Model) -> None:
    base = config(Guided()).data
    teacher, student = build(model, base, 10), build(replace(model, dial=(1.0, 4.0), shortcuts=32), base, 10)
    shake(teacher)
    report = transfer(teacher, teacher.state_dict(), student)
    assert {each.name for each in report if each.fate != "loaded"} == {
        f"{d}.layer.{w}" for d in ("guidance_dial", "steps_dial") for w in ("weight", "bias")
    }
    x, t, labels = torch.randn(5, 1, 8, 8), torch.arange(5) * 200.0, torch.arange(5)
    expected = teacher(x, t, labels).sample
    for told in ({}, {"guidance": 3.0}, {"guidance": torch.linspace(1, 4, 5), "steps": torch.tensor([1.0, 2, 4, 8, 64])}):
        assert torch.equal(student(x, t, labels, **told).sample, expected)
    shake(student, dials=True)
    plain = student(x, t, labels).sample
    assert torch.equal(student(x, t, labels, guidance=1.0, steps=32.0).sample, plain)  # what is not said is no guidance, and most steps
    assert torch.equal(student(x, t, labels, steps=64.0).sample, plain)
    assert not torch.allclose(student(x, t, labels, guidance=2.0).sample, plain)
    assert not torch.allclose(student(x, t, labels, steps=1.0).sample, plain)


def test_sampling_tells_the_scale_and_the_steps_in_one_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(replace(UVIT, dial=(0.5, 3.0), shortcuts=8), config(Guided()).data, 10)
    shake(network, dials=True)
    pipeline = MaskDMPipeline(network, make_scheduler("ddim", "cosine", "v"), "v", "cosine", [str(i) for i in range(10)])
    pipeline.set_progress_bar_config(disable=True)
    told: list[Any] = []
    plain = network.forward

    def forward(*words: Any, **named: Any) -> Any:
        told.append((len(words[0]), named))
        return plain(*words, **named)

    monkeypatch.setattr(network, "forward", forward)
    pipeline(3, [0, 1, 2], seeded(0, range(3)), 4, guidance_scale=2.0, output_type="pt")
    assert told == [(3, {"guidance": 2.0, "steps": 4.0})] * 4
    with pytest.raises(UserError, match=r"from 0\.5 to 3; give one of these"):
        pipeline(1, [0], guidance_scale=3.5)


# --- targets ---


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 32, 64, 3, 50])
def test_times_are_those_at_which_diffusers_samples(steps: int) -> None:
    scheduler = make_scheduler("ddim", "cosine", "v")
    scheduler.set_timesteps(steps)
    numbers = torch.arange(steps + 1)
    times = sampling_time(numbers, float(steps))
    assert times[:-1].tolist() == scheduler.timesteps.tolist() and times[-1] == -1
    assert sampling_time(2 * numbers, 2.0 * steps).tolist() == times.tolist()


def exact(schedule: Schedule, mean: float, variance: float) -> Any:
    """E[x0 | x_t] of Gaussian data."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (each.double()[:, None] for each in alpha_sigma(schedule, t))
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

    return predict


@pytest.mark.parametrize("schedule", ["cosine", "linear", "vp"])
def test_one_step_with_the_target_lands_where_two_of_the_teacher_do(schedule: Schedule) -> None:
    """Sampling Gaussian data by the exact teacher in 2 N steps, and by its targets in N: the same images; at every N down to one."""
    predict, noise = exact(schedule, 0.4, 0.09), torch.randn(2000, 1, dtype=torch.float64)
    for steps in (1, 2, 8):
        by_two, by_one = noise, noise
        for number in range(steps):
            start, middle, end = (sampling_time(torch.full((2000,), 2 * number + part), 2.0 * steps) for part in range(3))
            wanted = halving_target(schedule, predict, by_one, start, middle, end)
            by_one = ddim_step(schedule, wanted, by_one, start, end)
            by_two = ddim_step(schedule, predict(by_two, start), by_two, start, middle)
            by_two = ddim_step(schedule, predict(by_two, middle), by_two, middle, end)
        torch.testing.assert_close(by_one, by_two, rtol=1e-6, atol=1e-6)
    assert abs(by_one.mean().item() - 0.4) < 0.02 and 0.03 < by_one.var().item() < 0.1  # in 16 DDIM steps


def test_our_step_is_diffusers() -> None:
    scheduler = make_scheduler("ddim", "cosine", "x0")
    scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(8)
    x, x0 = torch.randn(4, 3), torch.randn(4, 3)
    for number, t in enumerate(scheduler.timesteps):
        start, end = (sampling_time(torch.full((4,), number + part), 8.0) for part in range(2))
        ours = ddim_step("cosine", x0, x, start, end)
        torch.testing.assert_close(ours, scheduler.step(x0, t, x).prev_sample, rtol=1e-3, atol=1e-4)


def test_guided_is_what_the_pipeline_does_with_two_evaluations() -> None:
    settings, network = config(Guided()), build(UVIT, config(Guided()).data, 10)
    shake(network)
    from maskdm.diffusion import convert
    from maskdm.models import patchify

    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 5])
    output = guides.guided(network, "cosine", x, torch.tensor(400), labels, guides.Guide(2.5), {})
    expected = patchify(convert("cosine", "v", output, x, torch.full((2,), 400.0)).x0, 2)
    asked = Asked(patchify(x, 2), torch.full((2,), 400.0), labels, None, torch.tensor([2.5, 2.5]), None)
    torch.testing.assert_close(guided(network, settings, asked), expected, rtol=1e-4, atol=1e-4)


def test_draws_of_a_lesson_do_not_depend_on_the_pieces() -> None:
    whole = draw_lesson((5, 9, 0, 24, 24), CPU)
    assert torch.equal(torch.cat([draw_lesson((5, 9, 0, 11, 24), CPU), draw_lesson((5, 9, 11, 13, 24), CPU)]), whole)
    assert (whole >= 0).all() and (whole < 1).all() and sorted((whole[:, 1] * 24).floor().tolist()) == list(range(24))
    settings = config(Shortcut(1), shortcuts=8)
    all_of_it, parts = (
        places(settings, Shortcut(1), whole, 0),
        [places(settings, Shortcut(1), whole[a:b], a) for a, b in ((0, 11), (11, 24))],
    )
    assert all_of_it.rows.tolist() == [*parts[0].rows.tolist(), *(11 + row for row in parts[1].rows.tolist())] == list(range(0, 24, 4))
    assert all_of_it.steps.tolist() == [*parts[0].steps.tolist(), *parts[1].steps.tolist()]
    assert set(places(settings, Shortcut(1), draw_lesson((5, 9, 0, 400, 400), CPU), 0).steps.tolist()) == {1.0, 2.0, 4.0}
    assert sorted([*all_of_it.rows.tolist(), *all_of_it.rest.tolist()]) == list(range(24))


def test_shortcuts_of_a_small_batch_learn_every_step_of_every_number() -> None:
    settings, met = config(Shortcut(1), shortcuts=16), set[tuple[float, float]]()
    for step in range(300):
        here = places(settings, Shortcut(1), draw_lesson((5, step, 0, 8, 8), CPU), 0)
        met |= set(zip(here.steps.tolist(), here.number.tolist(), strict=True))
    assert met == {(float(steps), float(number)) for steps in (1, 2, 4, 8) for number in range(steps)}


def test_an_eighth_of_the_scales_is_no_guidance_and_the_others_are_spread_over_the_dial() -> None:
    drawn = (torch.arange(800) + 0.5) / 800
    found = scales(replace(config(Guided()), model=replace(config(Guided()).model, dial=(0.0, 4.0))), drawn)
    assert (found == 1).sum() == 100
    assert torch.allclose(found[100:], (torch.arange(700) + 0.5) / 700 * 4, atol=1e-4)


def test_what_lies_beyond_the_range_is_no_error_of_pixels_and_one_of_latents() -> None:
    pixels = config(Guided())
    image, wanted = torch.tensor([1.5, 1.5, 1.5, -2.0, 0.5], requires_grad=True), torch.tensor([1.0, 3.0, 0.5, 1.0, 2.0])
    error = seen_error(pixels, image, wanted)
    assert error.tolist() == [0.0, 0.0, 1.0, -3.0, -0.5]
    error.square().sum().backward()
    assert image.grad is not None and image.grad.tolist() == [0.0, 0.0, 2.0, -6.0, -1.0]
    latents = replace(pixels, data=replace(pixels.data, autoencoder="vae", latent_factor=2, latent_channels=3))
    assert seen_error(latents, image, wanted).tolist() == [0.5, -1.5, 1.0, -3.0, -1.5]
    assert in_range(latents, wanted).tolist() == wanted.tolist()


# --- losses ---


def loss_of(run: Trainer, lesson: Lesson, mask: Mask = NoMask()) -> float:  # noqa: B008
    """The loss of a student that is its teacher."""
    batch = run.feed.batch(0, 16)
    draws = draw_step(run.config, mask, *HERE, CPU)
    networks = (run.model, run.teaching.teacher, run.average.model)
    return float(
        distillation_loss(run.config, lesson, networks, batch.images, batch.labels, draws, draw_lesson(HERE, CPU), 0).total.detach()
    )


def test_at_scale_one_the_student_is_right_from_the_start_and_beyond_it_is_not(dataset: Dataset) -> None:
    narrow = config(Guided())
    narrow = replace(narrow, model=replace(narrow.model, dial=(1.0, 1.0 + 1e-6)))
    assert loss_of(trainer(narrow, dataset), Guided()) < 1e-9
    assert loss_of(trainer(config(Guided()), dataset), Guided()) > 1e-5


@pytest.mark.parametrize(
    ("lesson", "mask", "shortcuts"),
    [
        (Guided(), NoMask(), 0),
        pytest.param(Halve(4), ViewsMask(2), 0, marks=pytest.mark.slow),
        pytest.param(Guided(), PatchMask(0.5), 0, marks=pytest.mark.slow),
        pytest.param(Halve(2), NoMask(), 0, marks=pytest.mark.slow),
        pytest.param(Shortcut(1), NoMask(), 4, marks=pytest.mark.slow),
    ],
)
def test_a_lesson_is_learned(lesson: Lesson, mask: Mask, shortcuts: int, dataset: Dataset) -> None:
    run = trainer(config(lesson, mask=mask, steps=60, shortcuts=shortcuts), dataset)
    assert run.teaching.teacher is not None
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    losses = [float(step.loss) for step in run.run()]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert all(torch.equal(value, run.teaching.teacher.state_dict()[name]) for name, value in before.items())  # the teacher does not move
    assert all(parameter.grad is None for parameter in run.teaching.teacher.parameters())


def test_each_stage_learns_from_what_the_one_before_has_left(dataset: Dataset) -> None:
    run = trainer(config(Guided(), Halve(2), Halve(1)), dataset)
    teachers: list[Tensor] = []
    for step in run.run():
        assert run.teaching.teacher is not None
        if step.stage_step == 1:
            teachers.append(run.teaching.teacher.state_dict()["out.weight"].clone())
        if step.ends_stage:
            teachers.append(run.average.model.state_dict()["out.weight"].clone())
    assert torch.equal(teachers[1], teachers[2]) and torch.equal(teachers[3], teachers[4]) and not torch.equal(teachers[0], teachers[2])


def test_pieces_of_a_batch_are_the_batch(dataset: Dataset) -> None:
    settings = config(Shortcut(1), shortcuts=4)
    pieces = replace(settings, stages=(replace(settings.stages[0], accumulate=4),))
    for a, b in zip(trainer(settings, dataset).run(), trainer(pieces, dataset).run(), strict=True):
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-6)


def test_the_teachers_evaluations_are_counted() -> None:
    settings = config(Guided(), Halve(1))
    assert [stage_flops(settings, stage, 30) for stage in settings.stages] == pytest.approx([flops(settings, NoMask(), 30) * 5 / 3] * 2)
    plain = recipe("digits", "digits")
    assert stage_flops(plain, plain.stages[0], 1) == flops(plain, plain.stages[0].mask, 1)


# --- exact resume ---


def flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{file}/{name}": value for file, group in state.items() for name, value in group.items()}


@pytest.mark.parametrize("stop", [4, 6])
def test_interrupted_and_resumed_equals_undisturbed_bit_for_bit(stop: int, dataset: Dataset, tmp_path: Path) -> None:
    settings = config(Guided(), Halve(2), Shortcut(1), model=DIT, shortcuts=4)
    undisturbed, first = trainer(settings, dataset), trainer(settings, dataset)
    losses = [float(step.loss) for step in undisturbed.run()]
    running: Iterator[Any] = first.run()
    seen = [float(next(running).loss) for _ in range(stop)]
    saved = checkpoint.load(checkpoint.save(tmp_path, "step-1", first.tensors(), first.numbers()))
    second = trainer(settings, dataset)
    shake(second.model, dials=True)
    second.restore(saved.tensors, saved.numbers)
    seen += [float(step.loss) for step in second.run()]
    assert seen == losses
    expected, got = flat(undisturbed.tensors()), flat(second.tensors())
    assert expected.keys() == got.keys() and any(name.startswith("teacher/") for name in expected)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


# --- what cannot be ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"diffusion.target": "eps"}, r"stages\.stage-0\.lesson guided needs target v or x0"),
        ({"init": "none"}, r"stages\.stage-0\.lesson guided has no teacher; name a run with --init"),
        ({"data.conditional": "false"}, "needs a teacher with classes, and this run is unconditional"),
        ({"diffusion.label_drop": "0"}, r"needs a null class, and diffusion\.label_drop is 0"),
        ({"model.dial": "none"}, "needs the range of scales"),
        ({"model.dial": "2,4"}, "give two guidance scales with 1"),
        ({"model.shortcuts": "1"}, r"model\.shortcuts is 1"),
        ({"stages.stage-0.mask": "{kind: route}"}, "mask route does not go with lesson guided"),
        ({"hardware.shard": "true"}, r"leave hardware\.shard out"),
        ({"evaluation.patience": "3"}, r"says nothing of stages\.stage-0"),
        ({"stages.stage-1.lesson": "{kind: halve, steps: 0}"}, r"lesson\.steps is 0"),
        ({"stages.stage-1.lesson": "{kind: shortcut, steps: 4}"}, r"model\.shortcuts is 0; .* needs 4 times a power of two"),
        ({"stages.stage-1.lesson": "convert"}, "is for the first stage alone"),
        ({"diffusion.schedule": "flow"}, r"stages\.stage-1\.lesson halve is of DDIM steps"),
    ],
)
def test_configurations_that_cannot_be_are_refused_by_name(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(config(Guided(), Halve(4)), list(settings.items()))


def test_conditions_that_nobody_teaches_are_refused() -> None:
    for setting, value in (("model.dial", "1,4"), ("model.shortcuts", "8")):
        with pytest.raises(UserError, match=f"{setting} is set, and no stage teaches it"):
            override(recipe("digits", "digits"), [(setting, value)])


def test_lessons_change_what_is_done(dataset: Dataset) -> None:
    seen: set[float] = set()
    for lesson in (Guided(), Halve(1), Halve(4), Shortcut(1), Shortcut(2)):
        seen.add(loss_of(trainer(config(lesson, shortcuts=8), dataset), lesson))
    wider = override(config(Guided()), [("model.dial", "1,8")])
    assert len({*seen, loss_of(trainer(wider, dataset), Guided())}) == 6


def test_samples_of_a_stage_are_drawn_in_its_steps() -> None:
    settings = replace(config(Guided(), Halve(8), Halve(4)), sampling=Sampling(steps=4))
    assert [sampling_in_stage(settings, number).steps for number in range(4)] == [16, 8, 4, 4]
    assert sampling_in_stage(recipe("digits", "digits"), 0).steps == 50
    assert is_halved(24, 3) and is_halved(4, 4) and not is_halved(24, 5) and not is_halved(2, 4)


# --- the command ---

SMALL = ["--threads", "1", "--precision", "fp32", "--tracking", "none", "--sampling.num", "4"]
TINY = ["--model.width", "16", "--depth", "1", "--heads", "2", "--pretrain.budget.steps", "3", "--finetune.budget.steps", "3"]
TRAIN = ["train", "digits", "--recipe", "digits", *SMALL, *TINY, "--pretrain.batch", "8", "--finetune.batch", "8", "--sampling.steps", "2"]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path_factory.getbasetemp() / "maskdm-cache"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["MASKDM_CACHE"] = str(tmp_path_factory.getbasetemp() / "maskdm-cache")
    out = tmp_path_factory.mktemp("teachers") / "teacher"
    assert run_command([*TRAIN, "--out", str(out)]) == 0
    return out


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["event"] == kind]


def test_a_run_is_distilled_sampled_and_opened(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "student"
    command = ["distil", str(teacher), "--out", str(out), "--steps", "4", "--end", "1", "--updates", "14", *SMALL, "--guidance", "2"]
    assert run_command(command) == 0
    assert [line["stage"] for line in events(out, "stage")] == ["guided", "halve-2", "halve-1"]
    assert "learns guidance in one evaluation" in capsys.readouterr().err
    assert run_command(command) == 0
    assert "finished already" in capsys.readouterr().out
    drawn = tmp_path / "drawn"
    assert run_command(["sample", str(out), "--out", str(drawn), "--num", "3"]) == 0
    pipeline, _ = load_pipeline(out)
    calls: list[int] = []
    settings = sampling_in_stage(pipeline_config(out), 9)
    assert (settings.steps, settings.scheduler, settings.guidance) == (1, "ddim", 2.0)
    draw_images(pipeline, settings, range(3), [0, 1, 2], 0, "fp32", progress=lambda done, _: calls.append(done))
    opened = MaskDMPipeline.from_pretrained(out / "model")
    opened.set_progress_bar_config(disable=True)
    images: Any = opened(2, [0, 1], seeded(0, range(2)), 1, guidance_scale=3.0, output_type="pt")
    assert images.images.shape == (2, 1, 8, 8) and opened.unet.guidance_dial.high == 4.0
    assert run_command(["sample", str(out), "--out", str(drawn), "--guidance", "9"]) == 2
    assert "from 1 to 4" in capsys.readouterr().err
    for more in (["--guidance-window", "0.3", "5"], ["--guidance-rescale", "0.5"], ["--negative", "3"]):
        assert run_command(["sample", str(out), "--out", str(drawn), "--guidance", "2", *more]) == 2
        assert "is told the guidance scale" in capsys.readouterr().err


def pipeline_config(run: Path) -> Config:
    return RunDirectory(run).config()


@pytest.mark.slow
def test_shortcut_masked_and_of_a_teacher_of_eps(tmp_path: Path) -> None:
    run = tmp_path / "eps"
    assert run_command([*TRAIN, "--out", str(run), "--target", "eps", "--no-conditional"]) == 0
    out = tmp_path / "student"
    words = ["--method", "shortcut", "--steps", "8", "--end", "2", "--updates", "6", "--mask", "patch-50", *SMALL]
    assert run_command(["distil", str(run), "--out", str(out), *words]) == 0
    config = pipeline_config(out)
    assert [stage.lesson.kind for stage in config.stages] == ["convert", "shortcut"] and config.diffusion.target == "v"
    assert config.model.shortcuts == 8 and config.model.dial is None and config.stages[1].mask == PatchMask(0.5)
    pipeline, _ = load_pipeline(out)
    assert pipeline.unet.steps_dial is not None
    make_pipeline(pipeline.unet, config, [])(1, num_inference_steps=2, output_type="pt")


@pytest.mark.slow
def test_stopped_and_resumed_by_the_same_command(teacher: Path, tmp_path: Path) -> None:
    words = ["--steps", "2", "--updates", "60", *SMALL, "--intervals.log", "1", "--intervals.save", "5"]
    out, other = tmp_path / "a", tmp_path / "b"
    assert run_command(["distil", str(teacher), "--out", str(other), *words]) == 0
    command = [sys.executable, "-m", "maskdm", "distil", str(teacher), "--out", str(out), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = out / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (log.is_file() and '"event": "train", "step": 3,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 130 and "the same command resumes" in said
    assert run_command(["distil", str(teacher), "--out", str(out), *words]) == 0
    losses = [{line["step"]: line["loss"] for line in events(run, "train")} for run in (out, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 60
    assert len(events(out, "resume")) == 1


def test_bad_input_is_one_line(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    for run, words, message in (
        (tmp_path / "absent", [], "absent is not there"),
        (teacher, ["--scales", "4"], "--scales is '4'; give the least and the largest"),
        (teacher, ["--scales", "2,4"], "1 (none) among them"),
        (teacher, ["--steps", "24"], "--steps 24 is not --end 1 times a power of two"),
        (teacher, ["--mask", "patsh-50", "--updates", "90"], "--mask 'patsh-50': 'patsh-50' is no mask; did you mean patch?"),
        (teacher, ["--method", "halves"], "--method"),
        (teacher, ["--recipe", "digits"], "--recipe"),
        (teacher, ["--halve-16.lr", "x", "--updates", "90"], "lr"),
        (teacher, ["--data", "emojis", "--updates", "90"], "emojis"),
        (teacher, ["--dial", "2,3", "--updates", "90"], "give two guidance scales"),
    ):
        capsys.readouterr()
        assert run_command(["distil", str(run), *out, *SMALL, *words]) == 2, words
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("maskdm: error: ") and message in last, (words, last)


def test_what_cannot_be_distilled_is_refused_by_name() -> None:
    digits = recipe("digits", "digits")
    plain = override(digits, [("conditional", "false")])
    undropped = override(digits, [("label_drop", "0")])
    flow = override(digits, [("schedule", "flow"), ("scheduler", "euler")])
    for teacher, plan, message in (
        (plain, Plan(scales=(1.0, 4.0)), "run was trained without classes, and there is no guidance to distil"),
        (undropped, Plan(scales=(1.0, 4.0)), "run was trained with diffusion.label_drop 0"),
        (config(Guided()), Plan(), "run is distilled already"),
        (flow, Plan(), "no DDIM steps to halve"),
        (digits, Plan(steps=1), "--steps 1 is not --end 1 times"),
        (digits, Plan(end=3), "not --end 3 times a power of two; give such as --steps 48"),
        (digits, Plan(updates=2), "--updates is 2; give at least 6"),
    ):
        with pytest.raises(UserError, match=message):
            distil(teacher, "run", plan)


def test_stages_are_those_of_the_papers() -> None:
    digits = recipe("digits", "digits")
    made, _ = distil(digits, "run", Plan(updates=900))
    parts = [("guided", 2), ("halve-16", 1), ("halve-8", 1), ("halve-4", 1), ("halve-2", 2), ("halve-1", 2)]
    assert [(stage.name, stage.budget.steps) for stage in made.stages] == [(name, 100 * share) for name, share in parts]
    assert [stage.lesson for stage in made.stages] == [Guided(), *(Halve(steps) for steps in (16, 8, 4, 2, 1))]
    made.check()
    unconditional, reasons = distil(override(digits, [("conditional", "false"), ("target", "eps")]), "run", Plan(steps=8, end=4))
    assert [stage.name for stage in unconditional.stages] == ["convert", "halve-4"] and unconditional.diffusion.target == "v"
    assert unconditional.model.dial is None and any("at full noise nothing" in reason for reason in reasons)
    assert (made.sampling.guidance, made.sampling.steps, made.init) == (1.0, 1, "run")


def test_the_target_of_the_loss_is_noised_as_in_training(dataset: Dataset) -> None:
    """Of halving: the patches that the student sees have the noise of a sampling step, and no other."""
    run, seen = trainer(config(Halve(2)), dataset), list[Tensor]()
    plain = run.model.forward

    def forward(x: Tensor, t: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(t)
        return plain(x, t, *rest, **named)

    run.model.forward = forward  # pyright: ignore
    loss_of(run, Halve(2))
    assert set(seen[0].tolist()) == {999.0, 499.0}
    assert add_noise(run.config.diffusion, torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([999.0])).x_t.min() > 0.99


def test_the_benchmark_takes_each_student_from_its_stage() -> None:
    made, _ = distil(recipe("digits", "digits"), "run", Plan(steps=8, end=2))
    assert [student_at(made, steps) for steps in (64, 8, 4, 2, 1)] == ["guided", "guided", "halve-4", "halve-2", ""]
    assert student_at(recipe("digits", "digits"), 4) is None
