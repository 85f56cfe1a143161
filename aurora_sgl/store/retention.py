"""One round of retention over a group: what it keeps no longer goes, by the limits in the store.

Rows go first and files after the commit, so a stop in between leaves files that no row names
(``orphans`` sweeps them), never rows whose file is gone. Versions, evaluations, deployments and
the audit are kept for good.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine

from aurora_sgl.errors import AuroraError
from aurora_sgl.limits import Limits
from aurora_sgl.store import queries, sqlite_file
from aurora_sgl.store.connection import session
from aurora_sgl.store.pruning import events, minutes, requests, traces, weights
from aurora_sgl.store.pruning.pace import PrunePace
from aurora_sgl.store.pruning.weights import Files
from aurora_sgl.store.store_clock import store_now

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneReport:
    """What went, or with ``dry_run`` would go."""

    dry_run: bool
    events_before: datetime
    minutes_before: datetime
    events: int = 0
    partitions: tuple[str, ...] = ()  # that were dropped whole
    emptied: tuple[str, ...] = ()  # that somebody reads: their tables go another time
    not_ours: tuple[str, ...] = ()  # emptied too: their owner drops them, see ``drop_emptied``
    requests: int = 0
    traces: int = 0  # over the budget; those of the requests are not counted
    trace_bytes: int = 0
    minutes: int = 0  # rows of roll-ups that were summed to hours
    hours: int = 0  # rows of old hours that went
    versions: tuple[int, ...] = ()  # whose weights were deleted
    whole: bool = True  # weights were looked at too

    @property
    def sentence(self) -> str:
        """``120 events, 3 requests``; ``nothing``."""
        counts = {
            "events": self.events,
            "requests": self.requests,
            "traces": self.traces,
            "minutes summed to hours": self.minutes,
            "old hours": self.hours,
            "versions' weights": len(self.versions),
        }
        return ", ".join(f"{n:,} {name}" for name, n in counts.items() if n) or "nothing"

    def as_json(self) -> dict[str, Any]:
        times = {"events_before": self.events_before, "minutes_before": self.minutes_before}
        texts = {name: moment.isoformat() for name, moment in times.items()}
        return {**asdict(self), **texts, "sentence": self.sentence}


@dataclass(frozen=True)
class _Cutoffs:
    """Starts of days (UTC)."""

    events: datetime
    shared: datetime  # what no group keeps
    requests: datetime
    minutes: datetime
    hours: datetime


def prune(
    engine: Engine,
    files: Files,
    group_id: int,
    limits: Limits | None = None,
    *,
    with_weights: bool = True,
    dry_run: bool = False,
    now: datetime | None = None,
    pace: PrunePace | None = None,
) -> PruneReport:
    """Delete what is beyond ``limits``, by default the group's own.

    Raises ``AuroraError`` for limits that make no sense, ``Interrupted`` (see ``pruning.pace``),
    and what the database raises.
    """
    with session(engine, write=False) as s:
        now = now or store_now(s)
        limits = limits or queries.limits.limits(s, group_id)
        limits.refuse_nonsense()
        kept = [
            queries.limits.limits(s, group.id).event_days
            for group in queries.groups.groups(s)
            if group.id != group_id
        ]
    cutoffs = _Cutoffs(
        events=_days_ago(now, limits.event_days),
        shared=_days_ago(now, max([*kept, limits.event_days])),
        requests=_days_ago(now, limits.request_days),
        minutes=_days_ago(now, limits.minute_days),
        hours=_days_ago(now, limits.hour_days),
    )
    if dry_run:
        return _preview(engine, files, group_id, limits, cutoffs, with_weights)
    pace = pace or PrunePace()
    report = _carry_out(engine, files, group_id, limits, cutoffs, with_weights, pace)
    if report.sentence != "nothing":
        _shrink(engine)
    return report


def drop_emptied(engine: Engine) -> tuple[str, ...]:
    """In PostgreSQL drop the empty partitions of days that no group keeps: a role that only writes
    empties them, and can't do more. Raises what the database raises."""
    with session(engine, write=False) as s:
        groups = queries.groups.groups(s)
        days = [queries.limits.limits(s, group.id).event_days for group in groups]
        now = store_now(s)
    return events.drop_empty(engine, PrunePace(), _days_ago(now, max(days))) if days else ()


def _shrink(engine: Engine) -> None:
    """A file of SQLite gives back the room of what went; another time where somebody has it."""
    try:
        sqlite_file.shrink(engine)
    except sqlite3.Error as error:
        log.info("the store's file could not be made smaller now: %s", error)


def _days_ago(now: datetime, days: int) -> datetime:
    """A day goes when it ended at least so many days ago."""
    day = now.astimezone(UTC) - timedelta(days=days)
    return day.replace(hour=0, minute=0, second=0, microsecond=0)


def _preview(
    engine: Engine,
    files: Files,
    group_id: int,
    limits: Limits,
    cutoffs: _Cutoffs,
    with_weights: bool,
) -> PruneReport:
    old = events.count_old(engine, group_id, cutoffs.events, cutoffs.shared)
    rolled = minutes.count_old(engine, group_id, cutoffs.minutes, cutoffs.hours)
    budget = limits.trace_bytes
    over = traces.over_budget(engine, group_id, budget) if budget is not None else []
    unused = weights.count_old(engine, files, group_id, limits.versions) if with_weights else ()
    return PruneReport(
        dry_run=True,
        events_before=cutoffs.events,
        minutes_before=cutoffs.minutes,
        events=old.events,
        partitions=old.dropped,
        requests=requests.count_old(engine, group_id, cutoffs.requests),
        traces=len(over),
        trace_bytes=sum(size for _, _, size in over),
        minutes=rolled.minutes,
        hours=rolled.hours,
        versions=unused,
        whole=with_weights,
    )


def _carry_out(
    engine: Engine,
    files: Files,
    group_id: int,
    limits: Limits,
    cutoffs: _Cutoffs,
    with_weights: bool,
    pace: PrunePace,
) -> PruneReport:
    report = PruneReport(False, cutoffs.events, cutoffs.minutes, whole=with_weights)
    if limits.trace_bytes is not None:
        count, freed, uris = traces.prune_traces(engine, pace, group_id, limits.trace_bytes)
        _delete_files(files, uris)
        report = replace(report, traces=count, trace_bytes=freed)
    before = _done_before(engine, group_id)
    gone = events.prune_events(engine, pace, group_id, cutoffs.events, cutoffs.shared)
    report = replace(
        report, events=gone.events, partitions=gone.dropped, emptied=gone.emptied,
        not_ours=gone.not_ours,
    )  # fmt: skip
    events.prune_tallies(engine, pace, group_id, cutoffs.events, before)
    count, uris = requests.prune_requests(engine, pace, group_id, cutoffs.requests)
    _delete_files(files, uris)
    rolled = minutes.prune_minutes(
        engine, pace, group_id, minutes_before=cutoffs.minutes, hours_before=cutoffs.hours,
        since=before,
    )  # fmt: skip
    report = replace(report, requests=count, minutes=rolled.minutes, hours=rolled.hours)
    if with_weights:
        versions, uris = weights.prune_weights(engine, files, pace, group_id, limits.versions)
        _delete_files(files, uris)
        report = replace(report, versions=versions)
    return report


def _done_before(engine: Engine, group_id: int) -> datetime | None:
    """Up to when an earlier round has looked through all, less a day for records that came late."""
    with session(engine, write=False) as s:
        run = queries.prune_runs.last(s, group_id, complete=True)
    if run is None:
        return None
    times = [datetime.fromisoformat(run.report[f"{what}_before"]) for what in ("events", "minutes")]
    return min(times) - timedelta(days=1)


def _delete_files(files: Files, uris: Iterable[str]) -> None:
    """What can't be deleted now is litter from here on: whoever can, sweeps it."""
    for uri in uris:
        try:
            files.delete(uri)
        except (AuroraError, OSError) as error:
            log.warning("can't delete %s: %s", uri, error)
