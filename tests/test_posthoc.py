"""Averages of any length, after training (arXiv 2312.02696): against integrals, and against averages tracked directly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskdm.config import DiTConfig, Ema
from maskdm.engine import PowerAverages, snapshots
from maskdm.engine.posthoc import Profile, fit, gamma_of, inner, reconstruct, sigma_rel_of
from maskdm.errors import UserError
from maskdm.models import Denoiser, build
from maskdm.recipes import recipe

STEPS = 160


def network() -> Denoiser:
    return build(DiTConfig(width=16, depth=1, heads=2, patch=4), recipe("digits", "x").data, 0)


def set_all(model: Denoiser, value: float | Tensor) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(value))


def one(tensors: dict[str, Tensor]) -> float:
    """The value that all elements share."""
    values = torch.cat([v.flatten() for v in tensors.values()])
    assert (values == values[0]).all()
    return float(values[0])


def of(tracker: PowerAverages, width: float) -> dict[str, Tensor]:
    return {name.partition("/")[2]: value.clone() for name, value in tracker.tensors().items() if name.startswith(f"{width}/")}


# --- the profiles ---


def test_lengths_and_exponents() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)  # the paper's two, section 3
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert sigma_rel_of(0.0) == pytest.approx(Ema.longest, abs=1e-3)
    for width in (0.01, 0.03, 0.1, 0.2, 0.28):
        assert sigma_rel_of(gamma_of(width)) == pytest.approx(width, rel=1e-9)
    for width in (0.0, -0.1, 0.3, float("nan")):
        with pytest.raises(UserError, match=r"above 0 and up to 0\.288"):
            gamma_of(width)


@pytest.mark.parametrize(("a", "b"), [((1.0, 3.0), (1.0, 16.97)), ((0.3, 6.94), (1.0, 2.0)), ((1.0, 0.0), (0.7, 16.97))])
def test_inner_products_are_the_integrals(a: tuple[float, float], b: tuple[float, float]) -> None:
    middles = (np.arange(1_000_000) + 0.5) / 1_000_000
    densities = [np.where(middles <= t, (g + 1) * (middles / t) ** g / t, 0.0) for t, g in (a, b)]
    assert inner(Profile(*a), Profile(*b)) == pytest.approx(float((densities[0] * densities[1]).mean()), rel=1e-4)
    assert inner(Profile(*a), Profile(*b)) == inner(Profile(*b), Profile(*a))


@pytest.mark.parametrize("power", [0, 1, 3])
def test_a_tracked_average_is_the_integral_over_the_trajectory(power: int) -> None:
    """Weights tau^power average to (gamma + 1) / (gamma + 1 + power) t^power; steps stand for unit intervals, hence 1 / STEPS."""
    model = network()
    tracker = PowerAverages(model, (0.05, 0.15))
    for step in range(1, STEPS + 1):
        set_all(model, (step / STEPS) ** power)
        tracker.update(model)
    for width in (0.05, 0.15):
        gamma = gamma_of(width)
        steps = np.arange(STEPS + 1) / STEPS
        weights = np.diff(steps ** (gamma + 1))
        assert one(of(tracker, width)) == pytest.approx(float(weights @ steps[1:] ** power), rel=1e-5)
        assert one(of(tracker, width)) == pytest.approx((gamma + 1) / (gamma + 1 + power), rel=power / STEPS + 1e-5)


# --- coefficients ---


times = st.lists(st.integers(1, 10_000), min_size=1, max_size=16, unique=True)


@settings(max_examples=60, deadline=None)
@given(times, st.floats(0.01, 0.28))
def test_coefficients_sum_to_one(stored: list[int], width: float) -> None:
    profiles = [Profile(t, gamma_of(s)) for t in stored for s in (0.05, 0.1)]
    found = fit(profiles, Profile(max(stored), gamma_of(width)))
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-9)
    assert np.isfinite(found.coefficients).all() and found.misfit >= 0


def test_a_stored_average_is_itself_and_more_snapshots_fit_better() -> None:
    def misfit(count: int, width: float) -> float:
        stored = [Profile((i + 1) / count, gamma_of(s)) for i in range(count) for s in (0.05, 0.1)]
        return fit(stored, Profile(1.0, gamma_of(width))).misfit

    stored = [Profile(t, gamma_of(s)) for t in (1, 2, 4) for s in (0.05, 0.1)]
    found = fit(stored, Profile(4, gamma_of(0.1)))
    np.testing.assert_allclose(found.coefficients, [0, 0, 0, 0, 0, 1], atol=1e-7)
    assert found.misfit < 1e-6
    for width in (0.02, 0.03, 0.075, 0.15, 0.25):
        assert misfit(4, width) > 1.3 * misfit(8, width) > 1.3**2 * misfit(16, width)


# --- reconstruction against averages tracked directly ---


def walk(seed: int) -> np.ndarray:
    """Weights that drift and shake as training's do."""
    random = np.random.default_rng(seed)
    drift = np.cumsum(random.normal(size=STEPS) * np.linspace(1, 0.2, STEPS)) * 0.1
    return drift + 0.3 * random.normal(size=STEPS) + 2 * np.exp(-np.arange(STEPS) / 40)


WIDTHS = (0.03, 0.05, 0.075, 0.12, 0.2, 0.25)


@dataclass(frozen=True)
class Walk:
    """One course of the weights, the averages stored of it sixteen times, and those tracked directly."""

    trajectory: np.ndarray
    kept: list[tuple[int, dict[str, Tensor]]]
    direct: dict[float, float]


@pytest.fixture(scope="module")
def walks() -> list[Walk]:
    found: list[Walk] = []
    for seed in range(16):
        model, trajectory = network(), walk(seed)
        stored, direct = PowerAverages(model, (0.05, 0.1)), PowerAverages(model, WIDTHS)
        kept: list[tuple[int, dict[str, Tensor]]] = []
        for step, value in enumerate(trajectory, 1):
            set_all(model, value)
            stored.update(model)
            direct.update(model)
            if step % (STEPS // 16) == 0:
                kept += [(step, of(stored, s)) for s in (0.05, 0.1)]
        found.append(Walk(trajectory, kept, {width: one(of(direct, width)) for width in WIDTHS}))
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reconstruction_is_as_near_as_its_misfit_says(width: float, dtype: torch.dtype, walks: list[Walk]) -> None:
    """|error| <= |profile wanted - profile made| |weights - any constant|, by Cauchy and Schwarz and since both profiles sum to 1."""
    errors: dict[int, list[float]] = {4: [], 16: []}
    for each, count in itertools.product(walks, errors):
        chosen = [kept for kept in each.kept if kept[0] % (STEPS // count) == 0]
        found = fit([Profile(t, gamma_of((0.05, 0.1)[i % 2])) for i, (t, _) in enumerate(chosen)], Profile(STEPS, gamma_of(width)))
        made = one(reconstruct([{n: v.to(dtype) for n, v in s.items()} for _, s in chosen], found.coefficients))
        norm = inner(Profile(1, gamma_of(width)), Profile(1, gamma_of(width))) ** 0.5
        rounding = 1e-5 if dtype == torch.float32 else float(np.abs(found.coefficients).sum()) * 2**-11 * np.abs(each.trajectory).max()
        error = abs(made - each.direct[width])
        assert error <= found.misfit * norm * each.trajectory.std() + rounding
        errors[count].append(error)
    if width not in (0.05, 0.1) and dtype == torch.float32:
        assert np.mean(errors[16]) < 0.5 * np.mean(errors[4])


def test_a_weight_that_never_moved_comes_out_as_it_was() -> None:
    """Since the coefficients sum to 1, also where the profile is met badly."""
    stored = [Profile(t, gamma_of(s)) for t in (50, 100) for s in (0.05, 0.1)]
    found = fit(stored, Profile(100, gamma_of(0.28)))
    assert found.misfit > 0.3
    value = {"w": torch.full((3,), 0.7)}
    torch.testing.assert_close(reconstruct([value] * 4, found.coefficients)["w"], value["w"], rtol=1e-6, atol=0)


# --- files ---


def stored(folder: Path, began: int = 10, count: int = 4) -> PowerAverages:
    model = network()
    tracker = PowerAverages(model, (0.05, 0.1))
    tracker.restart(began)
    for step in range(1, 10 * count + 1):
        set_all(model, step / 40)
        tracker.update(model)
        if step % 10 == 0:
            snapshots.save(folder, tracker, began + step, step)
    return tracker


def test_snapshots_are_read_back_and_averaged(tmp_path: Path) -> None:
    tracker = stored(tmp_path / "whole")
    found = snapshots.found(tmp_path / "whole")
    assert [(s.step, s.stage_step, s.time, s.began, s.sigma_rel) for s in found.values()] == [
        (10 + n, n, n, 10, (0.05, 0.1)) for n in (10, 20, 30, 40)
    ]
    assert [path.name for path in found] == [f"step-{10 + n:08}.safetensors" for n in (10, 20, 30, 40)]
    weights, how = snapshots.average(found, 0.1)
    assert how.misfit < 1e-6
    expected = of(tracker, 0.1)
    assert weights.keys() == dict(network().named_parameters()).keys() == network().state_dict().keys()
    for name, value in weights.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=2**-11, atol=1e-6)  # rounded to fp16 once
    assert not list(tmp_path.rglob("*.partial"))


def test_later_ones_are_forgotten_and_another_beginning_is_left_out(tmp_path: Path) -> None:
    stored(tmp_path / "whole")
    stored(tmp_path / "before", began=0)
    (tmp_path / "whole" / ".step-00000020.safetensors.partial").write_text("as a kill leaves it")
    snapshots.forget_after(tmp_path, 30)
    assert not list(tmp_path.rglob("*.partial"))
    assert [s.step for s in snapshots.found(tmp_path / "whole").values()] == [20, 30]
    assert [s.step for s in snapshots.found(tmp_path / "before").values()] == [10, 20, 30]
    model = network()
    again = PowerAverages(model, (0.02, 0.2))
    again.restart(33)
    again.update(model)
    snapshots.save(tmp_path / "whole", again, 34, 24)
    assert [s.sigma_rel for s in snapshots.found(tmp_path / "whole").values()] == [(0.02, 0.2)]
    assert snapshots.found(tmp_path / "none") == {}


@pytest.mark.parametrize("damage", ["cut", "header", "not ours"])
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    stored(tmp_path)
    path = tmp_path / "step-00000030.safetensors"
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-10])
        case "header":
            path.write_bytes(b"\0" * 20)
        case _:
            from safetensors.torch import save_file

            save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"snapshot .*step-00000030\.safetensors cannot be read .*delete it"):
        snapshots.found(tmp_path)
