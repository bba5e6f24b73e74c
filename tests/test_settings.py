from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from maskdm.config import BlockMask, Budget, Config, CropMask, Data, DiTConfig, NoMask, PatchMask, Stage, UViTConfig
from maskdm.errors import UserError
from maskdm.recipes import RECIPES, recipe
from maskdm.settings import differences, from_plain, leaves, merge, override, read_yaml, to_plain, to_yaml


def config() -> Config:
    return recipe("digits", "digits")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    run = replace(recipe(name, "data"), stages=(Stage("a", Budget(minutes=1.5), CropMask(2)), Stage("b", Budget(images=7))))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(run))
    assert from_plain(read_yaml(file)) == run


def test_every_setting_has_a_meaning() -> None:
    assert [leaf.path for leaf in leaves(config()) if not leaf.meaning] == []


@pytest.mark.parametrize(
    ("name", "text", "path", "value"),
    [
        ("mask.ratio", "0.25", "stages.pretrain.mask.ratio", 0.25),
        ("stages.0.lr", "1e-5", "stages.pretrain.lr", 1e-5),
        ("finetune.lr", "2e-5", "stages.finetune.lr", 2e-5),
        ("image-size", "16x24", "data.image_size", (16, 24)),
        ("clip", "none", "optimizer.clip", None),
        ("channels", "3", "data.channels", 3),
        ("betas", "0.8,0.9", "optimizer.betas", (0.8, 0.9)),
        ("stages.finetune.budget.steps", "1e4", "stages.finetune.budget.steps", 10_000),
        ("hardware.compile", "true", "hardware.compile", True),
        ("init", "runs/other", "init", "runs/other"),
        ("sigma-rel", "0.03, 0.2", "ema.sigma_rel", (0.03, 0.2)),
        ("tracking", "none", "tracking", ()),
        ("tracking", "", "tracking", ()),
        ("tracking", "[]", "tracking", ()),
        ("tracking", "wandb", "tracking", ("wandb",)),
        ("tracking", "tensorboard, trackio", "tracking", ("tensorboard", "trackio")),
        ("tracking", "[wandb, trackio]", "tracking", ("wandb", "trackio")),
    ],
)
def test_a_setting_goes_by_its_name_or_an_unambiguous_tail(name: str, text: str, path: str, value: object) -> None:
    changed = override(config(), [(name, text)])
    assert {leaf.path: leaf.value for leaf in leaves(changed)}[path] == value
    assert len(differences(config(), changed)) == 1


def test_whole_values_of_unions() -> None:
    assert override(config(), [("model", "uvit-b"), ("image-size", "32")]).model == UViTConfig(768, 12, 12)
    assert override(config(), [("patch", "2"), ("model", "dit")]).model == DiTConfig(patch=2)
    assert override(config(), [("pretrain.mask", "{kind: block, ratio: 0.8, size: 2}")]).stages[0].mask == BlockMask(0.8, 2)
    assert override(config(), [("mask.size", "3"), ("pretrain.mask", "crop")]).stages[0].mask == CropMask(3)
    assert override(config(), [("pretrain.mask", "none")]).stages[0].mask == NoMask()
    stages = "[{name: one, budget: {steps: 5}, mask: {kind: patch, ratio: 0.3}}]"
    assert override(config(), [("stages", stages)]).stages == (Stage("one", Budget(steps=5), PatchMask(0.3)),)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ([("mask.rattio", "0.5")], r"unknown setting --mask\.rattio; did you mean mask\.ratio\?"),
        ([("lr", "1")], r"--lr could be any of --stages\.pretrain\.lr, --stages\.finetune\.lr"),
        ([("mask.ratio", "1.5")], r"mask\.ratio is 1\.5"),
        ([("mask.ratio", "high")], r"stages\.pretrain\.mask\.ratio is 'high'; give a number"),
        ([("seed", "1.5")], r"seed is '1\.5'; give a whole number"),
        ([("seed", "nan")], r"give a whole number"),
        ([("target", "epss")], r"one of eps, x0, v; did you mean eps\?"),
        ([("image-size", "33")], r"image_size 33 is not a multiple of patch 2; use --image-size 32"),
        ([("image-size", "big")], r"data\.image_size is 'big'"),
        ([("pretrain.mask", "squares")], r"stages\.pretrain\.mask is 'squares'; give one of block, crop, decode, defer"),
        ([("pretrain.mask", "crop")], r"mask\.size 11 is larger than the grid of 4 x 4"),
        ([("pretrain.mask", "{kind: block, ratio: 0.5, size: 3}")], r"does not divide the grid"),
        ([("pretrain.mask", "{kind: patch, size: 3}")], r"unknown setting 'stages\.pretrain\.mask\.size'"),
        ([("pretrain.batch", "10"), ("pretrain.accumulate", "3")], r"accumulate 3 does not divide"),
        ([("stages", "[]")], r"stages is empty"),
        ([("stages", "[{name: a}]")], r"'stages\.a\.budget' is missing"),
        ([("stages", "[{name: a, budget: {}}]")], r"budget is empty"),
        ([("stages", "[")], r"not valid YAML"),
        ([("heads", "3")], r"not a multiple of model\.heads 3"),
        ([("tracking", "wandbb")], r"tracking is 'wandbb'; give one of tensorboard, wandb, trackio; did you mean wandb\?"),
        ([("tracking", "wandb,wandb")], r"tracking names one tracker twice"),
        ([("tracking", "3")], r"tracking is '3'"),
        ([("sigma-rel", "0.1,0.1")], r"ema\.sigma_rel are \(0\.1, 0\.1\); give two lengths"),
        ([("sigma-rel", "0.1,0.3")], r"above 0, up to 0\.288"),
        ([("snapshots", "-1")], r"ema\.snapshots is -1"),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(assignments: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        override(config(), assignments)
    assert "\n" not in str(error.value)


def test_a_file_names_some_settings_and_unknown_keys_are_refused() -> None:
    assert merge(config(), {"seed": 3, "data": {"flip": 0.5}}, "x.yaml") == replace(config(), seed=3, data=replace(config().data, flip=0.5))
    with pytest.raises(UserError, match=r"x\.yaml: unknown setting 'data\.flipp'; did you mean flip\?"):
        merge(config(), {"data": {"flipp": 0.5}}, "x.yaml")
    plain = to_plain(config())
    plain["model"]["size"] = 3
    with pytest.raises(UserError, match=r"unknown setting 'model\.size'"):
        from_plain(plain)


def test_a_list_of_trackers_in_a_file() -> None:
    for text, expected in (("[]", ()), ("none", ()), ("", ()), ("wandb", ("wandb",)), ("[tensorboard, wandb]", ("tensorboard", "wandb"))):
        changed = merge(config(), yaml.safe_load(f"tracking: {text}"), "f")
        assert changed.tracking == expected
        assert from_plain(yaml.safe_load(to_yaml(changed))) == changed
    with pytest.raises(UserError, match=r"f: tracking is 'tensorbord'; .*did you mean tensorboard"):
        merge(config(), {"tracking": ["tensorbord"]}, "f")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the configuration"):
        read_yaml(tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1,")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(bad)
    bad.write_text("- 1")
    with pytest.raises(UserError, match="not a mapping"):
        read_yaml(bad)


def test_numbers_as_yaml_writes_them() -> None:
    assert merge(config(), yaml.safe_load("ema: {decay: 1e-2}"), "f").ema.decay == 0.01
    assert isinstance(Data("x", (8, 8)).image_size, tuple)
