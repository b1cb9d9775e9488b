"""The house rules that a machine can hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# Package -> packages that it may import.
MAY_IMPORT = {
    "orchestrator": {"orchestrator", "stages", "cluster", "models"},
    "stages": {"stages", "cluster", "models"},
    "cluster": {"cluster"},
    "models": {"models"},
}
MODULES = sorted(p for package in MAY_IMPORT for p in (REPOSITORY / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a module imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    wrong = {
        str(path.relative_to(REPOSITORY)): sorted(forbidden)
        for path in (REPOSITORY / package).rglob("*.py")
        if (forbidden := imported(path) & set(MAY_IMPORT) - MAY_IMPORT[package])
    }
    assert not wrong


def test_the_modeling_file_needs_nothing_but_torch_and_transformers() -> None:
    path = REPOSITORY / "models" / "mapped" / "modeling_coalesce.py"
    assert not imported(path) & set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
