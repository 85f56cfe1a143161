"""INSERT ... ON CONFLICT, which SQLite and PostgreSQL spell alike and SQLAlchemy keeps apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from aurora_sgl.store.models import Base


def insert(connection: Connection, model: type[Base]) -> postgresql.Insert | sqlite.Insert:
    if connection.dialect.name == "sqlite":
        return sqlite.insert(model.__table__)  # type: ignore[arg-type]
    return postgresql.insert(model.__table__)  # type: ignore[arg-type]


def storable(value: Any) -> Any:
    """A value from a client, without what PostgreSQL refuses in text and JSON: NUL characters
    and numbers that are not finite. Otherwise one odd ``rid`` would stop the ingest for good."""
    if isinstance(value, str):
        return value.replace("\x00", "")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {storable(str(name)): storable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    return value


def insert_missing(
    connection: Connection,
    model: type[Base],
    rows: Sequence[Mapping[str, Any]],
    key: Sequence[str],
) -> None:
    """Insert the rows whose key is not there yet."""
    if rows:
        connection.execute(
            insert(connection, model).on_conflict_do_nothing(index_elements=list(key)), list(rows)
        )


def upsert(
    connection: Connection,
    model: type[Base],
    rows: Sequence[Mapping[str, Any]],
    key: Sequence[str],
    change: Iterable[str],
) -> None:
    """Insert rows; where the key is there, set the columns ``change`` to the new values."""
    if rows:
        statement = insert(connection, model)
        new = statement.excluded
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=list(key), set_={column: new[column] for column in change}
            ),
            list(rows),
        )
