"""Whether somebody sits on a lock that others of the store need."""

from __future__ import annotations

import sqlite3

from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError

from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.faults import is_away
from aurora_sgl.store.models import DeploymentGroup


def is_free(engine: Engine, group_id: int, seconds: float = 0.2) -> bool:
    """Whether a writer of this group's rows gets its turn within so many seconds. Writes nothing.

    SQLite: the one write lock of the database. PostgreSQL: the row of the group.
    """
    if is_sqlite(engine):
        return _sqlite_is_free(str(engine.url.database), seconds)
    try:
        with engine.connect() as connection:
            connection.execute(text(f"SET LOCAL lock_timeout = {int(1000 * seconds)}"))
            row = select(DeploymentGroup.id).where(DeploymentGroup.id == group_id)
            connection.execute(row.with_for_update())
            connection.rollback()
    except DBAPIError as error:
        if not is_away(error):
            raise
        return False
    return True


def _sqlite_is_free(path: str, seconds: float) -> bool:
    connection = sqlite3.connect(path, timeout=seconds, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        if not is_away(error):
            raise
        return False
    finally:
        connection.close()
    return True
