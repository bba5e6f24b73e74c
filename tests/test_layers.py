"""A module imports only what stands above it, and there are no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "maskdm"
ORDER = (
    "errors", "config", "settings", "masking", "arithmetic", "data", "diffusion", "draws", "models", "objective", "distillation",
    "engine", "sampling", "evaluation", "pictures", "report", "recipes", "tracking", "export", "runs", "api", "demo", "command_line",
    "cli_export", "cli_sample", "cli_edit", "cli_demo", "cli", "__main__",
)  # fmt: skip


def imports(file: Path) -> set[str]:
    """The top-level parts of maskdm that a file imports, at whatever depth of the code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if isinstance(node, ast.ImportFrom) and node.module == "maskdm":
            names = [f"maskdm.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("maskdm.")}
    return found


def test_a_module_imports_only_what_stands_above_it() -> None:
    wrong: list[str] = []
    for file in SOURCE.rglob("*.py"):
        part = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert part in ORDER, f"{file} has no place in the order of layers"
        wrong += [f"{part} imports {other}" for other in imports(file) if other in ORDER and ORDER.index(other) > ORDER.index(part)]
    assert wrong == []


def test_files_and_functions_stay_short() -> None:
    for file in SOURCE.rglob("*.py"):
        text = file.read_text()
        assert text.count("\n") <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{file}: {node.name}"
