"""Rounds of retention: what was deleted when, by whom, and when the next one is due."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from aurora_sgl.store.models import PruneRun, RetentionLimit
from aurora_sgl.store.store_clock import StoreNow, store_now

#: Between two rounds that went well, and after one that did not.
EVERY, AGAIN = timedelta(days=1), timedelta(hours=1)
#: Rounds that are looked through for one that did all; by hand some may leave the weights.
_MOST = 200


def start(s: Session, group_id: int, actor: str) -> PruneRun:
    run = PruneRun(group_id=group_id, actor=actor, started_at=store_now(s), report={}, error="")
    s.add(run)
    s.flush()
    return run


def finish(s: Session, run_id: int, report: Mapping[str, Any], error: str = "") -> None:
    s.execute(
        update(PruneRun)
        .where(PruneRun.id == run_id)
        .values(finished_at=StoreNow(), report=dict(report), error=error)
    )


def last(s: Session, group_id: int, *, complete: bool = False) -> PruneRun | None:
    """The newest round, or with ``complete`` the newest that did all it had to."""
    query = select(PruneRun).where(PruneRun.group_id == group_id)
    if complete:
        query = query.where(PruneRun.finished_at.is_not(None), PruneRun.error == "")
    rounds = s.scalars(query.order_by(PruneRun.started_at.desc(), PruneRun.id.desc()).limit(_MOST))
    return next((run for run in rounds if not complete or run.report.get("whole", True)), None)


def due_at(s: Session, group_id: int) -> datetime | None:
    """When the group should be pruned next: a day after the last time, and a day after its limits
    were first set, so that there is time to change them. ``None``: they never were."""
    newest, whole = last(s, group_id), last(s, group_id, complete=True)
    if newest is None or whole is None:
        begun = s.scalar(
            select(func.min(RetentionLimit.updated_at)).where(RetentionLimit.group_id == group_id)
        )
        if begun is None:
            return None
        due = begun + EVERY
    else:
        due = whole.started_at + EVERY
    return due if newest is None else max(due, newest.started_at + AGAIN)
