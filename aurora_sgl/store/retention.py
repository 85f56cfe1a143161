"""``db prune``: old events, traces beyond their budget, weights that nothing points to.

Rows go first and files after the commit, so a stop in between leaves files that no row names,
never rows whose file is gone. Requests, roll-ups, versions and deployments are kept for good.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from sqlalchemy import Connection, Engine, delete, exists, func, select, text, tuple_
from sqlalchemy.orm import aliased

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import queries
from aurora_sgl.store.connection import is_sqlite, reading, session
from aurora_sgl.store.models import (
    AcceptanceEvent,
    Alias,
    DrafterVersion,
    Request,
    RequestTally,
    Server,
)
from aurora_sgl.store.partitions import drop_before, name_of, partitions

#: Events of one transaction in SQLite: it holds the write lock for some tens of milliseconds.
_CHUNK = 5_000


class Files(Protocol):
    """What prune needs of ``artifacts.ArtifactRoot``."""

    def delete(self, uri: str) -> None: ...


@dataclass(frozen=True)
class PruneReport:
    """What went, or with ``dry_run`` would go."""

    dry_run: bool
    events_before: datetime
    events: int
    partitions: tuple[str, ...]
    traces: int
    trace_bytes: int
    versions: tuple[int, ...]  # whose weights were deleted


def prune(
    engine: Engine,
    files: Files,
    *,
    days: int,
    trace_bytes: int | None = None,
    weights: bool = False,
    keep_versions: int = 10,
    dry_run: bool = False,
    now: datetime | None = None,
) -> PruneReport:
    """Delete events of days (UTC) that ended at least ``days`` days ago; the oldest traces that
    are not pinned until the rest fits into ``trace_bytes``; with ``weights`` the weights of
    versions that are not pinned, have no alias, run on no server and are not among the newest
    ``keep_versions`` of their group.

    Raises ``AuroraError`` for a number that makes no sense.
    """
    if days < 1 or keep_versions < 0 or (trace_bytes is not None and trace_bytes < 0):
        raise AuroraError("prune needs days of at least 1 and budgets that are not negative")
    cutoff = (now or utc_now()).astimezone(UTC) - timedelta(days=days)
    cutoff = cutoff.replace(hour=0, minute=0, second=0, microsecond=0)
    events, dropped = _prune_events(engine, cutoff, dry_run)
    traces, freed = _prune_traces(engine, files, trace_bytes, dry_run)
    pruned = _prune_weights(engine, files, keep_versions, dry_run) if weights else ()
    return PruneReport(dry_run, cutoff, events, dropped, traces, freed, pruned)


def _prune_events(engine: Engine, cutoff: datetime, dry_run: bool) -> tuple[int, tuple[str, ...]]:
    with reading(engine) as connection:
        old = select(func.count()).select_from(AcceptanceEvent).where(AcceptanceEvent.at < cutoff)
        events = connection.scalar(old) or 0
        days = [] if is_sqlite(engine) else partitions(connection)
    names = tuple(name_of(day) for day in days if day < cutoff.date())
    if dry_run:
        return events, names
    if not is_sqlite(engine):
        with engine.begin() as connection:
            # Rather try again later than keep every writer waiting behind a long reader.
            connection.execute(text("SET LOCAL lock_timeout = '10s'"))
            drop_before(connection, cutoff.date())
    while _delete_chunk(engine, cutoff):
        pass
    with engine.begin() as connection:
        _forget_tallies(connection, cutoff)
    return events, names


def _delete_chunk(engine: Engine, cutoff: datetime) -> bool:
    """In PostgreSQL only the default partition still has such rows by now."""
    event = AcceptanceEvent
    with engine.begin() as connection:
        keys = (
            select(event.request_id, event.step).where(event.at < cutoff).limit(_CHUNK).subquery()
        )
        done = connection.execute(
            delete(event).where(
                event.at < cutoff,
                tuple_(event.request_id, event.step).in_(select(keys.c.request_id, keys.c.step)),
            )
        )
        return done.rowcount > 0


def _forget_tallies(connection: Connection, cutoff: datetime) -> None:
    """Clusters of requests that ended before the cutoff grow no more."""
    ended = select(Request.id).where(Request.finished_at < cutoff)
    connection.execute(delete(RequestTally).where(RequestTally.request_id.in_(ended)))


def _prune_traces(
    engine: Engine, files: Files, budget: int | None, dry_run: bool
) -> tuple[int, int]:
    if budget is None:
        return 0, 0
    with session(engine, write=not dry_run) as s:
        excess = queries.traces.trace_bytes_total(s) - budget
        chosen: list[tuple[int, str]] = []
        freed = 0
        for trace in queries.traces.traces_oldest_first(s) if excess > 0 else ():
            if freed >= excess:
                break
            chosen.append((trace.request_id, trace.uri))
            freed += trace.bytes
        if not dry_run:
            queries.traces.delete_traces(s, [request_id for request_id, _ in chosen])
    if not dry_run:
        _delete_files(files, (uri for _, uri in chosen))
    return len(chosen), freed


def _prune_weights(
    engine: Engine, files: Files, keep_versions: int, dry_run: bool
) -> tuple[int, ...]:
    v = DrafterVersion
    newer = aliased(DrafterVersion)
    rank = (
        select(func.count())
        .where(newer.group_id == v.group_id, newer.id > v.id)
        .correlate(v)
        .scalar_subquery()
    )
    running = exists().where(
        Server.state == "running",
        (Server.live_version_id == v.id) | (Server.boot_version_id == v.id),
    )
    unused = select(v).where(
        ~v.pinned,
        v.pruned_at.is_(None),
        rank >= keep_versions,
        ~exists().where(Alias.version_id == v.id),
        ~running,
    )
    uris = []
    with session(engine, write=not dry_run) as s:
        chosen = s.scalars(unused.order_by(v.id)).all()
        for version in chosen:
            if dry_run:
                continue
            queries.versions.set_pruned(s, version.id)
            shared = s.scalar(
                select(func.count()).where(
                    v.weights_uri == version.weights_uri, v.pruned_at.is_(None)
                )
            )
            if not shared:  # another group may have the same drafter
                uris.append(version.weights_uri)
    _delete_files(files, uris)
    return tuple(version.id for version in chosen)


def _delete_files(files: Files, uris: Iterable[str]) -> None:
    for uri in uris:
        files.delete(uri)
