"""INSERT ... ON CONFLICT, which SQLite and PostgreSQL spell alike and SQLAlchemy keeps apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Connection, case
from sqlalchemy.dialects import postgresql, sqlite

from aurora_sgl.store.models import Base


def insert(connection: Connection, model: type[Base]) -> postgresql.Insert | sqlite.Insert:
    return _insert(connection.dialect.name, model)


def _insert(dialect: str, model: type[Base]) -> postgresql.Insert | sqlite.Insert:
    if dialect == "sqlite":
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
        connection.execute(_statement(connection.dialect.name, model, tuple(key), ()), list(rows))


def upsert(
    connection: Connection,
    model: type[Base],
    rows: Sequence[Mapping[str, Any]],
    key: Sequence[str],
    change: Iterable[str],
    fill: Iterable[str] = (),
) -> None:
    """Insert rows; where the key is there, set the columns ``change`` to the new values, and the
    texts ``fill`` where they are empty."""
    if rows:
        statement = _statement(
            connection.dialect.name, model, tuple(key), tuple(change), tuple(fill)
        )
        connection.execute(statement, list(rows))


@cache  # building one takes longer than running it, and ingest runs five a batch
def _statement(
    dialect: str,
    model: type[Base],
    key: tuple[str, ...],
    change: tuple[str, ...],
    fill: tuple[str, ...] = (),
) -> postgresql.Insert | sqlite.Insert:
    statement = _insert(dialect, model)
    if not change:
        return statement.on_conflict_do_nothing(index_elements=list(key))
    new = statement.excluded
    old = model.__table__.c
    values: dict[str, Any] = {column: new[column] for column in change}
    values |= {column: case((old[column] == "", new[column]), else_=old[column]) for column in fill}
    return statement.on_conflict_do_update(index_elements=list(key), set_=values)
