"""Deleted rows leave no bytes behind: SQLite's free pages and its log, PostgreSQL's dead rows."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.faults import in_words
from aurora_sgl.store.models import Base


def overwrite_what_goes(connection: Connection) -> None:
    """SQLite: rows that are deleted on this connection are overwritten with zeros."""
    if is_sqlite(connection):
        connection.exec_driver_sql("PRAGMA secure_delete = ON")


def compact(engine: Engine, seconds: float) -> str:
    """Write the database anew without what was deleted, and empty SQLite's log. What is left to
    do, in words, after trying for so long; "" when nothing is.

    PostgreSQL only forgets its dead rows (VACUUM): their bytes stay in its files until they are
    used again.
    """
    try:
        return _compact_sqlite(engine, seconds) if is_sqlite(engine) else _vacuum(engine)
    except DBAPIError as error:
        return f"the database could not be compacted: {in_words(error)}"
    except Exception as error:
        if type(error).__module__ != "sqlite3":
            raise
        return f"the database could not be compacted: {in_words(error)}"


def _compact_sqlite(engine: Engine, seconds: float) -> str:
    raw = engine.raw_connection()
    try:
        driver: Any = raw.driver_connection  # sqlite3.Connection, outside of a transaction
        driver.execute("VACUUM")  # free pages, and what lay beside rows in pages that changed
        deadline = time.monotonic() + seconds
        while True:
            busy, _, _ = driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if not busy:
                return ""
            if time.monotonic() > deadline:
                return "somebody reads the database since before the purge, its log is not empty"
            time.sleep(0.1)
    finally:
        raw.close()


def _vacuum(engine: Engine) -> str:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for table in Base.metadata.sorted_tables:
            connection.execute(text(f"VACUUM {table.name}"))
    return ""
