"""The imports keep to the rooms of the house (the list below is the rule; see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "aurora_sgl"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "dashboard").rglob("*.py")])


def room_of(path: Path) -> str:
    """``engine``, ``store``, ... or, for a file that stands by itself, its name."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "dashboard":
        return "dashboard"
    return parts[1].removesuffix(".py")


@cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, also inside functions, as a full dotted name."""
    package = list(path.relative_to(ROOT).parts[:-1])
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.append(module)
            names += (f"{module}.{alias.name}" for alias in node.names)
    return tuple(names)


def importers(*modules: str) -> set[tuple[str, str]]:
    """Pairs (room, file) that import one of the modules or something in them."""
    found = set()
    for path in FILES:
        for name in imports_of(path):
            if any(name == module or name.startswith(f"{module}.") for module in modules):
                found.add((room_of(path), str(path.relative_to(ROOT))))
    return found


def test_the_reader_of_imports_sees_those_inside_functions_too() -> None:
    assert ("cli", "aurora_sgl/cli/__init__.py") in importers("aurora_sgl.errors")
    assert ("cli", "aurora_sgl/cli/db.py") in importers("aurora_sgl.doctor")
    assert importers("aurora_sgl.no_such_room") == set()


@pytest.mark.parametrize("module", ["sglang", "sgl_kernel"])
def test_only_the_engine_imports_sglang(module: str) -> None:
    outside = {file for room, file in importers(module) if room != "engine"}
    assert outside == set()


# room -> rooms that it must not import
FORBIDDEN = {
    "engine": {"training", "scheduler", "demo"},
    "sidecar": {"engine", "training", "scheduler", "demo"},
    "store": {"engine", "sidecar", "training", "rollout", "scheduler", "demo", "drafter"},
    "drafter": {"engine", "sidecar", "store", "training", "rollout", "scheduler", "demo"},
    "training": {"engine", "sidecar", "scheduler", "demo"},
    "rollout": {"engine", "sidecar", "scheduler", "demo"},
    "scheduler": {"engine", "sidecar", "demo"},
    "dashboard": {"engine", "sidecar", "training", "scheduler", "demo", "drafter"},
}


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_a_room_stays_out_of_the_rooms_above_it(room: str) -> None:
    wrong = {
        f"{file} imports {other}"
        for other in FORBIDDEN[room]
        for importer, file in importers(f"aurora_sgl.{other}")
        if importer == room
    }
    assert wrong == set()


def test_in_the_engine_only_what_starts_processes_knows_the_store_and_the_sidecar() -> None:
    rooms = ["aurora_sgl.store", "aurora_sgl.rollout", "aurora_sgl.sidecar", "sqlalchemy"]
    inside = {file for room, file in importers(*rooms) if room == "engine"}
    assert inside <= {"aurora_sgl/engine/launch.py", "aurora_sgl/engine/sidecars.py"}


def test_nothing_imports_the_command_line() -> None:
    outside = {
        file for room, file in importers("aurora_sgl.cli") if room not in {"cli", "__main__"}
    }
    assert outside == set()


#: What may be named outside the store, in signatures.
SQL_TYPES = {"sqlalchemy.Engine", "sqlalchemy.Connection", "sqlalchemy.engine", "sqlalchemy.exc"}
SQL_TYPES |= {
    "sqlalchemy.make_url",
    "sqlalchemy.orm.Session",
    "sqlalchemy.Row",
    "sqlalchemy.orm",
    "sqlalchemy",
}


def test_sql_is_written_in_the_store_only() -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if room_of(path) != "store"
        for name in imports_of(path)
        if name.partition(".")[0] == "sqlalchemy"
        and name not in SQL_TYPES
        and not name.startswith(("sqlalchemy.exc.", "sqlalchemy.engine."))
    }
    assert wrong == set()


def test_the_shared_ground_stands_on_no_room() -> None:
    ground = {"config", "errors", "clock", "hashing", "wire", "artifacts", "priority"}
    rooms = set(FORBIDDEN) - {"dashboard"}
    wrong = {
        f"{file} imports {room}"
        for room in rooms
        for importer, file in importers(f"aurora_sgl.{room}")
        if importer in ground
    }
    assert wrong == set()
