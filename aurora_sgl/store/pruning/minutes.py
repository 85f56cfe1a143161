"""Roll-ups: after some weeks the rows of an hour's minutes become one, which loses no sum.

Every column of ``acceptance_minute`` that is not in its key is a sum, or a list of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, and_, delete, extract, func, insert, select
from sqlalchemy.sql.elements import ColumnElement

from aurora_sgl.store.connection import reading
from aurora_sgl.store.models import AcceptanceMinute, Server, SpoolWatermark
from aurora_sgl.store.pruning.pace import PrunePace
from aurora_sgl.store.rollup import add_lists

HOUR = timedelta(hours=1)
#: A late record may still add a minute to an hour that was summed up so long ago.
_LATE = timedelta(days=7)

_TABLE = AcceptanceMinute.__table__
KEY = [column.name for column in _TABLE.primary_key.columns]  # type: ignore[attr-defined]


class PrunedMinutes(NamedTuple):
    """Rows of minutes that went into the first row of their hour, and rows of old hours that
    went."""

    minutes: int = 0
    hours: int = 0


def merged(rows: Sequence[Mapping[str, Any]], hour: datetime) -> list[dict[str, Any]]:
    """Rows of one hour as the rows of that hour: summed where all but the minute agree."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        new = {**row, "bucket_start": hour}
        key = tuple(new[name] for name in KEY)
        old = sums.setdefault(key, new)
        if old is new:
            continue
        for name, value in new.items():
            if name not in KEY:
                old[name] = (
                    add_lists(old[name], value) if isinstance(value, list) else old[name] + value
                )
    return list(sums.values())


def count_old(
    engine: Engine, group_id: int, minutes_before: datetime, hours_before: datetime
) -> PrunedMinutes:
    """What :func:`prune_minutes` would do."""
    m = AcceptanceMinute
    query = select(func.count()).select_from(m).where(_is_of(group_id))
    with reading(engine) as connection:
        old = connection.scalar(query.where(m.bucket_start < hours_before)) or 0
        fine = query.where(
            m.bucket_start >= hours_before, m.bucket_start < minutes_before, is_within_an_hour()
        )
        return PrunedMinutes(connection.scalar(fine) or 0, old)


def prune_minutes(
    engine: Engine,
    pace: PrunePace,
    group_id: int,
    *,
    minutes_before: datetime,
    hours_before: datetime,
    since: datetime | None = None,
) -> PrunedMinutes:
    """Delete rows from before ``hours_before``, and sum those from before ``minutes_before`` up to
    hours. ``since``: up to when that was done before."""
    old = pace.all_of(engine, lambda connection, _: _delete(connection, group_id, hours_before))
    minutes = 0
    position = max(hours_before, since - _LATE) if since is not None else hours_before
    while (hour := _next_hour(engine, group_id, position, minutes_before)) is not None:
        for server_id in _servers(engine, group_id, hour):
            minutes += pace.once(engine, partial(_coarsen, server_id=server_id, hour=hour))
        position = hour + HOUR
    return PrunedMinutes(minutes, old)


def _is_of(group_id: int) -> ColumnElement[bool]:
    return AcceptanceMinute.server_id.in_(select(Server.id).where(Server.group_id == group_id))


def is_within_an_hour() -> ColumnElement[bool]:
    """A minute that is not the first of its hour; the first may be an hour's row."""
    return extract("minute", AcceptanceMinute.bucket_start) != 0


def _delete(connection: Connection, group_id: int, cutoff: datetime) -> int:
    """One hour of one chunk: the first that is there."""
    m = AcceptanceMinute
    first = connection.scalar(
        select(func.min(m.bucket_start)).where(m.bucket_start < cutoff, _is_of(group_id))
    )
    if first is None:
        return 0
    until = min(first + HOUR, cutoff)
    gone = delete(m).where(m.bucket_start >= first, m.bucket_start < until, _is_of(group_id))
    return connection.execute(gone).rowcount


def _next_hour(engine: Engine, group_id: int, since: datetime, until: datetime) -> datetime | None:
    """The first hour from ``since`` on that has a row of a minute."""
    m = AcceptanceMinute
    query = select(func.min(m.bucket_start)).where(
        m.bucket_start >= since, m.bucket_start < until, is_within_an_hour(), _is_of(group_id)
    )
    with reading(engine) as connection:
        first = connection.scalar(query)
    return (
        None if first is None else first.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    )


def _servers(engine: Engine, group_id: int, hour: datetime) -> list[int]:
    m = AcceptanceMinute
    query = (
        select(m.server_id)
        .distinct()
        .where(m.bucket_start >= hour, m.bucket_start < hour + HOUR, _is_of(group_id))
    )
    with reading(engine) as connection:
        return list(connection.scalars(query))


def _coarsen(connection: Connection, _: int, *, server_id: int, hour: datetime) -> int:
    return coarsen(connection, server_id, hour)


def coarsen(connection: Connection, server_id: int, hour: datetime) -> int:
    """Sum up one hour of one server; how many rows of minutes it had. Its watermark is locked as
    for an ingest, so that a late record is counted before or after, never in between."""
    m = AcceptanceMinute
    mark = select(SpoolWatermark.last_seq).where(SpoolWatermark.server_id == server_id)
    connection.execute(mark.with_for_update())
    here = and_(m.server_id == server_id, m.bucket_start >= hour, m.bucket_start < hour + HOUR)
    rows = [dict(row) for row in connection.execute(select(_TABLE).where(here)).mappings()]
    minutes = sum(bool(row["bucket_start"] != hour) for row in rows)
    if minutes:
        connection.execute(delete(m).where(here))
        connection.execute(insert(m), merged(rows, hour))
    return minutes
