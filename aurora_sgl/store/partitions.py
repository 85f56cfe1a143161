"""Day partitions of ``acceptance_event`` in PostgreSQL. SQLite has none: every function is a no-op.

Times outside of the days that are made (a stray clock) go to the default partition. Days are in
UTC; the partition of 24 November 2026 is ``acceptance_event_p20261124``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from aurora_sgl.clock import utc_now
from aurora_sgl.store.connection import is_sqlite, reading
from aurora_sgl.store.faults import Kind, fault_of, in_words, may_not
from aurora_sgl.store.options import SECONDS

PREFIX = "acceptance_event_p"
DAYS_AHEAD = 2
#: The same by `aurora-sgl db upgrade`, which a role that owns the tables may run once a day where
#: the one that writes does not own them.
BY_HAND = 7
#: Days further back than this are stray times, not a spool that waited.
DAYS_BACK = 60
_LOCK = 0x4175726F7262
#: Milliseconds for which a new partition queues for the default one, and then for which each of
#: its two statements may hold it: together less than a second, by which others wait.
_QUEUE_MS, _HOLD_MS = 250, 700
#: Rows of a day that are moved out of the default partition.
_FEW = 10_000
#: Bytes of a default partition that takes a moment to read.
_LARGE = 64 * 1024**2
#: Seconds until the next try after a lock, and after what only a person changes.
_RETRY_SECONDS, _SETTLED_SECONDS = 30.0, 3600.0

NOTHING: Mapping[str, Any] = MappingProxyType({})
log = logging.getLogger(__name__)
_later: dict[tuple[str, date], float] = {}  # store and day: when to try again


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


def ensure_partitions(
    engine: Engine,
    times: Iterable[datetime] = (),
    *,
    ahead: int = DAYS_AHEAD,
    at_once: bool = False,
) -> list[date]:
    """Make the partitions of these times, of today and of the next days; returns the new ones.

    Nobody waits for it longer than a second. A day that can't have its partition now, because
    somebody (a backup, a long read) holds the default one, or because this role may not make any,
    is tried again later; its events go to the default partition. ``at_once``: days that are to be
    tried again later too; raises ``DBAPIError`` for a role that may not make any.
    """
    if is_sqlite(engine):
        return []
    today = utc_now().astimezone(UTC).date()
    first, last = today - timedelta(days=DAYS_BACK), today + timedelta(days=DAYS_AHEAD)
    wanted = {moment.astimezone(UTC).date() for moment in times}
    wanted = {day for day in wanted if first <= day <= last}
    wanted |= {today + timedelta(days=day) for day in range(ahead + 1)}
    with reading(engine) as connection:
        missing = wanted - set(partitions(connection))
    url = engine.url.render_as_string()
    now = time.monotonic()
    due = [day for day in sorted(missing) if at_once or now >= _later.get((url, day), now)]
    new = []
    for day in due:
        try:
            if _make(engine, day, at_once and day > today):
                new.append(day)
            else:
                _later[url, day] = now + _SETTLED_SECONDS
        except DBAPIError as error:
            if (seconds := _patience(error)) is None or (at_once and may_not(error)):
                raise
            _put_off(url, due[due.index(day) :], now + seconds, error)
            break
    return new


def _patience(error: DBAPIError) -> float | None:
    """Seconds until the next try; None: the store is away, or it is a mistake of ours."""
    fault = fault_of(error)
    if fault is not None and fault.kind is Kind.BUSY:
        return _RETRY_SECONDS
    return _SETTLED_SECONDS if may_not(error) else None


def _put_off(url: str, days: Iterable[date], until: float, error: DBAPIError) -> None:
    for day in days:
        if (url, day) not in _later:
            log.warning(
                "no partition for %s yet (%s); its events go to the default one", day,
                in_words(error),
            )  # fmt: skip
        _later[url, day] = until


def _make(engine: Engine, day: date, may_take_long: bool) -> bool:
    """Whether the day has its partition now, and had none before.

    ATTACH locks out no reader or writer of the other partitions (CREATE ... PARTITION OF would),
    but of the default one, which is locked first, for a quarter of a second at most: whoever comes
    later waits behind that. Then it reads the default partition, to see that no row of the day is
    left there; a large one is read beforehand, while others use it. Rows of the day that are few
    move in; a day with many stays where it is, since moving them would keep others waiting.
    """
    name, begin, end = name_of(day), start_of(day), start_of(day + timedelta(days=1))
    bounds = {"begin": begin, "end": end}
    of_day = "FROM acceptance_event_default WHERE at >= :begin AND at < :end"
    with reading(engine) as connection:
        size = connection.scalar(text("SELECT pg_relation_size('acceptance_event_default')"))
        few = text(f"SELECT count(*) FROM (SELECT 1 {of_day} LIMIT {_FEW + 1}) AS few")
        waiting = connection.scalar(few, bounds)
    is_large = int(size or 0) > _LARGE
    if (waiting or 0) > _FEW or (is_large and (waiting or not may_take_long)):
        return False
    if is_large:
        _promise_none(engine, name, begin, end)
    with engine.begin() as connection:

        def do(statement: str, values: Mapping[str, Any] = NOTHING) -> None:
            connection.execute(text(statement), values)

        do("SET LOCAL lock_timeout = 1000")
        do("SELECT pg_advisory_xact_lock(:key)", {"key": _LOCK})  # who makes others
        if day in partitions(connection):
            return False
        do(f"CREATE TABLE {name} (LIKE acceptance_event INCLUDING ALL)")
        do(f"SET LOCAL lock_timeout = {_QUEUE_MS}")
        do(f"SET LOCAL statement_timeout = {_HOLD_MS}")
        do("LOCK TABLE acceptance_event_default IN ACCESS EXCLUSIVE MODE")
        do(f"WITH moved AS (DELETE {of_day} RETURNING *) INSERT INTO {name} SELECT * FROM moved",
           bounds)  # fmt: skip
        do(
            f"ALTER TABLE acceptance_event ATTACH PARTITION {name} "
            f"FOR VALUES FROM ('{begin.isoformat()}') TO ('{end.isoformat()}')"
        )
        if is_large:
            do(f"ALTER TABLE acceptance_event_default DROP CONSTRAINT {name}_elsewhere")
    return True


def _promise_none(engine: Engine, name: str, begin: datetime, end: datetime) -> None:
    """A rule that the default partition has no row of a day, proven while others read and write.
    Of a day to come: a row of it would have to wait (see ``faults``)."""
    rule = f"{name}_elsewhere"
    alter = "ALTER TABLE acceptance_event_default"
    patient = engine.execution_options(**{SECONDS: None})
    for change in (
        f"{alter} DROP CONSTRAINT IF EXISTS {rule}, ADD CONSTRAINT {rule} "
        f"CHECK (NOT (at >= '{begin.isoformat()}' AND at < '{end.isoformat()}')) NOT VALID",
        f"{alter} VALIDATE CONSTRAINT {rule}",
    ):
        with patient.begin() as connection:
            connection.execute(text(f"SET LOCAL lock_timeout = {_QUEUE_MS}"))
            connection.exec_driver_sql(change)
