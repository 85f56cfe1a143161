"""How much memory a process may still take: of the machine, and of the container that it is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: (limit, used, key of memory.stat for file pages that the kernel takes back first)
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available() -> int:
    """Bytes: what the machine has free or can free, or less where a cgroup allows less."""
    import psutil

    return min([int(psutil.virtual_memory().available), *cgroup_rooms()])


def cgroup_rooms(proc: Path = _PROC, root: Path = _CGROUP) -> Iterator[int]:
    """Bytes that each memory cgroup around this process leaves it; none where nothing limits."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _rooms(root, path, *_V2)
        elif "memory" in controllers.split(","):
            yield from _rooms(root / "memory", path, *_V1)


def _rooms(mount: Path, path: str, limit: str, used: str, cache: str) -> Iterator[int]:
    """In a container the path is often of the host: then the mount itself is our group."""
    here = Path(path.lstrip("/"))
    for folder in {mount / one for one in (here, *here.parents)} | {mount}:
        try:
            most = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
        except (OSError, ValueError):  # no such folder, or "max"
            continue
        yield max(most - taken + _cached(folder / "memory.stat", cache), 0)


def _cached(stat: Path, key: str) -> int:
    try:
        rows = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(row[1]) for row in rows if row[0] == key), 0)
