"""Reads which names SGLang releases have, out of their wheels, without importing them.

    python tools/upstream_names.py            # one line a release

Wheels are looked for in the folder AURORA_WHEELS, if set, and in the cache; one that is in neither
is downloaded with pip (about 30 MB, without its dependencies).
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

RELEASES = tuple(f"0.5.{patch}" for patch in range(17, 24))
PLATFORM = ("--platform", "manylinux_2_34_x86_64", "--python-version", "3.11")


def cache_folder() -> Path:
    """Kept between runs and between clones."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "aurora-sgl" / "wheels"


def wheel_of(release: str) -> Path:
    """The wheel of an SGLang release; downloaded when it is not there.

    Raises ``RuntimeError`` with pip's last line when it can't be downloaded.
    """
    given = os.environ.get("AURORA_WHEELS")
    for folder in [*([Path(given)] if given else []), cache_folder()]:
        found = sorted(folder.glob(f"sglang-{release}-*.whl"))
        if found:
            return found[0]
    into = cache_folder()
    into.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    run = subprocess.run(
        [*command, *PLATFORM, "-d", str(into), f"sglang=={release}"], capture_output=True, text=True
    )
    if run.returncode != 0:
        raise RuntimeError(
            f"sglang {release}: {(run.stderr.strip() or 'pip failed').splitlines()[-1]}"
        )
    return wheel_of(release)


class Release:
    """The Python files of one release, parsed when they are asked for."""

    def __init__(self, root: Path | zipfile.Path) -> None:
        self.root = root  # holds the folder sglang
        self.trees: dict[str, ast.Module | None] = {}

    @classmethod
    def of_wheel(cls, wheel: Path) -> Release:
        return cls(zipfile.Path(zipfile.ZipFile(wheel)))

    @classmethod
    def installed(cls) -> Release:
        """The release in this environment."""
        spec = importlib.util.find_spec("sglang")
        assert spec is not None and spec.origin is not None, "sglang is not installed"
        return cls(Path(spec.origin).parent.parent)

    def tree(self, module: str) -> ast.Module | None:
        if module not in self.trees:
            base = module.replace(".", "/")
            paths = [self.root / f"{base}.py", self.root / f"{base}/__init__.py"]
            found = next((path for path in paths if path.exists()), None)
            self.trees[module] = ast.parse(found.read_bytes()) if found else None
        return self.trees[module]

    def has(self, name: str) -> bool:
        """Whether ``package.module.Class.member`` exists. Members of base classes count, and so do
        names that a module imports from another one."""
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            tree = self.tree(".".join(parts[:cut]))
            if tree is not None:
                return self._resolve(".".join(parts[:cut]), parts[cut:], depth=0)
        return False

    def parameters(self, name: str) -> ast.arguments | None:
        """Of the function or method that a dotted name leads to; None where it can't be read."""
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:cut])
            if self.tree(module) is None:
                continue
            found = self._find(module, parts[cut], 0)
            for member in parts[cut + 1 :]:
                home, node = found or (module, None)
                inside = isinstance(node, ast.ClassDef)
                found = self._member(home, node, member, 0) if inside else None
            node = found[1] if found else None
            return node.args if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None
        return None

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if not self.has(name)]

    def _resolve(self, module: str, path: list[str], depth: int) -> bool:
        if not path:
            return self.tree(module) is not None
        found = self._find(module, path[0], depth)
        if found is None:
            return self._resolve(f"{module}.{path[0]}", path[1:], depth)  # a module below
        home, node = found
        if len(path) == 1:
            return True
        if len(path) > 2 or not isinstance(node, ast.ClassDef):
            return False
        return self._member(home, node, path[1], depth) is not None

    def _member(
        self, module: str, node: ast.ClassDef, member: str, depth: int
    ) -> tuple[str, ast.AST] | None:
        """Where a class has a member: in itself, as a field that its methods set, or in a base."""
        if depth > 8:
            return None
        own = [each for name, each in bindings(node.body) if name == member]
        if own or member in set_on_self(node):
            return module, (own[-1] if own else node)
        for base in node.bases:
            name = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
            found = self._find(module, name, depth + 1, but=node)
            if found is None or not isinstance(found[1], ast.ClassDef):
                continue
            inherited = self._member(found[0], found[1], member, depth + 1)
            if inherited is not None:
                return inherited
        return None

    def _find(
        self, module: str, name: str, depth: int, but: ast.AST | None = None
    ) -> tuple[str, ast.AST] | None:
        """Where a name of a module is defined: follows ``from sglang.x import y``. A definition
        goes before an import of the same name; ``but`` is a class whose base may have its name."""
        tree = self.tree(module)
        if tree is None or depth > 8:
            return None
        bound = [node for other, node in bindings(tree.body) if other == name and node is not but]
        bound.sort(key=lambda node: isinstance(node, ast.ImportFrom))
        for node in bound:
            if not isinstance(node, ast.ImportFrom):
                return module, node
            if (node.module or "").startswith("sglang"):
                original = next(a.name for a in node.names if (a.asname or a.name) == name)
                found = self._find(str(node.module), original, depth + 1)
                if found is not None:
                    return found
        return None


def bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Names that statements bind, those inside ``if``, ``try`` and ``with`` too."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((t.id, node) for t in targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            for part in ("body", "orelse", "finalbody"):
                yield from bindings(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from bindings(handler.body)


def set_on_self(node: ast.ClassDef) -> set[str]:
    """Attributes that methods of a class set on ``self``."""
    return {
        target.attr
        for statement in ast.walk(node)
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in (
            statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        )
        if isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }


def main() -> int:
    from aurora_sgl.engine.plugin import UPSTREAM

    for release in RELEASES:
        missing = Release.of_wheel(wheel_of(release)).missing(UPSTREAM)
        print(f"sglang {release}: {'supported' if not missing else 'lacks ' + ', '.join(missing)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
