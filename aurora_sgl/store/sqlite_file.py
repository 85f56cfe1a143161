"""A SQLite store as files: where they lie, and that they stay about as large as what they hold."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Engine

from aurora_sgl.errors import AuroraError
from aurora_sgl.private import whose

#: Bytes that the log of changes (``aurora.db-wal``) keeps between two of its rounds.
WAL_BYTES = 64 * 1024**2
#: It is looked after beyond so much more of that, since readers may hold it for a while.
_WAL_SLACK = 2
#: Seconds between two tries to empty it, and for how long one keeps writers waiting.
_WAL_PAUSE, _WAL_WAIT = 10.0, 0.5
#: Pages that one transaction gives back: some tens of milliseconds.
_PAGES = 1000
#: Seconds that others have between two of them.
_TURN_SECONDS = 0.12
_MOUNTS = Path("/proc/self/mountinfo")
#: File systems of another machine, or of the host of this one. SQLite's log needs memory that all
#: its users share, and locks that hold.
NETWORK = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "davfs", "fuse.ceph", "fuse.gcsfuse",
        "fuse.glusterfs", "fuse.grpcfuse", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs",
        "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs", "panfs", "prl_fs", "pvfs2", "smb3",
        "smbfs", "vboxsf", "virtiofs", "wekafs",
    }
)  # fmt: skip

log = logging.getLogger(__name__)
_warned: set[str] = set()
_emptied: dict[str, float] = {}  # path of a log: when it was last tried


class Mount(NamedTuple):
    """What a path lies on."""

    kind: str  # as the kernel calls it: ext4, nfs4
    is_read_only: bool


def mount_of(path: Path) -> Mount | None:
    """None where the kernel doesn't say (no Linux)."""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    whole, best, mount = path.resolve(), -1, None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 6 or not kinds:
            continue
        point = Path(_unescaped(fields[4]))
        depth = len(point.parts)
        # The last of several mounts over each other is the one that is there.
        if depth >= best and (point == whole or point in whole.parents):
            options = {*fields[5].split(","), *(kinds[2].split(",") if len(kinds) > 2 else ())}
            best, mount = depth, Mount(kinds[0], "ro" in options)
    return mount


def _unescaped(point: str) -> str:
    for code in ("\\040", "\\011", "\\012", "\\134"):
        point = point.replace(code, chr(int(code[1:], 8)))
    return point


def path_of(engine: Engine) -> Path | None:
    """The store's file; None when it is no file by a plain name."""
    name = engine.url.database
    if engine.dialect.name != "sqlite" or not name or name.startswith((":", "file:")):
        return None
    return Path(name)


def read_only(name: str | None) -> str:
    """Why nothing can be written there, in words; "" when it can, or nobody knows."""
    if not name or name.startswith((":", "file:")):
        return ""
    path = Path(name)
    mount = mount_of(path)
    if mount is not None and mount.is_read_only:
        return f"{path} lies on a read-only file system ({mount.kind})"
    folders = (each for each in path.absolute().parents if os.path.exists(each))
    for place in (next(folders), path):
        if os.path.exists(place) and not os.access(place, os.W_OK):
            return whose(place) or f"{place} can't be written by its owner"
    return ""


def network(engine: Engine) -> str:
    """A sentence about a store on a network file system; "" elsewhere."""
    path = path_of(engine)
    mount = None if path is None else mount_of(path)
    if mount is None or mount.kind not in NETWORK:
        return ""
    return (
        f"the store {path} lies on a network file system ({mount.kind}), where SQLite may lose or "
        "damage it; set AURORA_DATABASE_URL to a local disk, or to PostgreSQL"
    )


def warn_of_network(engine: Engine) -> None:
    """One line of the log a process, when the store lies where SQLite is not safe."""
    line = network(engine)
    if line and line not in _warned:
        _warned.add(line)
        log.warning("%s", line)


def bound_log(engine: Engine, limit: int = WAL_BYTES) -> None:
    """Empty the log of changes when it grew far beyond its size, as it does while readers take
    turns: SQLite by itself begins it anew only in a moment without any. Never raises."""
    path = path_of(engine)
    if path is None:
        return
    wal = f"{path}-wal"
    now = time.monotonic()
    try:
        is_small = Path(wal).stat().st_size <= _WAL_SLACK * limit
    except OSError:
        return
    if is_small or now - _emptied.get(wal, -_WAL_PAUSE) < _WAL_PAUSE:
        return
    _emptied[wal] = now
    try:
        with closing(sqlite3.connect(path, timeout=_WAL_WAIT, isolation_level=None)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error as error:
        log.debug("the log %s could not be emptied: %s", wal, error)


def shrink(engine: Engine, *, rewrite: bool = False) -> int:
    """Give the room of deleted rows back to the disk; the bytes by which the file shrank.

    Free pages go in short transactions, between which others write. A file of a release before
    this one can't do that: it is left as it is, unless ``rewrite`` copies it into a new one, while
    which nobody writes. Raises ``AuroraError`` when there is no room for that copy. PostgreSQL: 0.
    """
    path = path_of(engine)
    if path is None:
        return 0
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as db:
        before = _bytes(db)
        if db.execute("PRAGMA auto_vacuum").fetchone()[0] == 2:
            _give_back(db)
        elif rewrite:
            _require_room(path)
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")
            db.execute("VACUUM")
        freed = before - _bytes(db)
        db.execute("PRAGMA busy_timeout=1000")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()  # the file itself is cut by this
    return max(0, freed)


def _give_back(db: sqlite3.Connection) -> None:
    free, pages = _free(db), _PAGES
    while free:
        begun = time.monotonic()
        # A step of it gives back one page, and execute() takes one step only.
        db.executescript(f"PRAGMA incremental_vacuum({pages})")
        seconds = time.monotonic() - begun
        left = _free(db)
        if left >= free:  # somebody else deletes as fast
            return
        free = left
        pages = max(_PAGES // 20, pages // 2) if seconds > _TURN_SECONDS else pages
        # A writer's turn: he may look only every tenth of a second whether it has come.
        time.sleep(max(_TURN_SECONDS, 2 * seconds))


def _bytes(db: sqlite3.Connection) -> int:
    pages, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size")
    )
    return int(pages) * int(size)


def _free(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA freelist_count").fetchone()[0])


def _require_room(path: Path) -> None:
    needed, free = 2 * path.stat().st_size, shutil.disk_usage(path.parent).free
    if free < needed:
        raise AuroraError(
            f"rewriting {path} needs {needed / 1024**2:.0f} MiB beside it, {free / 1024**2:.0f} "
            "are free"
        )
