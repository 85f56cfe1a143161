"""Files that a killed process left half written, and how they are told from those being written.

Whoever writes a file beside its place puts its mark into the name: the machine (since it started,
and the container) and the process. So on the same machine what a dead process left goes at once and
what a living one writes, however slowly, stays; of other machines only age can tell.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from aurora_sgl.hashing import sha256_bytes

#: Seconds after its last byte that a half-written file of another machine, or without a mark, goes.
OTHERS_SECONDS = 86_400.0

_MARKED = re.compile(r"(?:^|\.)([0-9a-f]{8})-(\d+)-(\d+)\.[^./]+\.(?:tmp|trace)$")
#: Names of earlier releases, and of ``atomic.beside``.
_UNMARKED = re.compile(r"\.tmp$|^tmp[^./]+\.trace$|^\..+\.[0-9a-f]{8}$")


def mark() -> str:
    """Of this process, for the name of a file that it writes: ``name.MARK.anything.tmp``."""
    pid = os.getpid()
    return f"{_machine()}-{pid}-{_started(pid)}"


def is_unfinished(name: str) -> bool:
    """Whether a file or folder of this name is not in its place yet."""
    return bool(_MARKED.search(name) or _UNMARKED.search(name))


def is_left(name: str, age: float) -> bool:
    """Whether nobody will finish it. ``age``: seconds since it was last written to."""
    marked = _MARKED.search(name)
    if marked is not None and marked[1] == _machine() and os.path.isdir("/proc/self"):
        return _started(int(marked[2])) != marked[3]
    return is_unfinished(name) and age > OTHERS_SECONDS


def sweep(folder: Path) -> int:
    """Delete what is left of unfinished files and folders anywhere below; how many."""
    count, now = 0, time.time()
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if not is_unfinished(name):
                continue
            path = Path(parent, name)
            with suppress(OSError):  # somebody else sweeps too
                if is_left(name, now - _written(path)):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                    count += 1
        folders[:] = [name for name in folders if not is_unfinished(name)]
    return count


def _written(path: Path) -> float:
    """When the newest of it was written."""
    return max(one.lstat().st_mtime for one in (path, *path.rglob("*")))


@cache
def _machine() -> str:
    """This machine since its start, and this container: process ids mean the same in it."""
    parts = [socket.gethostname()]
    for read in (_boot_id, _pid_space):
        with suppress(OSError):
            parts.append(read())
    return sha256_bytes("\n".join(parts).encode())[:8]


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _pid_space() -> str:
    return os.readlink("/proc/self/ns/pid")


def _started(pid: int) -> str:
    """When a process began, in ticks of the machine; "0": there is none of that id."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "0"
    return "0" if fields[0] == "Z" else fields[19]  # a zombie writes nothing any more
