"""One file of Python that holds what some classes of maskdm need, for machines that have diffusers and not maskdm.

The text is the package's own, definition by definition, so that it cannot drift from it: those that are reachable from the classes are
taken, in the order of the imports. Names that two modules use for different things are told apart by the module's.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import maskdm

PACKAGE = "maskdm"

SHAPED = '''class _Shaped:
    """An array's type; its shape, in words, is for the reader."""

    def __class_getitem__(cls, item: Any) -> Any:
        return item[0]


{names} = _Shaped'''


@dataclass(frozen=True)
class _Part:
    """A definition at the top of a module: its lines, counted from 0, and the names that it needs when it runs and those for the reader."""

    node: ast.stmt
    start: int
    end: int
    needs: frozenset[str]
    says: frozenset[str]

    @property
    def is_alias(self) -> bool:
        return isinstance(self.node, ast.Assign | ast.AnnAssign)


@dataclass
class _Module:
    """A module of the package, taken apart."""

    name: str
    lines: list[str]
    parts: dict[str, _Part] = field(default_factory=dict[str, _Part])
    ours: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Names imported from the package: module and name there."""
    others: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Names imported from elsewhere: from which module ("" for `import`) and what."""


Place = tuple[str, str]
"""A module's name, and that of a definition in it."""


def bundle(roots: Sequence[Place], title: str) -> str:
    """The text of a module that has these classes, each given by its module and name, and all they need."""
    found = _reachable(roots)
    order = _in_order([module for module, _ in found])
    names = _told_apart(sorted(found, key=lambda place: (order.index(place[0]), _module(place[0]).parts[place[1]].start)))
    imports: dict[str, set[str]] = {}
    shapes: set[str] = set()
    unknown: set[str] = set()
    for place in names:
        part = _module(place[0]).parts[place[1]]
        for name in part.needs | part.says:
            source, what = _module(place[0]).others.get(name, ("", ""))
            if source == "jaxtyping":
                shapes.add(name)
            elif what:
                imports.setdefault(source, set()).add(what)
        unknown |= {name for name in part.says if _place(place[0], name) not in (*names, None)}
    if shapes or unknown:
        imports.setdefault("typing", set()).add("Any")
    plain = [f"import {what}" for what in sorted(imports.pop("", set()))]
    named = [f"from {source} import {', '.join(sorted(what))}" for source, what in sorted(imports.items())]
    head = [f'"""{title}, from maskdm {maskdm.__version__} (Apache-2.0). Written by `maskdm export`."""']
    head += ["from __future__ import annotations", "\n".join([*plain, *named])]
    head += [SHAPED.format(names=" = ".join(sorted(shapes)))] if shapes else []
    head += [" = ".join(sorted(unknown)) + " = Any"] if unknown else []
    return "\n\n".join(head) + "\n\n\n" + "\n\n\n".join(_text(place, names) for place in names) + "\n"


def _reachable(roots: Sequence[Place]) -> set[Place]:
    """The definitions that these need, and they."""
    found, waiting = set[Place](), list(roots)
    while waiting:
        place = waiting.pop()
        if place in found:
            continue
        found.add(place)
        part = _module(place[0]).parts[place[1]]
        waiting += [each for each in (_place(place[0], name) for name in part.needs) if each is not None]
        spoken = [each for each in (_place(place[0], name) for name in part.says) if each is not None]
        waiting += [each for each in spoken if _module(each[0]).parts[each[1]].is_alias]
    return found


def _place(module: str, name: str) -> Place | None:
    """Where in the package a name of a module is defined; None for what is not its own. Follows what is passed on."""
    here = _module(module)
    if name in here.parts:
        return module, name
    return _place(*here.ours[name]) if name in here.ours else None


def _in_order(modules: Sequence[str]) -> list[str]:
    """The modules, each after those it imports."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for other, _ in _module(name).ours.values():
                visit(other)
            order.append(name)

    for each in sorted(modules):
        visit(each)
    return order


def _told_apart(places: Sequence[Place]) -> dict[Place, str]:
    """A name for each definition, its own for the first that has it."""
    names: dict[Place, str] = {}
    for module, name in places:
        taken = name in names.values()
        names[module, name] = f"{name}_of_{module.rpartition('.')[2]}" if taken else name
    return names


def _text(place: Place, names: dict[Place, str]) -> str:
    """A definition's lines, with the names that it has in the bundle."""
    module = _module(place[0])
    part = module.parts[place[1]]
    lines = module.lines[part.start : part.end]
    for line, column, name in sorted(_mentions(part.node), reverse=True):
        there = _place(module.name, name)
        now = names.get(there, name) if there is not None else name
        if now == name:
            continue
        row = lines[line - 1 - part.start]
        if row[column : column + len(name)] != name:
            raise RuntimeError(f"{module.name}: '{name}' is used in an f-string and is also a name of another module; rename one")
        lines[line - 1 - part.start] = row[:column] + now + row[column + len(name) :]
    text = re.sub(r"\s*# pyright: ignore.*", "", "\n".join(lines))
    return re.sub(r'\n    __module__ = "maskdm".*\n', "", text)


def _mentions(node: ast.stmt) -> Iterator[tuple[int, int, str]]:
    """Line, column and name wherever a definition mentions one, its own included."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.lineno, node.col_offset + len("def " if isinstance(node, ast.FunctionDef) else "class "), node.name
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.lineno, each.col_offset, each.id


@cache
def _module(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"the source of {name} is not there")
    text = Path(spec.origin).read_text(encoding="utf-8")
    module = _Module(name, text.split("\n"))
    for node in ast.parse(text).body:
        match node:
            case ast.ImportFrom(module=source) if source and source.split(".")[0] == PACKAGE:
                module.ours |= {each.asname or each.name: (source, each.name) for each in node.names}
            case ast.ImportFrom(module=source) if source != "__future__":
                module.others |= {each.asname or each.name: (source or "", ast.unparse(each)) for each in node.names}
            case ast.Import():
                module.others |= {(each.asname or each.name).split(".")[0]: ("", ast.unparse(each)) for each in node.names}
            case ast.FunctionDef() | ast.ClassDef() | ast.Assign() | ast.AnnAssign():
                for defined in _defined(node):
                    module.parts[defined] = _part(node, module.lines)
            case _:
                pass
    return module


def _defined(node: ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [each.id for each in targets if isinstance(each, ast.Name)]
        case ast.AnnAssign(target=target):
            return [target.id] if isinstance(target, ast.Name) else []


def _part(node: ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign, lines: list[str]) -> _Part:
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").split(".")[0] == PACKAGE:
            raise RuntimeError(f"'from {inner.module} import' inside of a definition cannot be bundled; import at the top of the module")
    decorators = [] if isinstance(node, ast.Assign | ast.AnnAssign) else node.decorator_list
    start = min([node.lineno, *(each.lineno for each in decorators)]) - 1
    while start > 0 and lines[start - 1].startswith("#"):
        start -= 1
    said = {each.id for hint in _hints(node) for each in ast.walk(hint) if isinstance(each, ast.Name)}
    silent = {id(each) for hint in _hints(node) for each in ast.walk(hint)}
    needed = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and id(each) not in silent}
    return _Part(node, start, node.end_lineno or node.lineno, frozenset(needed), frozenset(said - needed))


def _hints(node: ast.stmt) -> Iterator[ast.expr]:
    """The annotations in a definition, which nothing looks at when it runs."""
    for each in ast.walk(node):
        match each:
            case ast.arg(annotation=hint) | ast.AnnAssign(annotation=hint) | ast.FunctionDef(returns=hint) if hint is not None:
                yield hint
            case _:
                pass
