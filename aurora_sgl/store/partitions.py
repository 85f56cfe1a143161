"""Day partitions of ``acceptance_event`` in PostgreSQL. SQLite has none: every function is a no-op.

Times outside of the days that are made (a stray clock) go to the default partition. Days are in
UTC; the partition of 24 November 2026 is ``acceptance_event_p20261124``.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Connection, Engine, text

from aurora_sgl.clock import utc_now
from aurora_sgl.store.connection import is_sqlite, reading

PREFIX = "acceptance_event_p"
DAYS_AHEAD = 2
#: Days further back than this are stray times, not a spool that waited.
DAYS_BACK = 60
_LOCK = 0x4175726F7262


def name_of(day: date) -> str:
    return f"{PREFIX}{day:%Y%m%d}"


def day_of(name: str) -> date:
    return datetime.strptime(name.removeprefix(PREFIX), "%Y%m%d").date()


def start_of(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def partitions(connection: Connection) -> list[date]:
    """The days that have a partition, in order."""
    names = connection.scalars(
        text(
            "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
            "WHERE i.inhparent = 'acceptance_event'::regclass AND c.relname LIKE :like"
        ),
        {"like": PREFIX.replace("_", r"\_") + "%"},
    )
    return sorted(day_of(name) for name in names)


def ensure_partitions(engine: Engine, times: Iterable[datetime] = ()) -> list[date]:
    """Make the partitions of these times, of today and of the next days; returns the new ones.

    Its own transaction, before the insert: a table that is attached while another transaction
    holds rows of the default partition would wait for it.
    """
    if is_sqlite(engine):
        return []
    today = utc_now().astimezone(UTC).date()
    first, last = today - timedelta(days=DAYS_BACK), today + timedelta(days=DAYS_AHEAD)
    wanted = {moment.astimezone(UTC).date() for moment in times}
    wanted = {day for day in wanted if first <= day <= last}
    wanted |= {today + timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)}
    with reading(engine) as connection:
        if wanted <= set(partitions(connection)):
            return []
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        missing = sorted(wanted - set(partitions(connection)))
        for day in missing:
            _make(connection, day)
    return missing


def _make(connection: Connection, day: date) -> None:
    """ATTACH locks out no reader or writer of the other partitions (CREATE ... PARTITION OF
    would). Rows of that day that waited in the default partition move in first."""
    name, begin, end = name_of(day), start_of(day), start_of(day + timedelta(days=1))
    bounds = {"begin": begin, "end": end}
    connection.execute(text(f"CREATE TABLE {name} (LIKE acceptance_event INCLUDING ALL)"))
    connection.execute(
        text(
            f"WITH moved AS (DELETE FROM acceptance_event_default "
            f"WHERE at >= :begin AND at < :end RETURNING *) INSERT INTO {name} SELECT * FROM moved"
        ),
        bounds,
    )
    connection.execute(
        text(
            f"ALTER TABLE acceptance_event ATTACH PARTITION {name} "
            f"FOR VALUES FROM ('{begin.isoformat()}') TO ('{end.isoformat()}')"
        )
    )
