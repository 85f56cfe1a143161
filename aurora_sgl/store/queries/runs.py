"""Training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import TrainingRun


def start_run(
    s: Session,
    group_id: int,
    *,
    trigger: str,
    base_version_id: int | None = None,
    window_start: datetime | None = None,
    window_end: datetime | None = None,
    objective: str = "",
    config: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """A new run in the status ``running``."""
    run = TrainingRun(
        group_id=group_id,
        trigger=trigger,
        started_at=utc_now(),
        base_version_id=base_version_id,
        window_start=window_start,
        window_end=window_end,
        objective=objective,
        config=dict(config or {}),
    )
    s.add(run)
    s.flush()
    return run


def finish_run(s: Session, run_id: int, status: str, **fields: Any) -> TrainingRun:
    """End a run: ``status`` is succeeded, failed or skipped; ``fields`` are columns of
    ``training_run`` such as requests, tokens, metrics, error, window_start. Its progress goes,
    unless it failed: how far it came is what is asked for then.

    Raises ``AuroraError`` for an unknown run or one that has ended.
    """
    run = s.get(TrainingRun, run_id)
    if run is None or run.status != "running":
        raise AuroraError(f"training run {run_id} is {run.status if run else 'unknown'}")
    if status != "failed":
        fields["progress"] = {}
    for name, value in {"finished_at": utc_now(), **fields, "status": status}.items():
        if name not in TrainingRun.__table__.columns:
            raise AttributeError(f"training_run has no column {name}")
        setattr(run, name, value)
    s.flush()
    return run


def note_progress(s: Session, run_id: int, progress: Mapping[str, Any]) -> None:
    """How far a run is; one that has ended stays as it is."""
    s.execute(
        update(TrainingRun)
        .where(TrainingRun.id == run_id, TrainingRun.status == "running")
        .values(progress=dict(progress))
    )


def runs(
    s: Session, group_id: int, *, status: str = "", limit: int | None = None
) -> Sequence[TrainingRun]:
    """Newest first; with a status only those in it."""
    query = select(TrainingRun).where(TrainingRun.group_id == group_id)
    if status:
        query = query.where(TrainingRun.status == status)
    return s.scalars(query.order_by(TrainingRun.id.desc()).limit(limit)).all()


class RunSpan(NamedTuple):
    """From when to when a run went on, however it ended."""

    started_at: datetime
    finished_at: datetime | None  # None: it goes on
    workers: int  # processes that trained


def run_spans(s: Session, group_id: int, since: datetime, until: datetime) -> list[RunSpan]:
    """Of the runs that went on at any moment of a span of time, oldest first."""
    r = TrainingRun
    query = (
        select(r.started_at, r.finished_at, r.config)
        .where(r.group_id == group_id, r.started_at < until)
        .where(or_(r.finished_at.is_(None), r.finished_at > since))
        .order_by(r.id)
    )
    return [RunSpan(begin, end, _workers(config)) for begin, end, config in s.execute(query)]


def _workers(config: Mapping[str, Any] | None) -> int:
    count = (config or {}).get("workers")
    return count if isinstance(count, int) and count > 0 else 1


def failed_runs(s: Session, group_id: int, since: datetime) -> Sequence[TrainingRun]:
    """Those that failed since then."""
    return s.scalars(
        select(TrainingRun).where(
            TrainingRun.group_id == group_id,
            TrainingRun.status == "failed",
            TrainingRun.finished_at >= since,
        )
    ).all()


def tokens_of_runs(s: Session, run_ids: Sequence[int]) -> int:
    """Positions that these runs trained on, together."""
    tokens = s.scalar(
        select(func.coalesce(func.sum(TrainingRun.tokens), 0)).where(TrainingRun.id.in_(run_ids))
    )
    return int(tokens or 0)


def explain_stop(s: Session, group_id: int, why: str) -> None:
    """The newest run was ended by a signal: write down why, instead of which signal."""
    last = runs(s, group_id, limit=1)
    if last and last[0].status == "failed" and last[0].error.startswith("SystemExit"):
        last[0].error = why


def fail_running(s: Session, group_id: int, error: str) -> int:
    """Runs that were left running by a trainer that is gone become ``failed``."""
    left = s.scalars(
        select(TrainingRun).where(TrainingRun.group_id == group_id, TrainingRun.status == "running")
    ).all()
    for run in left:
        run.status, run.error, run.finished_at = "failed", error, utc_now()
    s.flush()
    return len(left)
