"""The imports between our files: circles, and arrows that run back up the rooms.

    python tools/import_graph.py

Prints both and exits with 1 where there is one. Imports inside functions and those for types alone
count too. ``ROOMS`` is the order: a file imports from its own room and
from those before it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: From the ground up; what stands on one line does not know each other.
ROOMS = (
    (
        "atomic",
        "batch_sizes",
        "clock",
        "compact_rows",
        "environment",
        "errors",
        "hashing",
        "intervals",
        "logs",
        "machine",
        "memory",
        "private",
        "trace_ring",
        "wire",
    ),
    (
        "client_text",
        "compat",
        "console",
        "draft_shape",
        "health",
        "limits",
        "litter",
        "processes",
        "split_place",
        "step_cost",
        "trace_format",
        "trace_room",
    ),
    ("config",),
    ("artifacts",),
    ("drafter", "store"),
    ("sequences",),
    ("rollout",),
    ("evaluation", "scheduler"),
    ("sidecar", "training"),
    ("engine", "erasure"),
    ("backup",),
    ("serving",),
    ("demo",),
    ("doctor",),
    ("cli",),
    ("dashboard", "migrations"),
    ("benchmarks",),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def files() -> list[Path]:
    folders = ("aurora_sgl", "dashboard", "migrations", "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """``engine``, ``store``, ... or, for a file that stands by itself, its name."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "aurora_sgl" else first


@cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Every name that a file imports, as a full dotted name, those inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += (f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(names)


def graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    modules = {module_of(path): path for path in files()}
    arrows: dict[str, set[str]] = {}
    for module, path in modules.items():
        arrows[module] = set()
        for name in imports_of(path):
            for candidate in (name, name.rpartition(".")[0]):
                if candidate in modules:
                    arrows[module].add(candidate)
                    break
        arrows[module].discard(module)
    return arrows


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan, SIAM J. Comput. 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    components: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        path.append(module)
        for other in sorted(arrows.get(module, ())):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in path:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            index = path.index(module)
            components.append(sorted(path[index:]))
            del path[index:]

    for module in sorted(arrows):
        if module not in order:
            visit(module)
    return [component for component in components if len(component) > 1]


def arrows_up(arrows: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Imports from a room that stands higher, or beside."""
    return [
        (module, other)
        for module, others in sorted(arrows.items())
        for other in sorted(others)
        if room_of(module) != room_of(other)
        and room_of(other)
        and RANK.get(room_of(module), -1) <= RANK.get(room_of(other), len(ROOMS))
        and room_of(module)
    ]


def main() -> int:
    arrows = graph()
    rings, up = circles(arrows), arrows_up(arrows)
    print(f"{len(arrows)} files, {sum(map(len, arrows.values()))} arrows between them")
    print(f"circles: {len(rings)}")
    for ring in rings:
        print("  " + ", ".join(ring))
    print(f"arrows that run back up: {len(up)}")
    for module, other in up:
        print(f"  {module} imports {other}")
    return 1 if rings or up else 0


if __name__ == "__main__":
    sys.exit(main())
