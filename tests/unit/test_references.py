"""What docstrings and comments refer to is there: by role, as room.module.name, or after "see"."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tools.import_graph import RANK, ROOT, files, imports_of, module_of

MODULES = {module_of(path): path for path in files()}
ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")
#: A dotted name in double backticks, or after "see", that begins with one of our rooms.
FIRST = "|".join(["aurora_sgl", "dashboard", "benchmarks", *RANK])
DOTTED = re.compile(rf"(?:``|\bsee )((?:{FIRST})(?:\.\w+)+)")
#: Rooms that are also the names of objects or of columns.
NOT_ROOMS = {"config.json", "store.connect"}


@cache
def names_of(path: Path) -> frozenset[str]:
    """Names that a file binds or imports, also in classes and as annotated fields."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return frozenset(names)


def resolves(name: str, path: Path | None = None) -> bool:
    """``name`` is a module of ours, something in one, or known in the file itself."""
    if path is not None and set(name.split(".")) <= names_of(path):
        return True
    package = module_of(path).rpartition(".")[0] if path else ""
    beside = [f"{package}.{name}", f"{module_of(path)}.{name}"] if path else []
    for full in (name, f"aurora_sgl.{name}", *beside):
        parts = full.split(".")
        for length in range(len(parts), 0, -1):
            module = MODULES.get(".".join(parts[:length]))
            if module is not None and set(parts[length:]) <= names_of(module):
                return True
    return False


def references() -> list[tuple[str, str, Path]]:
    rows = []
    for path in files():
        text = path.read_text()
        for pattern in (ROLE, DOTTED):
            for match in pattern.finditer(text):
                if match[1] not in NOT_ROOMS:
                    rows.append((str(path.relative_to(ROOT)), match[1], path))
    return rows


def test_what_docstrings_refer_to_is_there() -> None:
    rows = references()
    assert len(rows) > 50
    wrong = {f"{file}: {name}" for file, name, path in rows if not resolves(name, path)}
    assert wrong == set()


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("evaluation.gate.judge", True),
        ("aurora_sgl.intervals.paired_difference", True),
        ("intervals.AcceptCounts.interval", True),
        ("training.gate.evaluate", False),
        ("evaluation.gate.no_such_name", False),
        ("no_such_room.thing", False),
    ],
)
def test_a_name_that_is_not_there_is_seen(name: str, there: bool) -> None:
    assert resolves(name) is there


def test_every_module_of_ours_that_is_imported_is_there() -> None:
    ours = ("aurora_sgl", "dashboard", "benchmarks", "tests", "tools")
    folders = ("aurora_sgl", "dashboard", "benchmarks", "tests", "tools", "migrations")
    wrong = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for name in imports_of(path):
            if name.partition(".")[0] in ours and not is_there(name):
                wrong.add(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == set()


def is_there(name: str) -> bool:
    """Whether a module, or a name in one, is in the repository."""
    place = ROOT / name.replace(".", "/")
    if place.is_dir() or place.with_suffix(".py").exists():
        return True
    modules = (place.parent.with_suffix(".py"), place.parent / "__init__.py")
    return any(module.exists() and place.name in names_of(module) for module in modules)
