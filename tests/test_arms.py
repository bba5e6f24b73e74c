from __future__ import annotations

from dataclasses import replace

import pytest

from maskdm.config import BlockMask, Budget, CropMask, DecodeMask, DeferMask, NoMask, PatchMask, RouteMask, Stage, ViewsMask
from maskdm.errors import UserError
from maskdm.recipes import recipe
from maskdm.recipes.arms import Arm, parse_arm, parse_arms

BASE = recipe("cifar10", "photos")


def shape(text: str) -> list[tuple[str, object, float]]:
    arm = parse_arm(text, BASE)
    return [(stage.name, stage.mask, round(share, 6)) for stage, share in zip(arm.stages, arm.shares, strict=True)]


def test_arms_become_stages_that_share_the_budget() -> None:
    assert shape("whole") == [("1-whole", NoMask(), 1.0)]
    assert shape("patch-75") == [("1-patch-75", PatchMask(0.75), 0.25), ("2-whole", NoMask(), 0.75)]
    assert shape("block4-75@60") == [("1-block4-75", BlockMask(0.75, 4), 0.6), ("2-whole", NoMask(), 0.4)]
    assert shape("views4@50")[0] == ("1-views4", ViewsMask(4), 0.5)
    assert shape("route-50@50")[0] == ("1-route-50", RouteMask(0.5), 0.5)
    assert shape("defer-75@50")[0] == ("1-defer-75", DeferMask(0.75), 0.5)
    assert shape("crop4@100") == [("1-crop4", CropMask(4), 1.0)]
    assert shape("patch-90@30+patch-50@30") == [
        ("1-patch-90", PatchMask(0.9), 0.3),
        ("2-patch-50", PatchMask(0.5), 0.3),
        ("3-whole", NoMask(), 0.4),
    ]
    assert shape("maskdm@60+whole")[0] == ("1-maskdm", BASE.stages[0].mask, 0.6)


def test_all_stages_learn_at_one_rate_so_that_none_gains_by_its_fall() -> None:
    masked, whole = BASE.stages
    alone = parse_arm("whole", BASE).stages[0]
    assert (alone.batch, alone.lr, alone.warmup, alone.decay) == (whole.batch, masked.lr, masked.warmup, "constant")
    first, second = parse_arm("maskdm", BASE).stages
    assert (first.batch, first.lr, second.batch, second.lr) == (masked.batch, masked.lr, whole.batch, masked.lr)
    pieces = replace(BASE, stages=tuple(replace(stage, accumulate=2) for stage in BASE.stages))
    assert [stage.accumulate for stage in parse_arm("maskdm", pieces).stages] == [2, 2]
    assert parse_arm("patch-50/batch=63", pieces).stages[0].accumulate == 1


def test_the_control_of_a_rate_that_falls_can_be_written() -> None:
    arm = parse_arm("whole@50+whole/lr=3e-4", BASE)
    assert [(s.mask, s.lr) for s in arm.stages] == [(NoMask(), 1.5e-3), (NoMask(), 3e-4)]
    assert arm.decays and parse_arm("whole/decay=cosine", BASE).decays
    assert not parse_arm("maskdm", BASE).decays and not parse_arm("whole@50/lr=1e-4+whole", BASE).decays


def test_a_family_without_a_rate_has_its_papers() -> None:
    masks = [parse_arm(f"{name}@50", BASE).stages[0].mask for name in ("patch", "block4", "defer", "sprint", "route")]
    assert [mask.ratio for mask in masks] == [0.5, 0.9, 0.75, 0.75, 0.5]  # type: ignore[union-attr]
    assert parse_arm("patch-87.5@50", BASE).stages[0].mask == PatchMask(0.875)


def test_settings_of_a_stage_are_its_own() -> None:
    first, second = parse_arm("patch-75@50/batch=256/lr=1e-3/warmup=7+whole/decay=cosine/start_from=ema", BASE).stages
    assert (first.batch, first.lr, first.warmup, first.decay) == (256, 1e-3, 7, "constant")
    assert (second.decay, second.start_from) == ("cosine", "ema")


def test_nothing_is_averaged_before_the_first_stage() -> None:
    with pytest.raises(UserError, match="nothing averaged to start from"):
        parse_arm("early=patch-75@50/start_from=ema", BASE)
    assert parse_arm("on=whole/start_from=ema/init=runs/x", BASE).stages[0].start_from == "ema"


def test_a_name_of_ones_own() -> None:
    arm = parse_arm("fast=patch-75@50/lr=1e-3", BASE)
    assert arm.name == "fast" and arm.stages[0].lr == 1e-3
    assert parse_arm("patch-75/batch=8", BASE).name == "patch-75/batch=8"


def test_the_newer_families_bring_the_layers_they_need() -> None:
    sprint, decode = parse_arm("sprint@70", BASE), parse_arm("decode-50", BASE)
    assert sprint.stages[0].mask == RouteMask(0.75, 2, spread=True) and sprint.model.fuse == 2
    assert decode.stages[0].mask == DecodeMask(0.5, 2) and decode.model.mask_token and not decode.model.fuse
    assert parse_arm("route-50", BASE).model == BASE.model
    assert parse_arm("sprint-40", BASE).stages[0].mask == RouteMask(0.4, 2)
    for text in ("sprint/batch=64", "sprint/lr=1e-3+whole", "sprint@20/batch=64", "sprint-75/warmup=3"):
        assert parse_arm(text, BASE).model.fuse == 2
    assert parse_arm("decode/batch=64", BASE).model.mask_token
    config = sprint.config(BASE, 0, lambda stage, share: Budget(images=10))
    assert config.model.fuse == 2 and config.init is None


def test_an_arm_may_have_an_optimizer_of_its_own() -> None:
    arm = parse_arm("patch-75@25/batch=16+whole/optimizer=muon", BASE)
    made = arm.config(BASE, 0, lambda stage, share: Budget(images=10))
    assert made.optimizer == replace(BASE.optimizer, name="muon") and arm.name == "patch-75@25/batch=16+whole/optimizer=muon"
    assert arm.stages == parse_arm("patch-75@25/batch=16+whole", BASE).stages and "muon" in arm.describe()
    named = parse_arm("m=whole/optimizer=adamw/init=runs/x", replace(BASE, optimizer=replace(BASE.optimizer, name="muon")))
    assert (named.name, named.optimizer, named.init) == ("m", "adamw", "runs/x") and named.record()["optimizer"] == "adamw"
    with pytest.raises(UserError, match="give adamw or muon"):
        parse_arm("whole/optimizer=sgd", BASE)
    with pytest.raises(UserError, match="after the arm's stages"):
        parse_arm("patch-75/optimizer=muon+whole", BASE)


def test_an_arm_may_start_from_a_run_of_its_seed() -> None:
    arm = parse_arm("mine=whole/lr=1e-4/init=runs/pre-{seed}/x", BASE)
    assert arm.name == "mine" and arm.stages[0].lr == 1e-4
    assert arm.config(BASE, 3, lambda stage, share: Budget(images=10)).init == "runs/pre-3/x"
    with pytest.raises(UserError, match="give an arm that starts from a run a name, as in pretrained=whole/init=runs/a"):
        parse_arm("whole/init=runs/a", BASE)


def test_budgets_are_made_from_shares() -> None:
    config = parse_arm("patch-75@25", BASE).config(BASE, 7, lambda stage, share: Budget(images=round(1000 * share)))
    assert [stage.budget.images for stage in config.stages] == [250, 750] and config.seed == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ptach-50", "'ptach-50' is no mask; did you mean patch"),
        ("patch-100", "more than 0 and less than 100"),
        ("patch-x", "the share hidden is 'x'"),
        ("patch-50@0", "or one to nothing"),
        ("patch-50@70+patch-25@40", "more than 100 %"),
        ("whole@50", "come to 50% of the budget"),
        ("patch-50/batch=64.5", "give a whole number"),
        ("patch-50/batch=nan", "batch is 'nan', which is no number"),
        ("patch-50/lr=inf", "lr is 'inf'"),
        ("patch-50/bach=3", "'bach' is no key; did you mean batch"),
        ("patch-50/batch=many", "batch is 'many'"),
        ("patch-50/decay=cubic", "decay is 'cubic'; give constant"),
        ("patch-50/lr=-1", "lr is -1"),
        ("block3-50", "does not divide the grid"),
        ("a b=whole", "name an arm with letters"),
        ("maskdm-50", "takes the mask of the recipe"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arm(text, BASE)


def test_a_comparison_needs_two_arms_of_different_names() -> None:
    assert [arm.name for arm in parse_arms("whole, maskdm", BASE)] == ["whole", "maskdm"]
    with pytest.raises(UserError, match="at least two"):
        parse_arms("whole", BASE)
    with pytest.raises(UserError, match=r"'whole' is named twice; .*again=whole"):
        parse_arms("whole,maskdm,whole", BASE)
    assert isinstance(parse_arms("whole,again=whole", BASE)[1], Arm)


def test_without_a_masked_stage_there_is_no_maskdm() -> None:
    plain = replace(BASE, stages=(Stage("train", Budget(steps=1)),))
    assert parse_arm("patch-50", plain).stages[0].batch == 128
    with pytest.raises(UserError, match="name a mask, such as patch-50"):
        parse_arm("maskdm", plain)
