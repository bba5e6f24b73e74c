"""Damaged configurations: YAML files and settings on the command line; and what becomes of them."""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from maskdm.cli import run_command
from maskdm.recipes import recipe
from maskdm.settings import leaves, to_plain
from tests.fuzz.files import Outcome, one_line
from tests.fuzz.mutate import mutate

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    1e-30,
    1e30,
    2**31,
    2**63,
    -(2**63),
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    "",
    " ",
    "none",
    "auto",
    "nan",
    "1e9999",
    "-0",
    "0x10",
    "1_000",
    "٣",
    "[",
    "{",
    "[/bold]",
    "\ud800",
    "\0",
    "é" * 50,
    "x" * 5000,
    "9" * 5000,
    "2020-99-99",
    "../..",
    "a\nb",
    [],
    [[]],
    [1],
    [1, 2, 3],
    ["none", None],
    {},
    {"kind": "patch"},
    {"kind": ["patch"]},
    {"kind": None},
    {1: 2},
    [{}] * 3,
    [{"name": 3}],
)
"""Values of every type, and at the ends of their ranges."""

TEXTS = (
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
    + "".join(f"{chr(99 + i)}: &{chr(99 + i)} [{', '.join(['*' + chr(98 + i)] * 9)}]\n" for i in range(8))
    + "seed: *j\ntracking: *j\n",  # the billion laughs
    "stages: &s [*s]\n",
    "model: &m {kind: *m}\n",
    "? [a, b]\n: 1\n",
    "? {a: b}\n: 1\n",
    "seed: 1\nseed: 2\n",
    "seed: !!python/object:os.system {}\n",
    "seed: !!python/object/apply:os.system ['true']\n",
    "seed: !!int x\n",
    "seed: !!bool x\n",
    "seed: !!timestamp x\n",
    "seed: 2020-99-99\n",
    "seed: !!binary '****'\n",
    "a: " + "[" * 2000,
    "a: " + "[" * 18 + "]" * 18,
    "a: " + "{a: " * 500 + "}" * 500,
    "seed: 0x" + "f" * 20_000,
    "seed: " + "9" * 20_000,
    "seed: 1" + ":59" * 9000,
    "\ufeffseed: 3\n",
    "seed: 3\n\0",
    "--- 1\n--- 2\n",
    "%YAML 9.9\n---\nseed: 1\n",
    "<<: {seed: 4}\n",
    "<<: [1]\n",
    "<<: &x {<<: *x}\n",
    "- seed\n",
    "seed\n",
    "",
    "#\n",
    "~: 1\n",
    "1: 2\n",
    "1.5: {}\n",
    "null: null\n",
    "true: false\n",
    "data: []\n",
    "data: {image_size: []}\n",
    "data: {image_size: [0, 0]}\n",
    "data: {image_size: 99999999999999999999}\n",
    "data: {image_size: ٦٤}\n",
    "hardware: [cpu]\n",
    "init: [1]\n",
    "init: /dev/zero\n",
    "stages: {}\n",
    "stages: [[]]\n",
    "x: " + "y" * 2_000_000,
)
"""YAML that is wrong, ambiguous or hostile as a whole."""


@cache
def _whole() -> dict[str, Any]:
    return {k: v for k, v in to_plain(recipe("digits", "digits")).items() if v is not None}


@cache
def _names() -> tuple[str, ...]:
    return tuple(leaf.path.removesuffix(".kind") for leaf in leaves(recipe("digits", "digits")))


def yaml_mutant(number: int) -> bytes:
    """The damaged YAML file of this number: first those of TEXTS, then what chance makes of a whole one."""
    if number < len(TEXTS):
        return TEXTS[number].encode()
    draw = random.Random(f"yaml {number}")
    plain = yaml.safe_load(yaml.safe_dump(_whole()))
    for _ in range(draw.choice((1, 1, 2, 5))):
        _change(plain, draw)
    text = yaml.safe_dump(plain, allow_unicode=True, sort_keys=False)
    encoding = draw.choice(("utf-8",) * 8 + ("utf-16", "utf-8-sig", "latin-1"))
    data = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    return mutate(data, TEXTS[draw.randrange(len(TEXTS) - 1)].encode(), draw) if draw.random() < 0.4 else data


def _change(plain: Any, draw: random.Random) -> None:
    """Rename, remove, add or replace something, somewhere."""
    while isinstance(plain, dict | list) and plain:
        key = draw.choice(list(plain) if isinstance(plain, dict) else list(range(len(plain))))
        inner = plain[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.8:
            plain = inner
            continue
        match draw.randrange(6):
            case 0 if isinstance(plain, dict):
                plain[draw.choice((f"{key}s", 3, None, "kind", "é", "x" * 300, str(key).upper()))] = plain.pop(key)
            case 1:
                del plain[key]
            case 2 if isinstance(plain, list):
                plain.append(inner)
            case _:
                plain[key] = draw.choice(ODD)
        return


def line_mutant(number: int) -> list[str]:
    """The damaged settings of this number, as words of a command line."""
    draw = random.Random(f"line {number}")
    words: list[str] = []
    for _ in range(draw.choice((1, 1, 2, 4))):
        name, value = draw.choice(_names()), draw.choice(ODD)
        if draw.random() < 0.2:
            name = draw.choice(
                (name[1:], f"{name}.x", "stages.0.lr", "", "no-" + name, name.upper(), "stages", "model", "=", "a" * 300, "é")
            )
        text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        if draw.random() < 0.1:
            text = draw.choice(TEXTS[:-1])
        words += [f"--{name}={text}"] if draw.random() < 0.5 else [f"--{name}", text]
    return words


def attempt_configuration(kind: str, number: int) -> Outcome:
    """Give maskdm a damaged configuration, of kind `yaml` or `line`. What it raises but does not promise is let through."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "digits", "--out", str(Path(folder) / "run"), "--dry-run"]
        if kind == "yaml":
            file = Path(folder) / "config.yaml"
            file.write_bytes(yaml_mutant(number))
            words += ["--config", str(file)]
        else:
            words += ["--recipe", "digits"] if number % 2 else []
            words += line_mutant(number)
        said, error = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()  # strict, as a terminal is
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
            code = run_command(words)
        message = next((line for line in reversed(error.getvalue().splitlines()) if line), "")
    assert code in (0, 2), (code, message[:300])
    if code == 0:
        return True, ""
    assert message.startswith("maskdm: error: "), message[:300]
    return False, one_line(message)
