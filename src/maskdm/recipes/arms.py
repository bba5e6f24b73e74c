"""The arms of a comparison: what `--arms` may say (`maskdm compare --help`), and the stages that each becomes at a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from maskdm.config import (
    BlockMask,
    Budget,
    Config,
    CropMask,
    DecodeMask,
    DeferMask,
    Mask,
    Model,
    NoMask,
    PatchMask,
    ReduceMask,
    RouteMask,
    Stage,
    ViewsMask,
)
from maskdm.errors import UserError, nearest
from maskdm.models import Denoiser
from maskdm.settings import to_plain

AUTO = 0.8
"""Of the budget, for a masked stage that ends by evidence (`@auto`), at most."""

SHARE = 0.25
"""Of the budget, for a masked stage that names none."""

HIDDEN = {"block": 0.9, "defer": 0.75, "sprint": 0.75}
"""Shares hidden by families that are given none, as their papers have it; 0.5 by the others."""

NAMES = ("whole", "maskdm", "patch", "block2", "block4", "block8", "views4", "route", "sprint", "defer", "decode", "crop4", "reduce2")
KEYS = ("batch", "lr", "warmup", "decay", "start_from")


@dataclass(frozen=True)
class Network:
    """A network from elsewhere, which an arm trains in place of that of its `model`.

    note: what it is, in words; record: the same, ready for JSON. flops: of training on an image, whole (NoMask) and under the masks of
    the arm's stages. build: makes it for so many classes (0: unconditional); it need take no other masks than those.
    """

    note: str
    record: Mapping[str, Any]
    flops: Mapping[Mask, float]
    build: Callable[[int], Denoiser]


@dataclass(frozen=True)
class Arm:
    """A way to train: stages whose budgets are shares (0..1, adding up to 1) of the whole one, and the network, with what they need."""

    name: str
    shares: tuple[float, ...]
    stages: tuple[Stage, ...]
    model: Model
    init: str | None = None
    """Run whose weights to start from; {seed} in it stands for the seed."""
    optimizer: Literal["adamw", "muon"] | None = None
    """In place of the base's."""
    network: Network | None = None
    """In place of the one that `model` describes, of which the patches are then all that counts."""

    def config(self, base: Config, seed: int, budget: Callable[[Stage, float], Budget]) -> Config:
        """The run of a seed; `budget` makes a stage's from its share."""
        stages = tuple(
            replace(stage, budget=replace(budget(stage, share), auto=stage.budget.auto))
            for stage, share in zip(self.stages, self.shares, strict=True)
        )
        init = None if self.init is None else self.init.replace("{seed}", str(seed))
        optimizer = base.optimizer if self.optimizer is None else replace(base.optimizer, name=self.optimizer)
        return replace(base, model=self.model, stages=stages, optimizer=optimizer, seed=seed, init=init)

    @property
    def decays(self) -> bool:
        """Whether its learning rate falls, within a stage or from one to the next: only its end compares then."""
        rates = [stage.lr for stage in self.stages]
        return any(stage.decay != "constant" for stage in self.stages) or any(b < a for a, b in zip(rates, rates[1:], strict=False))

    def describe(self) -> str:
        """Its stages in words."""
        words = [
            f"{stage.name.partition('-')[2]} for {'at most ' if stage.budget.auto else ''}{share:.0%}, batch {stage.batch}, lr {stage.lr:g}"
            for stage, share in zip(self.stages, self.shares, strict=True)
        ]
        more = (self.optimizer, f"from {self.init}" if self.init else None, self.network and self.network.note)
        return "; ".join((*words, *(each for each in more if each)))

    def record(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        stages = [{"share": share} | to_plain(stage) for stage, share in zip(self.stages, self.shares, strict=True)]
        network = {"model": to_plain(self.model)} if self.network is None else {"network": dict(self.network.record)}
        return {"stages": stages, **network, "init": self.init, "optimizer": self.optimizer}


def parse_arm(text: str, base: Config) -> Arm:
    """An arm from what a person wrote, its stages after those of `base`. Raises UserError naming the part that cannot be read.

    Every stage has the learning rate and warm-up of the base's first masked stage (of the first, where none is), so that no arm gains by a
    rate that falls; masked ones have its batch too, whole ones that of its last whole stage. Rates are constant, so that an arm is
    comparable at any time; /decay=cosine for another course. After the stages /optimizer=muon is for all of them, and /init=RUN, last,
    starts from a run's weights.
    """
    text, _, init = text.partition("/init=")
    text, _, optimizer = text.partition("/optimizer=")
    if optimizer not in ("", "adamw", "muon"):
        raise UserError(f"--arms '{text}/optimizer={optimizer}': optimizer is '{optimizer}'; give adamw or muon, after the arm's stages")
    name, named, spec = text.partition("=") if "=" in text.split("/")[0] else (text, "", text)
    if init and not named:
        raise UserError(f"--arms '{text}/init={init}': give an arm that starts from a run a name, as in pretrained={text}/init={init}")
    good = bool(name) and all(c.isalnum() or c in "-_.+@/=" for c in name)
    if not good or (named and not all(c.isalnum() or c in "-_" for c in name)):
        raise UserError(f"--arms '{text}': name an arm with letters, digits, - and _")
    if optimizer and not named:
        name = f"{text}/optimizer={optimizer}"
    if not (init or base.init) and "start_from=ema" in spec.partition("+")[0].split("/"):
        raise UserError(
            f"--arms '{text}': before an arm's first stage there is nothing averaged to start from; say it of the next: "
            "patch-75@25+whole/start_from=ema"
        )
    shares: list[float] = []
    stages: list[Stage] = []
    for part in spec.split("+"):
        stage, share = _stage(text, part, base)
        stages.append(replace(stage, name=f"{len(stages) + 1}-{stage.name}"))
        shares.append(share if share is not None else 1.0 - sum(shares) if isinstance(stage.mask, NoMask) else SHARE * (1.0 - sum(shares)))
    left = 1.0 - sum(shares)
    if left < -1e-9 or min(shares) <= 0:
        raise UserError(f"--arms '{text}': the shares come to more than 100 % of the budget, or one to nothing")
    if left > 1e-9:
        if isinstance(stages[-1].mask, NoMask):
            raise UserError(f"--arms '{text}': its stages come to {sum(shares):.0%} of the budget, not to all of it")
        whole, _ = _stage(text, "whole", base)
        stages.append(replace(whole, name=f"{len(stages) + 1}-whole"))
        shares.append(left)
    arm = Arm(
        name,
        tuple(shares),
        tuple(stages),
        _model(base, [_family(part) for part in spec.split("+")]),
        init or None,
        optimizer or None,
    )
    arm.config(base, base.seed, lambda stage, share: Budget(minutes=share)).check()
    return arm


def parse_arms(texts: str, base: Config, more: Sequence[Arm] = ()) -> list[Arm]:
    """Arms separated by commas, and `more`; the first is what the others are compared with. Raises UserError."""
    arms = [*(parse_arm(text.strip(), base) for text in texts.split(",") if text.strip()), *more]
    if len(arms) < 2:
        raise UserError(f"--arms '{texts}' names {len(arms)} arm{'' if len(arms) == 1 else 's'}; a comparison needs at least two")
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise UserError(f"--arms: '{twice}' is named twice; give one of them a name of its own, such as again={twice}")
    return arms


def _edge(base: Config) -> int:
    """Blocks at either end that work on all patches: 2, or 1 of a shallow network."""
    return max(1, min(2, (base.blocks - 1) // 2))


def _family(part: str) -> str:
    """The way to mask that a stage names, without its rate, share and settings."""
    return part.split("/")[0].partition("@")[0].partition("-")[0]


def _model(base: Config, families: list[str]) -> Model:
    """The base's network, with the layers that some families need."""
    model = base.model
    if "sprint" in families:
        model = replace(model, fuse=model.fuse or _edge(base))
    if "decode" in families:
        model = replace(model, mask_token=True)
    return model


def rates_of(base: Config) -> Stage:
    """The stage whose learning rate and warm-up the arms take: the first masked one, or the first."""
    return next((stage for stage in base.stages if not isinstance(stage.mask, NoMask)), base.stages[0])


def _stage(text: str, part: str, base: Config) -> tuple[Stage, float | None]:
    """One stage and its share, if it names one."""
    head, *settings = part.split("/")
    head, _, share_text = head.partition("@")
    family, _, rate_text = head.partition("-")
    masked = rates_of(base)
    whole = next((stage for stage in reversed(base.stages) if isinstance(stage.mask, NoMask)), base.stages[-1])
    by_evidence = share_text == "auto"
    share = None if not share_text else AUTO if by_evidence else _number(text, share_text, "share") / 100
    if family == "maskdm" and (rate_text or isinstance(masked.mask, NoMask)):
        raise UserError(f"--arms '{text}': maskdm takes the mask of the recipe's masked stage; name a mask, such as patch-50")
    mask = masked.mask if family == "maskdm" else _mask(text, family, rate_text, base)
    of_whole = isinstance(mask, NoMask)
    like = whole if of_whole else masked
    stage = Stage(
        family if of_whole or family == "maskdm" else f"{family}-{rate_text}".rstrip("-").replace(".", "_"),
        Budget(minutes=1.0, auto=by_evidence),
        mask,
        batch=like.batch,
        accumulate=like.accumulate,
        lr=masked.lr,
        warmup=masked.warmup,
        start_from=like.start_from,
    )
    for key, good, value in (setting.partition("=") for setting in settings):
        if key not in KEYS or not good:
            raise UserError(f"--arms '{text}': '{key}' is no key{nearest(key, list(KEYS))}; there are {', '.join(KEYS)}, as KEY=VALUE")
        stage = replace(stage, **{key: _value(text, key, value)} | ({"accumulate": 1} if key == "batch" else {}))
    return stage, share


def _value(text: str, key: str, value: str) -> int | float | str:
    if key in ("batch", "warmup", "lr"):
        number = _number(text, value, key)
        if key != "lr" and number != int(number):
            raise UserError(f"--arms '{text}': {key} is '{value}'; give a whole number")
        return number if key == "lr" else int(number)
    known = ("constant", "cosine", "linear") if key == "decay" else ("raw", "ema")
    if value not in known:
        raise UserError(f"--arms '{text}': {key} is '{value}'; give {', '.join(known)}")
    return value


def _number(text: str, value: str, what: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--arms '{text}': {what} is '{value}', which is no number")
    return number


def _mask(text: str, family: str, rate: str, base: Config) -> Mask:
    hidden = _number(text, rate, "the share hidden") / 100 if rate else HIDDEN.get(family.rstrip("248"), 0.5)
    if not 0 < hidden < 1:
        raise UserError(f"--arms '{text}': {rate} % hidden; give more than 0 and less than 100")
    if family == "whole" and not rate:
        return NoMask()
    ends = _edge(base)
    match family:
        case "patch":
            return PatchMask(hidden)
        case "route":
            return RouteMask(hidden, base.model.fuse or ends)
        case "sprint":
            return RouteMask(hidden, base.model.fuse or ends, spread=hidden in (0.25, 0.5, 0.75) and not any(n % 2 for n in base.grid))
        case "defer":
            return DeferMask(hidden, ends)
        case "decode":
            return DecodeMask(hidden, ends)
        case _:
            pass
    if family.startswith("views") and family[5:].isdigit() and not rate:
        return ViewsMask(int(family[5:]))
    if family.startswith("block") and family[5:].isdigit():
        return BlockMask(hidden, int(family[5:]))
    if family.startswith("reduce") and family[6:].isdigit() and not rate:
        return ReduceMask(int(family[6:]))
    if family.startswith("crop") and family[4:].isdigit() and not rate:
        return CropMask(int(family[4:]))
    given = f"{family}-{rate}" if rate else family
    raise UserError(f"--arms '{text}': '{given}' is no mask{nearest(family, list(NAMES))}; give {', '.join(NAMES[:-1])} or {NAMES[-1]}")
