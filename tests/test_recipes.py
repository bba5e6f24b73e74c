from __future__ import annotations

import pytest

from maskdm.config import DiTConfig, PatchMask, UViTConfig
from maskdm.errors import UserError
from maskdm.recipes import RECIPES, choose, recipe
from maskdm.recipes.automatic import Facts, flops_per_image


def facts(count: int = 5000, side: tuple[int, int] = (32, 32), gray: bool = False, classes: int = 0, cpu: bool = True) -> Facts:
    return Facts("photos", count, side[0], side[1], gray, classes, cpu, 8e10 if cpu else 1e14)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_together(name: str) -> None:
    config = recipe(name, "data")
    config.check()
    assert config.data.source == "data"
    assert len(config.stages) == 2 and isinstance(config.stages[0].mask, PatchMask)


def test_unknown_recipe() -> None:
    with pytest.raises(UserError, match="did you mean cifar10"):
        recipe("cifar", "data")


@pytest.mark.parametrize("side", [(5, 5), (8, 8), (28, 28), (32, 40), (33, 47), (96, 64), (300, 200), (4000, 3000)])
@pytest.mark.parametrize("cpu", [True, False])
def test_choices_hold_together_for_any_size(side: tuple[int, int], cpu: bool) -> None:
    choice = choose(facts(side=side, cpu=cpu))
    choice.config.check()
    height, width = choice.config.data.image_size
    assert height == width <= max(8, min(side))
    assert height <= (64 if cpu else 256)
    assert len(choice.reasons) >= 5


def test_choices_follow_the_data() -> None:
    plain, classes = choose(facts()).config, choose(facts(classes=7)).config
    assert not plain.data.conditional and classes.data.conditional
    assert choose(facts(gray=True)).config.data.channels == 1 and plain.data.channels == 3
    assert choose(facts(count=40)).config.stages[0].budget.images == 80_000  # 2 000 times the data at most
    assert choose(facts(), image_size=(48, 72)).config.data.image_size == (48, 72)
    assert choose(facts(side=(256, 256), cpu=False)).config.model == DiTConfig(768, 12, 12, 8)


def test_a_run_to_start_from_gives_its_network_and_one_stage() -> None:
    init = recipe("cifar10", "x")
    config = choose(facts(side=(64, 64)), init=init).config
    assert config.model == init.model and config.diffusion == init.diffusion
    assert [(stage.name, stage.start_from) for stage in config.stages] == [("finetune", "ema")]


def test_flops_are_those_of_the_blocks() -> None:
    model = UViTConfig(width=64, depth=4, heads=2)
    assert flops_per_image(model, 10) == 3 * 5 * (24 * 10 * 64**2 + 4 * 100 * 64)
