"""Old acceptance events, and the tallies of requests that have none any more.

Groups share the table: what is older than all of them keep goes whole, in PostgreSQL by the
partition; what one group alone keeps no longer goes by rows. Cutoffs are starts of days (UTC).
"""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, delete, func, select, text, true
from sqlalchemy.exc import DBAPIError

from aurora_sgl import wire
from aurora_sgl.store.connection import is_sqlite, reading
from aurora_sgl.store.faults import Kind, fault_of, may_not
from aurora_sgl.store.models import AcceptanceEvent, Request, RequestTally, Server
from aurora_sgl.store.partitions import name_of, partitions
from aurora_sgl.store.pruning.pace import PrunePace
from aurora_sgl.store.queries.limits import is_of_group

#: Rows of a partition above which PostgreSQL's estimate is taken for their number.
COUNTED = 1_000_000
#: Requests whose tallies go in one transaction.
_TALLIES = 500
_DEFAULT = "acceptance_event_default"


class PrunedEvents(NamedTuple):
    """``dropped``: partitions that went whole; ``emptied``: those that somebody reads, so that
    their table stays until the next round; ``not_ours``: emptied too, but their table is for its
    owner to drop."""

    events: int = 0
    dropped: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()
    not_ours: tuple[str, ...] = ()


def count_old(engine: Engine, group_id: int, cutoff: datetime, shared: datetime) -> PrunedEvents:
    """What :func:`prune_events` would delete."""
    event = AcceptanceEvent
    query = select(func.count()).select_from(event)
    whole = _old_partitions(engine, shared)
    with reading(engine) as connection:
        if is_sqlite(engine):
            total = connection.scalar(query.where(event.at < shared)) or 0
        else:
            total = sum(_rows_of(connection, name) for name in whole)
            strays = text(f"SELECT count(*) FROM {_DEFAULT} WHERE at < :shared")
            total += connection.scalar(strays, {"shared": shared}) or 0
        if cutoff > shared:
            mine = query.where(event.at >= shared, event.at < cutoff)
            total += connection.scalar(mine.where(is_of_group(event.request_id, group_id))) or 0
    return PrunedEvents(total, whole)


def prune_events(
    engine: Engine, pace: PrunePace, group_id: int, cutoff: datetime, shared: datetime
) -> PrunedEvents:
    """Delete events of the group before ``cutoff``, and of everybody before ``shared``."""
    if is_sqlite(engine):
        total = _by_time(engine, pace, None, shared, true())
        if cutoff > shared:
            of_group = is_of_group(AcceptanceEvent.request_id, group_id)
            total += _by_time(engine, pace, shared, cutoff, of_group)
        return PrunedEvents(total)
    total = 0
    tables: dict[_Table, list[str]] = {state: [] for state in _Table}
    for name in _old_partitions(engine, shared):
        with reading(engine) as connection:
            rows = _rows_of(connection, name)
        state = _drop(engine, pace, name)
        # Rows can go beside any reader, and by whoever may write.
        total += rows if state is _Table.GONE else _rows(engine, pace, name, "true", {})
        tables[state].append(name)
    total += _rows(engine, pace, _DEFAULT, "at < :shared", {"shared": shared})
    if cutoff > shared:
        total += _of_boots(engine, pace, group_id, cutoff, shared)
    return PrunedEvents(total, *(tuple(tables[state]) for state in _Table))


def drop_empty(engine: Engine, pace: PrunePace, shared: datetime) -> tuple[str, ...]:
    """Drop partitions from before ``shared`` that have no rows; those that nobody reads now."""

    def is_empty(name: str) -> bool:
        with reading(engine) as connection:
            return connection.scalar(text(f"SELECT 1 FROM {name} LIMIT 1")) is None

    return tuple(
        name
        for name in _old_partitions(engine, shared)
        if is_empty(name) and _drop(engine, pace, name) is _Table.GONE
    )


def prune_tallies(
    engine: Engine, pace: PrunePace, group_id: int, cutoff: datetime, since: datetime | None
) -> None:
    """Clusters of requests that ended before the cutoff grow no more; those of requests that ended
    before ``since`` are gone already."""
    r = Request
    position: tuple[Any, int] | None = None
    while True:
        query = select(r.finished_at, r.id).where(
            r.finished_at < cutoff,
            r.server_id.in_(select(Server.id).where(Server.group_id == group_id)),
        )
        if since is not None:
            query = query.where(r.finished_at >= since)
        if position is not None:
            moment, last_id = position
            query = query.where(
                r.finished_at >= moment, (r.finished_at > moment) | (r.id > last_id)
            )
        with reading(engine) as connection:
            rows = connection.execute(query.order_by(r.finished_at, r.id).limit(_TALLIES)).all()
        if not rows:
            return
        position = (rows[-1].finished_at, rows[-1].id)
        gone = delete(RequestTally).where(RequestTally.request_id.in_([row.id for row in rows]))
        pace.once(engine, lambda connection, _, gone=gone: connection.execute(gone).rowcount)  # type: ignore[misc]


def _by_time(
    engine: Engine,
    pace: PrunePace,
    since: datetime | None,
    until: datetime,
    which: ColumnElement[bool],
) -> int:
    """SQLite: along the index on ``at``; what stays of other groups is passed once."""
    event, position = AcceptanceEvent, since

    def work(connection: Connection, most: int) -> int:
        nonlocal position
        between = [event.at < until, which]
        if position is not None:
            between.append(event.at >= position)
        times = connection.scalars(
            select(event.at).where(*between).order_by(event.at).limit(most)
        ).all()
        if not times:
            return 0
        position = times[-1]
        gone = delete(event).where(event.at <= position, *between)
        return connection.execute(gone).rowcount

    return pace.all_of(engine, work)


def _of_boots(
    engine: Engine, pace: PrunePace, group_id: int, cutoff: datetime, shared: datetime
) -> int:
    """PostgreSQL: the ranges of the key that the group's boots have in each day's partition."""
    with reading(engine) as connection:
        boots = connection.scalars(select(Server.boot_id).where(Server.group_id == group_id)).all()
        days = [day for day in partitions(connection) if shared.date() <= day < cutoff.date()]
    total = 0
    for day in days:
        for boot_id in boots:
            first = boot_id << wire.REQUEST_COUNTER_BITS
            last = first + (1 << wire.REQUEST_COUNTER_BITS) - 1
            with reading(engine) as connection:
                some = f"SELECT 1 FROM {name_of(day)} WHERE request_id BETWEEN :first AND :last"
                bounds = {"first": first, "last": last}
                if connection.scalar(text(f"{some} LIMIT 1"), bounds) is None:
                    continue
            condition = "request_id BETWEEN :first AND :last"
            total += _rows(engine, pace, name_of(day), condition, bounds)
    return total


def _rows(
    engine: Engine, pace: PrunePace, table: str, condition: str, values: dict[str, Any]
) -> int:
    """PostgreSQL: rows of one partition. An event is never updated, so its place stays."""
    statement = text(
        f"DELETE FROM {table} WHERE ctid = ANY(ARRAY("
        f"SELECT ctid FROM {table} WHERE {condition} LIMIT :most))"
    )
    return pace.all_of(
        engine,
        lambda connection, most: connection.execute(statement, {**values, "most": most}).rowcount,
    )


class _Table(Enum):
    """What became of a partition, in the order of ``PrunedEvents``."""

    GONE = 1
    READ = 2
    NOT_OURS = 3


def _drop(engine: Engine, pace: PrunePace, name: str) -> _Table:
    """Drop the partition, unless a reader that goes on holds it: whoever came while we wait for
    him would wait too."""

    def work(connection: Connection, _: int) -> int:
        connection.execute(text(f"DROP TABLE {name}"))
        return 0

    try:
        pace.once(engine, work, tries=2)
    except DBAPIError as error:
        if may_not(error):
            return _Table.NOT_OURS
        fault = fault_of(error)
        if fault is None or fault.kind is not Kind.BUSY:
            raise
        return _Table.READ
    return _Table.GONE


def _old_partitions(engine: Engine, shared: datetime) -> tuple[str, ...]:
    """Names of the partitions that go whole, the oldest first."""
    if is_sqlite(engine):
        return ()
    with reading(engine) as connection:
        return tuple(name_of(day) for day in partitions(connection) if day < shared.date())


def _rows_of(connection: Connection, table: str) -> int:
    """Counted, or of a large table as PostgreSQL estimates them."""
    estimate = connection.scalar(
        text("SELECT reltuples::bigint FROM pg_class WHERE oid = to_regclass(:table)"),
        {"table": table},
    )
    if estimate is not None and estimate > COUNTED:
        return int(estimate)
    return int(connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0)
