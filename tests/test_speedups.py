from __future__ import annotations

import math

import numpy as np
import pytest

from maskdm.evaluation.speedups import Curve, compare_curves, over_seeds, speed_up

COSTS = tuple(float(x) for x in range(1, 21))


def curve(rate: float = 1.0, floor: float = 0.05, noise: float = 0.0, seed: int = 0) -> Curve:
    """A loss that falls with cost as training does; `rate` times as fast."""
    random = np.random.default_rng(seed)
    return Curve(COSTS, tuple(floor + 0.3 * (rate * c) ** -0.6 * math.exp(noise * random.normal()) for c in COSTS))


def test_the_cost_of_a_loss_is_read_between_the_points() -> None:
    line = Curve((1.0, 2.0, 4.0), (0.3, 0.2, 0.1))
    assert line.cost_of(0.25) == pytest.approx(1.5)
    assert line.cost_of(0.1) == pytest.approx(4.0)
    assert (line.cost_of(0.3), line.cost_of(0.05)) == (1.0, None)
    assert Curve((1.0, 2.0, 3.0), (0.2, 0.4, 0.1)).cost_of(0.15) == pytest.approx(2.5)  # a worse moment does not undo a better one


@pytest.mark.parametrize("rate", [0.5, 0.8, 1.0, 1.3, 2.0])
def test_a_curve_that_falls_so_many_times_as_fast_has_that_speed_up(rate: float) -> None:
    assert speed_up(curve(rate), curve()) == pytest.approx(rate, rel=0.02)


def test_a_worse_floor_is_slower_without_a_leap_at_one() -> None:
    ratios = [speed_up(curve(floor=floor), curve()) for floor in (0.0499, 0.05, 0.0501)]
    assert ratios[0] > ratios[1] == 1 > ratios[2] and ratios[0] - ratios[2] < 0.05


def test_verdicts_name_a_gain_a_loss_and_neither() -> None:
    whole = [curve(noise=0.01, seed=s) for s in range(3)]
    fast = compare_curves("maskdm", [curve(1.6, noise=0.01, seed=s + 9) for s in range(3)], "whole", whole)
    assert fast.low is not None and fast.high is not None and 1 < fast.low < fast.speedup < fast.high
    assert fast.speedup == pytest.approx(1.6, rel=0.1)
    assert fast.text.startswith(f"maskdm: reaches whole's best held-out loss {fast.speedup:.2f}x sooner (95 % interval {fast.low:.2f} to")
    slow = compare_curves("maskdm", [curve(0.6, noise=0.01, seed=s + 9) for s in range(3)], "whole", whole)
    assert slow.text.startswith("no gain here: whole reaches maskdm's best held-out loss") and slow.speedup < 0.8
    same = compare_curves(
        "again", [curve(noise=0.001, seed=s + 9) for s in range(5)], "whole", [curve(noise=0.001, seed=s) for s in range(5)]
    )
    assert same.text.startswith("no difference:")
    vague = compare_curves("maskdm", [curve(r, noise=0.01, seed=s) for s, r in enumerate((0.7, 1.5, 1.2))], "whole", whole)
    assert vague.text.startswith("no difference shown:") and "more seeds" in vague.text


def test_one_seed_has_no_interval_and_says_so() -> None:
    found = compare_curves("maskdm", [curve(1.6)], "whole", [curve()])
    assert (found.low, found.high, found.seeds) == (None, None, 1) and "one seed" in found.text
    assert math.isnan(over_seeds([1.0]).low)


def test_where_one_diverged_there_is_no_speed_up_and_it_is_named() -> None:
    broken = Curve(COSTS, (math.nan,) * len(COSTS))
    found = compare_curves("maskdm", [broken], "whole", [curve()])
    assert math.isnan(found.speedup) and "a loss of maskdm is not a number" in found.text
    assert "a loss of whole is not a number" in compare_curves("maskdm", [curve()], "whole", [broken]).text


def test_verdicts_speak_of_what_was_spent() -> None:
    fast, whole = [curve(1.6, noise=0.01, seed=s + 9) for s in range(3)], [curve(noise=0.01, seed=s) for s in range(3)]
    assert "x cheaper in arithmetic (" in compare_curves("maskdm", fast, "whole", whole, "flops").text
    assert "x sooner in images (" in compare_curves("maskdm", fast, "whole", whole, "images").text


def test_a_loss_reached_before_the_first_measurement_gives_a_bound() -> None:
    bad = Curve(COSTS, tuple(0.9 - 0.001 * cost for cost in COSTS))
    for seeds in (1, 3):
        found = compare_curves("maskdm", [bad] * seeds, "whole", [curve()] * seeds)
        assert found.text.startswith("whole reaches maskdm's best held-out loss at least 20x sooner") and "a bound" in found.text
        assert (found.bound, found.low, found.high) == (True, None, None) and found.speedup == pytest.approx(1 / 20)
    assert not compare_curves("maskdm", [curve(1.3)], "whole", [curve()]).bound


def test_the_one_that_ends_better_is_never_called_the_slower_one() -> None:
    """It turns up, or has levelled out, where the other goes on falling: sooner at what both reach, and never as low."""
    up = Curve(COSTS, tuple(0.06 + 0.002 * abs(cost - 6) for cost in COSTS))
    level = Curve(COSTS, tuple(max(0.06, 0.09 - 0.01 * cost) for cost in COSTS))
    falling = Curve(COSTS, tuple(0.078 - 0.0015 * cost for cost in COSTS))
    for early in (up, level):
        assert early.best == 0.06 > falling.best
        assert speed_up(falling, early) == speed_up(early, falling) == 1
        found = compare_curves("maskdm", [falling] * 3, "whole", [early] * 3)
        assert found.text == (
            "neither of maskdm and whole is faster: the one that is sooner at first does not get as low as the other in 3 of 3 seeds"
        )
        assert (found.speedup, found.low) == (1, None)
        assert compare_curves("whole", [early], "maskdm", [falling]).text.startswith("neither of whole and maskdm is faster: the one")
    some = compare_curves("maskdm", [falling, curve(1.5)], "whole", [up, curve()])
    assert "does not get as low as the other in 1 of 2 seeds, which counts as no" in some.text
    assert some.low is not None and some.speedup == pytest.approx(1.5**0.5, rel=0.02)


def test_bounds_that_disagree_show_no_difference() -> None:
    bad, fast = Curve(COSTS, tuple(0.9 - 0.001 * cost for cost in COSTS)), curve(2.0)
    found = compare_curves("maskdm", [bad, fast, fast], "whole", [curve()] * 3)
    assert found.text.startswith("no difference shown: the speed-ups of the seeds are 0.05, ") and found.bound and found.low is None
    assert " in 1 of 2 seeds: a bound" in compare_curves("maskdm", [fast, fast], "whole", [bad, curve()]).text


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_two_that_are_best_when_first_measured_are_not_told_apart(seeds: int) -> None:
    """Fine-tuning that only gets worse: the costs of the first measurements, of unequal steps, say nothing of which was there sooner."""
    rising, later = (Curve(tuple(cost + first for cost in COSTS), tuple(0.05 + 0.001 * cost for cost in COSTS)) for first in (0.0, 0.4))
    for arm, against in ((rising, later), (later, rising)):
        assert speed_up(arm, against) == 1
        found = compare_curves("maskdm", [arm] * seeds, "whole", [against] * seeds)
        assert found.text.startswith("neither of maskdm and whole is faster: both were there before") and not found.bound


def test_a_bound_claims_no_more_than_its_side_and_not_of_one_seed() -> None:
    level = Curve(COSTS, tuple(0.1 - 1e-5 * cost for cost in COSTS))
    first, soon = (Curve((cost, 20.0), (level.best, 0.09)) for cost in (19.5, 1.0))
    one, three = (compare_curves("maskdm", [soon] * seeds, "whole", [level] * seeds) for seeds in (1, 3))
    assert one.text.startswith(words := "maskdm reaches whole's best held-out loss at least 20x sooner") and "(one seed" in one.text
    assert three.text.startswith(words) and "one seed" not in three.text
    assert compare_curves("maskdm", [first] * 3, "whole", [level] * 3).text.startswith("no difference shown")  # 1.03: within what counts


def test_an_interval_is_told_in_the_direction_of_its_words() -> None:
    whole = [curve(noise=0.01, seed=s) for s in range(3)]
    found = compare_curves("maskdm", [curve(r, noise=0.01, seed=s) for s, r in enumerate((0.5, 1.1, 0.7))], "whole", whole)
    assert found.low is not None and found.high is not None and found.speedup < 1
    assert f"whole reaches maskdm's best held-out loss {1 / found.speedup:.2f}x sooner" in found.text
    assert f"interval {1 / found.high:.2f} to {1 / found.low:.2f}" in found.text


@pytest.mark.parametrize(("rate", "seeds"), [(1.0, 2), (1.0, 3), (1.4, 3), (0.7, 5)])
def test_the_interval_holds_the_truth_as_often_as_it_says_and_equals_are_not_told_apart(rate: float, seeds: int) -> None:
    """Seeds differ in speed by a tenth, points by 0.003. Of 400 comparisons about 380 intervals hold the true speed-up."""
    random = np.random.default_rng(1)
    held, told = 0, 0
    for trial in range(400):
        ours = [curve(rate * math.exp(0.1 * random.normal()), noise=0.003, seed=1000 * trial + s) for s in range(seeds)]
        theirs = [curve(math.exp(0.1 * random.normal()), noise=0.003, seed=1000 * trial + 500 + s) for s in range(seeds)]
        found = compare_curves("a", ours, "b", theirs)
        assert found.low is not None and found.high is not None
        held += found.low <= rate <= found.high
        told += "sooner" in found.text and "no difference" not in found.text
    assert held >= 368
    if rate == 1.0:
        assert told <= 30  # a false alarm in twenty, at most, and chance
