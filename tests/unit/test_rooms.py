"""The imports keep to the rooms of the house (the list below is the rule; see CONTRIBUTING.md)."""

from __future__ import annotations

import pytest

from tools import import_graph
from tools.import_graph import ROOT, imports_of, module_of, room_of

FILES = [path for path in import_graph.files() if path.parts[-1] != "conftest.py"]


def importers(*modules: str) -> set[tuple[str, str]]:
    """Pairs (room, file) that import one of the modules or something in them."""
    found = set()
    for path in FILES:
        for name in imports_of(path):
            if any(name == module or name.startswith(f"{module}.") for module in modules):
                room = room_of(module_of(path))
                found.add((room, str(path.relative_to(ROOT))))
    return found


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert import_graph.circles(import_graph.graph()) == []


def test_no_room_imports_one_above_or_beside_it() -> None:
    assert import_graph.arrows_up(import_graph.graph()) == []


def test_a_circle_and_an_arrow_up_are_seen() -> None:
    arrows = {
        "aurora_sgl.wire": {"aurora_sgl.engine.agent"},
        "aurora_sgl.engine.agent": {"aurora_sgl.wire"},
    }
    assert import_graph.circles(arrows) == [["aurora_sgl.engine.agent", "aurora_sgl.wire"]]
    assert import_graph.arrows_up(arrows) == [("aurora_sgl.wire", "aurora_sgl.engine.agent")]
    assert import_graph.arrows_up({"aurora_sgl.store.a": {"aurora_sgl.no_such_room"}})


def test_the_reader_of_imports_sees_those_inside_functions_too() -> None:
    assert ("cli", "aurora_sgl/cli/__init__.py") in importers("aurora_sgl.errors")
    assert ("cli", "aurora_sgl/cli/db.py") in importers("aurora_sgl.doctor")
    assert importers("aurora_sgl.no_such_room") == set()


@pytest.mark.parametrize("module", ["sglang", "sgl_kernel"])
def test_only_the_engine_imports_sglang(module: str) -> None:
    outside = {file for room, file in importers(module) if room not in {"engine", "benchmarks"}}
    assert outside == set()


# room -> rooms that it must not import
FORBIDDEN = {
    "engine": {"sequences", "evaluation", "training", "rollout", "scheduler", "demo"},
    "sidecar": {"engine", "evaluation", "training", "scheduler", "demo"},
    "store": {"engine", "sidecar", "training", "rollout", "scheduler", "demo", "drafter"},
    "drafter": {"engine", "sidecar", "store", "training", "rollout", "scheduler", "demo"},
    "sequences": {"engine", "sidecar", "evaluation", "training", "rollout", "scheduler", "demo"},
    "evaluation": {"engine", "sidecar", "training", "scheduler", "demo"},
    "training": {"engine", "sidecar", "scheduler", "demo"},
    "rollout": {"engine", "sidecar", "evaluation", "training", "scheduler", "demo"},
    "scheduler": {"engine", "sidecar", "training", "demo"},
    "processes": {"engine", "sidecar", "store", "training", "rollout", "scheduler", "demo"},
    "dashboard": {"engine", "sidecar", "training", "scheduler", "demo", "drafter"},
    "migrations": {"engine", "sidecar", "training", "rollout", "scheduler", "demo", "drafter"},
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
        if room_of(module_of(path)) not in {"store", "migrations", "benchmarks"}
        for name in imports_of(path)
        if name.partition(".")[0] == "sqlalchemy"
        and name not in SQL_TYPES
        and not name.startswith(("sqlalchemy.exc.", "sqlalchemy.engine."))
    }
    assert wrong == set()


def test_the_shared_ground_stands_on_no_room() -> None:
    ground = {"config", "errors", "clock", "hashing", "wire", "artifacts", "intervals"}
    rooms = set(FORBIDDEN) - {"dashboard", "migrations"}
    wrong = {
        f"{file} imports {room}"
        for room in rooms
        for importer, file in importers(f"aurora_sgl.{room}")
        if importer in ground
    }
    assert wrong == set()
