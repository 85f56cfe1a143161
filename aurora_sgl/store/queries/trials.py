"""Switchback trials and their windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import Trial, TrialWindow


def add_trial(
    s: Session,
    group_id: int,
    *,
    baseline_id: int,
    candidate_id: int,
    seed: int,
    details: Mapping[str, Any],
) -> Trial:
    row = Trial(
        group_id=group_id,
        baseline_id=baseline_id,
        candidate_id=candidate_id,
        started_at=utc_now(),
        seed=seed,
        details=dict(details),
    )
    s.add(row)
    s.flush()
    return row


def end_trial(s: Session, trial: Trial, status: str, *, verdict: str, **details: Any) -> None:
    """``status``: finished or stopped. Its open windows end with it."""
    trial.status, trial.finished_at, trial.verdict = status, utc_now(), verdict
    trial.details = {**trial.details, **details}
    for window in trial_windows(s, trial.id):
        if window.finished_at is None:
            window.finished_at = utc_now()
    s.flush()


def trial(s: Session, trial_id: int) -> Trial:
    """Raises ``AuroraError`` when there is none."""
    row = s.get(Trial, trial_id)
    if row is None:
        raise AuroraError(f"there is no trial {trial_id}")
    return row


def running_trial(s: Session, group_id: int) -> Trial | None:
    return s.scalars(
        select(Trial)
        .where(Trial.group_id == group_id, Trial.status == "running")
        .order_by(Trial.id.desc())
        .limit(1)
    ).one_or_none()


def trials(s: Session, group_id: int, *, limit: int | None = None) -> Sequence[Trial]:
    """Newest first."""
    return s.scalars(
        select(Trial).where(Trial.group_id == group_id).order_by(Trial.id.desc()).limit(limit)
    ).all()


def trials_of(s: Session, candidate_id: int, baseline_id: int) -> Sequence[Trial]:
    """Trials of one version against another, newest first."""
    return s.scalars(
        select(Trial)
        .where(Trial.candidate_id == candidate_id, Trial.baseline_id == baseline_id)
        .order_by(Trial.id.desc())
    ).all()


def trial_windows(s: Session, trial_id: int) -> Sequence[TrialWindow]:
    """In order."""
    return s.scalars(
        select(TrialWindow).where(TrialWindow.trial_id == trial_id).order_by(TrialWindow.number)
    ).all()


def add_trial_window(
    s: Session, trial_id: int, number: int, version_id: int, started_at: datetime, ends_at: datetime
) -> TrialWindow:
    row = TrialWindow(
        trial_id=trial_id,
        number=number,
        version_id=version_id,
        started_at=started_at,
        ends_at=ends_at,
    )
    s.add(row)
    s.flush()
    return row
