"""Watches over what was promoted, and their windows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import Watch, WatchWindow


def start_watch(
    s: Session, group_id: int, generation: int, version_id: int, baseline_id: int | None
) -> Watch:
    row = Watch(
        group_id=group_id,
        generation=generation,
        version_id=version_id,
        baseline_id=baseline_id,
        started_at=utc_now(),
    )
    s.add(row)
    s.flush()
    return row


def end_watch(s: Session, watch: Watch, status: str, reason: str) -> None:
    watch.status, watch.reason, watch.finished_at = status, reason, utc_now()
    s.flush()


def running_watch(s: Session, group_id: int, *, lock: bool = False) -> Watch | None:
    query = select(Watch).where(Watch.group_id == group_id, Watch.status == "running")
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    return s.scalars(query.order_by(Watch.id.desc()).limit(1)).one_or_none()


def watches(s: Session, group_id: int, *, limit: int | None = None) -> Sequence[Watch]:
    """Newest first."""
    return s.scalars(
        select(Watch).where(Watch.group_id == group_id).order_by(Watch.id.desc()).limit(limit)
    ).all()


def failed_watches(s: Session, group_id: int, since: datetime) -> Sequence[Watch]:
    """Those that failed since then."""
    return s.scalars(
        select(Watch).where(
            Watch.group_id == group_id, Watch.status == "failed", Watch.finished_at >= since
        )
    ).all()


def watch_windows(s: Session, watch_id: int) -> Sequence[WatchWindow]:
    """In order."""
    return s.scalars(
        select(WatchWindow).where(WatchWindow.watch_id == watch_id).order_by(WatchWindow.number)
    ).all()


def add_watch_window(s: Session, **columns: Any) -> WatchWindow:
    row = WatchWindow(**columns)
    s.add(row)
    s.flush()
    return row
