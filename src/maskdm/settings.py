"""The configuration tree in and out: YAML, command-line assignments, differences.

One validator serves YAML files and the command line: a key that no field has, or a value of the wrong type, is a
UserError that names the key and the nearest valid one.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from maskdm.config import SHORTHANDS, Config
from maskdm.errors import UserError, nearest, shorten

Plain = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One setting of a configuration: its dotted path, value, type and meaning."""

    path: str
    value: Any
    meaning: str
    type: Any


@cache
def _hints(cls: type) -> dict[str, tuple[Any, str]]:
    """Field name -> (type, meaning) of a dataclass of the tree."""
    found: dict[str, tuple[Any, str]] = {}
    hints = get_type_hints(cls, include_extras=True)
    for each in fields(cls):
        hint = hints[each.name]
        found[each.name] = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, "")
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, without None; a single type is its own only member."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(m for m in get_args(hint) if m is not type(None))
    return (hint,)


# --- the tree as plain values -------------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """A configuration (or part of one) as dictionaries, lists and scalars; members of unions carry their `kind`."""
    if is_dataclass(value) and not isinstance(value, type):
        plain: Plain = {"kind": value.kind} if hasattr(type(value), "kind") else {}  # type: ignore[attr-defined]
        return plain | {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [to_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def from_plain(plain: Any) -> Config:
    """The configuration that `to_plain` wrote. Raises UserError naming the first unknown key or bad value."""
    config = _build(Config, plain, "")
    assert isinstance(config, Config)
    config.check()
    return config


def _build(hint: Any, value: Any, path: str) -> Any:
    members = _members(hint)
    if _is_list_of_scalars(hint) and (value is None or str(value).strip("[]() ").lower() in ("", "none")):
        return ()
    if value is None or (isinstance(value, str) and value.lower() == "none" and not any(is_dataclass(m) for m in members)):
        if type(None) in get_args(hint):
            return None
        if not any(is_dataclass(m) for m in members):
            raise UserError(f"{path} has no value")
        value = "none"
    if len(members) > 1:
        return _build_member(members, value, path)
    return _build_single(next(iter(members)), value, path)


def _is_list_of_scalars(hint: Any) -> bool:
    """Whether a type is a tuple of any length that is one setting, and not one of stages with settings of their own."""
    return get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis and not is_dataclass(get_args(hint)[0])


def _build_member(members: tuple[Any, ...], value: Any, path: str) -> Any:
    kinds = [m.kind for m in members]
    if isinstance(value, str):
        for name, each in SHORTHANDS.items():
            if name == value and isinstance(each, members):
                return each
        if value in kinds:
            return members[kinds.index(value)]()
        names = sorted({*kinds, *(n for n, each in SHORTHANDS.items() if isinstance(each, members))})
        raise UserError(f"{path} is '{shorten(str(value))}'; give one of {', '.join(names)}")
    if not isinstance(value, dict) or "kind" not in value:
        raise UserError(f"{path} needs a kind: one of {', '.join(kinds)}")
    if value["kind"] not in kinds:
        raise UserError(f"{path}.kind is '{shorten(str(value['kind']))}'; give one of {', '.join(kinds)}")
    return _build_dataclass(members[kinds.index(value["kind"])], {k: v for k, v in value.items() if k != "kind"}, path)


def _build_single(hint: Any, value: Any, path: str) -> Any:
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _build_dataclass(hint, value, path)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        for choice in choices:  # by their text, since the command line has nothing else
            if not isinstance(value, bool) and str(value) == str(choice):
                return choice
        names = [str(choice) for choice in choices]
        raise UserError(f"{path} is '{shorten(str(value))}'; give one of {', '.join(names)}{nearest(str(value), names)}")
    if get_origin(hint) is tuple:
        return _build_tuple(hint, value, path)
    return _build_scalar(hint, value, path)


def _build_dataclass(cls: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{path or 'the configuration'} must be a mapping of settings, not '{shorten(str(value))}'")
    known = _hints(cls)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in known:
            raise UserError(f"unknown setting '{prefix}{shorten(str(key))}'{nearest(str(key), list(known))} (of {', '.join(known)})")
    for each in fields(cls):
        if each.name not in value and each.default is MISSING and each.default_factory is MISSING:
            raise UserError(f"setting '{prefix}{each.name}' is missing")
    return cls(**{key: _build(known[key][0], item, f"{prefix}{key}") for key, item in value.items()})


def _build_tuple(hint: Any, value: Any, path: str) -> Any:
    parts = get_args(hint)
    if parts == (int, int) and isinstance(value, int | str) and not isinstance(value, bool):
        value = str(value).lower().split("x")  # an image size: 64, or 64x96
        value = value * 2 if len(value) == 1 else value
    if isinstance(value, str):
        value = [v.strip() for v in value.strip("[]() ").split(",")]
    if not isinstance(value, list | tuple):
        raise UserError(f"{path} is '{shorten(str(value))}'; give a list")
    items: list[Any] = list(value)  # pyright: ignore[reportUnknownArgumentType]
    if _is_list_of_scalars(hint):
        return tuple(_build(parts[0], item, path) for item in items)
    if parts[-1] is Ellipsis:
        names = [item.get("name", i) if isinstance(item, dict) else i for i, item in enumerate(items)]
        return tuple(_build(parts[0], item, f"{path}.{name}") for name, item in zip(names, items, strict=True))
    if len(items) != len(parts):
        raise UserError(f"{path} is '{shorten(str(value))}'; give {len(parts)} values")
    return tuple(_build(part, item, path) for part, item in zip(parts, items, strict=True))


def _build_scalar(hint: Any, value: Any, path: str) -> Any:
    """YAML reads 1e-4 as text, and the command line reads everything as text, so numbers are parsed here."""
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    try:
        if hint is bool and (isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no", "on", "off")):
            return value if isinstance(value, bool) else str(value).lower() in ("true", "yes", "on")
        if hint is int and not isinstance(value, bool):
            number = float(value)
            if number == int(number):
                return int(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else int(number)
        if hint is float and not isinstance(value, bool) and float(value) - float(value) == 0:
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    raise UserError(f"{path} is '{shorten(str(value))}'; give {kind}")


# --- single settings by name --------------------------------------------------------------------------------------


def leaves(value: Any, path: str = "", meaning: str = "", hint: Any = Config) -> Iterator[Leaf]:
    """Every setting of a configuration. Stages are named by their name: `stages.pretrain.lr`."""
    members = _members(hint)
    if len(members) > 1:
        yield Leaf(f"{path}.kind", value.kind, meaning, hint)
    if is_dataclass(value) and not isinstance(value, type):
        hints: dict[str, tuple[Any, str]] = _hints(type(value))
        for name, (inner, text) in hints.items():
            yield from leaves(getattr(value, name), f"{path}.{name}".lstrip("."), text, inner)
    elif get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis and not _is_list_of_scalars(hint):
        for item in value:  # pyright: ignore[reportGeneralTypeIssues] - a tuple of stages here
            yield from leaves(item, f"{path}.{item.name}", meaning, get_args(hint)[0])
    elif len(members) == 1:
        yield Leaf(path, value, meaning, hint)


def find(config: Config, name: str) -> Leaf:
    """The setting that `name` means: a dotted path, or any tail of one that fits a single setting.

    `--image-size` is `data.image_size`; `--mask.ratio` is `stages.pretrain.mask.ratio` where one stage has a mask with a
    ratio. A union may be named without its `.kind`. Raises UserError for an unknown or ambiguous name.
    """
    wanted = name.replace("-", "_").split(".")
    every = list(leaves(config))
    for number, stage in enumerate(config.stages):  # stages.0.lr is the first stage's lr
        if wanted[:2] == ["stages", str(number)]:
            wanted[1] = stage.name.replace("-", "_")
    found: list[Leaf] = []
    for leaf in every:
        path = leaf.path.replace("-", "_").split(".")
        bare = path[:-1] if path[-1] == "kind" else path
        if wanted in (path, bare):
            return leaf
        if wanted in (path[-len(wanted) :], bare[-len(wanted) :]):
            found.append(leaf)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"--{name} could be any of {', '.join('--' + leaf.path for leaf in found)}; name one")
    paths = [leaf.path.removesuffix(".kind") for leaf in every]
    tails = {path: path for path in paths} | {".".join(path.split(".")[-n:]): path for path in paths for n in (2, 1)}
    hint = nearest(".".join(wanted), list(tails))
    raise UserError(f"unknown setting --{shorten(name)}{hint or '; `maskdm train --help` lists them'}")


def override(config: Config, assignments: Sequence[tuple[str, str]]) -> Config:
    """`config` with the settings that (name, text) pairs assign. Values are written as in YAML. Raises UserError."""
    plain = to_plain(config)
    shape = config  # names are looked up in the tree as it stands after whole stages and kinds have been replaced
    rest: list[tuple[str, str]] = []
    for name, text in assignments:
        leaf = None if name == "stages" else _find_or_none(shape, name)
        if name == "stages":
            plain["stages"] = _parse(text)
        elif leaf is not None and leaf.path.endswith(".kind"):
            _assign(plain, leaf, _parse(text))
        else:
            rest.append((name, text))
            continue
        shape = _build(Config, plain, "")
    for leaf, text in [(find(shape, name), text) for name, text in rest]:
        _assign(plain, leaf, _parse(text))
    return from_plain(plain)


def _find_or_none(config: Config, name: str) -> Leaf | None:
    try:
        return find(config, name)
    except UserError:
        return None


def _parse(text: str) -> Any:
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return _load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"'{shorten(text)}' is not valid YAML: {' '.join(str(error).split())}") from None


def _assign(plain: Plain, leaf: Leaf, value: Any) -> None:
    *parents, last = leaf.path.split(".")
    node: Any = plain
    for part in parents if last != "kind" else parents[:-1]:
        node = next(stage for stage in node if stage["name"] == part) if isinstance(node, list) else node[part]
    if last != "kind":
        node[last] = value
        return
    new: Any = to_plain(_build(leaf.type, value, leaf.path.removesuffix(".kind")))
    node[parents[-1]] = new


# --- files --------------------------------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, every setting written out."""
    plain = to_plain(config)
    height, width = config.data.image_size
    plain["data"]["image_size"] = height if height == width else f"{height}x{width}"
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


MOST_BYTES, MOST_VALUES, MOST_CHARACTERS, DEEPEST = 1 << 20, 10_000, 3000, 20
"""Of a YAML text: its length, the values in it where aliases are written out, the length of one, and mappings within mappings."""


def _load(text: str) -> Any:
    """The plain values of a YAML text. Raises ValueError or YAMLError for one that is wrong, ambiguous or out of all bounds."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES} characters")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _count(node, {}, 0)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST}") from None
    try:
        return yaml.safe_load(text)
    except (AttributeError, LookupError, TypeError, OverflowError):  # by PyYAML, of a value that is not of the type its tag says
        raise ValueError("a value is not of the type that its tag says") from None


def _count(node: yaml.Node | None, counted: dict[int, int], depth: int) -> int:
    """Values below a node, those of aliases as often as they are named. Raises ValueError where they are too many, or a key is twice."""
    if depth > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST}")
    if isinstance(node, yaml.ScalarNode) and len(node.value) > MOST_CHARACTERS:
        raise ValueError(f"line {node.start_mark.line + 1} has a value of more than {MOST_CHARACTERS} characters")
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = MOST_VALUES  # until it is known: what holds itself is too large
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = [key for (_, key), times in keys.items() if times > 1]
            if twice:
                raise ValueError(f"'{shorten(twice[0])}' is given twice (line {node.start_mark.line + 1} and on)")
            inner = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        counted[id(node)] = 1 + sum(_count(each, counted, depth + 1) for each in inner)
    if counted[id(node)] > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES} values")
    return counted[id(node)]


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file. Raises UserError when it is absent, unreadable or not a mapping."""
    try:
        with path.open("rb") as file:  # of a file without end, so much is enough to know
            plain = _load(file.read(4 * MOST_BYTES + 1).decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise UserError(f"{path} is not a mapping of settings")
    return plain  # pyright: ignore[reportUnknownVariableType]


def merge(config: Config, plain: Any, where: str) -> Config:
    """`config` with the settings that `plain` (a YAML file's content) names; a list of stages replaces the whole list."""
    try:
        return from_plain(_merged(to_plain(config), plain))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _merged(base: Any, new: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(new, dict) or new.get("kind", base.get("kind")) != base.get("kind"):
        return new  # pyright: ignore[reportUnknownVariableType]
    return base | {k: _merged(base[k], v) if k in base else v for k, v in new.items()}  # pyright: ignore[reportUnknownVariableType]


def differences(old: Config, new: Config) -> list[str]:
    """The settings in which two configurations differ, each as `path: old -> new`."""
    before = {leaf.path: leaf.value for leaf in leaves(old)}
    after = {leaf.path: leaf.value for leaf in leaves(new)}
    paths = [p for p in {**before, **after} if before.get(p, "absent") != after.get(p, "absent")]
    return [f"{p}: {before.get(p, 'absent')} -> {after.get(p, 'absent')}" for p in paths]
