"""What was committed is on the disk before anybody relies on it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, event

from aurora_sgl.store.connection import is_sqlite


def commit_to_disk(engine: Engine) -> None:
    """From now on a commit on this engine returns once it is on the disk.

    SQLite else writes its log and leaves the disk to the next checkpoint: after a power cut the
    cursor of a spool would stand behind rows that are gone. It costs one fsync a commit.
    PostgreSQL does so by itself; where ``synchronous_commit`` is off, the watermark shows what a
    crash took back.
    """
    if is_sqlite(engine):
        event.listen(engine, "checkout", _full)


def _full(connection: Any, *_: Any) -> None:
    connection.execute("PRAGMA synchronous=FULL")
