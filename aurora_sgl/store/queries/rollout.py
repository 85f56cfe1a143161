"""Watches, trials, the scheduler's state, drift, and the audit of what is no deployment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import (
    Audit,
    Deployment,
    DrafterVersion,
    Drift,
    Evaluation,
    SchedulerState,
    TrainingRun,
    Trial,
    TrialWindow,
    Watch,
    WatchWindow,
)
from aurora_sgl.store.queries.groups import desired_version
from aurora_sgl.store.upsert import upsert


@dataclass(frozen=True)
class Wanted:
    """What the servers of a group should run now."""

    version_id: int
    generation: int
    trial_id: int | None  # set while a trial decides, not a deployment


def wanted_version(s: Session, group_id: int, now: datetime | None = None) -> Wanted | None:
    """The version of the running trial's window, else the live one; ``None``: nothing is live.

    A window is over at its ``ends_at``, whether or not anything is left to close it.
    """
    live = desired_version(s, group_id)
    if live is None:
        return None
    window = s.execute(
        select(TrialWindow.version_id, Trial.id)
        .join(Trial, Trial.id == TrialWindow.trial_id)
        .where(
            Trial.group_id == group_id,
            Trial.status == "running",
            TrialWindow.finished_at.is_(None),
            TrialWindow.started_at <= (now or utc_now()),
            TrialWindow.ends_at > (now or utc_now()),
        )
        .order_by(Trial.id.desc(), TrialWindow.number.desc())
        .limit(1)
    ).one_or_none()
    if window is None:
        return Wanted(live[0], live[1], None)
    return Wanted(window.version_id, live[1], window.id)


# -- watches --------------------------------------------------------------------------------


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


# -- trials ---------------------------------------------------------------------------------


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
    found = s.get(Trial, trial_id)
    if found is None:
        raise AuroraError(f"there is no trial {trial_id}")
    return found


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


# -- the scheduler --------------------------------------------------------------------------


def scheduler_state(s: Session, group_id: int) -> SchedulerState | None:
    return s.get(SchedulerState, group_id, populate_existing=True)


def set_scheduler_state(
    s: Session,
    group_id: int,
    *,
    holder: str,
    state: str,
    reason: str,
    next_action: str,
    next_at: datetime | None,
    details: Mapping[str, Any],
) -> None:
    row = {
        "group_id": group_id,
        "holder": holder,
        "state": state,
        "reason": reason,
        "next_action": next_action,
        "next_at": next_at,
        "details": dict(details),
        "updated_at": utc_now(),
    }
    upsert(s.connection(), SchedulerState, [row], ["group_id"], [c for c in row if c != "group_id"])


def add_drift(s: Session, group_id: int, **columns: Any) -> Drift:
    row = Drift(group_id=group_id, detected_at=utc_now(), **columns)
    s.add(row)
    s.flush()
    return row


def drifts(
    s: Session,
    group_id: int,
    *,
    version_id: int | None = None,
    since: datetime | None = None,
    limit: int | None = None,
) -> Sequence[Drift]:
    """Newest first."""
    query = select(Drift).where(Drift.group_id == group_id)
    if version_id is not None:
        query = query.where(Drift.version_id == version_id)
    if since is not None:
        query = query.where(Drift.detected_at >= since)
    return s.scalars(query.order_by(Drift.id.desc()).limit(limit)).all()


def attempts(s: Session, baseline_id: int) -> int:
    """How often any candidate was tried against this version."""
    return (
        s.scalar(
            select(func.count())
            .select_from(Evaluation)
            .where(Evaluation.baseline_id == baseline_id, Evaluation.attempt.is_not(None))
        )
        or 0
    )


def passed_against(
    s: Session, group_id: int, live_id: int, triggers: Sequence[str]
) -> Sequence[Evaluation]:
    """Evaluations by replay that versions passed against what is live, newest first; of versions
    from runs with these triggers that were never live and still have their weights."""
    version = DrafterVersion
    deployed = select(Deployment.version_id).where(Deployment.group_id == group_id)
    return s.scalars(
        select(Evaluation)
        .join(version, version.id == Evaluation.candidate_id)
        .join(TrainingRun, TrainingRun.id == version.training_run_id)
        .where(
            version.group_id == group_id,
            TrainingRun.trigger.in_(triggers),
            version.pruned_at.is_(None),
            version.id.not_in(deployed),
            Evaluation.baseline_id == live_id,
            Evaluation.kind == "replay",
            Evaluation.domain == "",
            Evaluation.verdict == "pass",
        )
        .order_by(Evaluation.id.desc())
    ).all()


# -- who did what ---------------------------------------------------------------------------


def add_audit(
    s: Session,
    group_id: int,
    *,
    actor: str,
    action: str,
    subject: str,
    reason: str,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> Audit:
    """Raises ``AuroraError`` without an actor or a reason."""
    if not actor.strip():
        raise AuroraError(f"{action} {subject} needs an actor: who does this?")
    if not reason.strip():
        raise AuroraError(f"{action} {subject} needs a reason; say it with --reason")
    row = Audit(
        group_id=group_id,
        created_at=utc_now(),
        actor=actor.strip(),
        action=action,
        subject=subject,
        reason=reason.strip(),
        before=dict(before or {}),
        after=dict(after or {}),
    )
    s.add(row)
    s.flush()
    return row


def audits(s: Session, group_id: int, *, limit: int | None = None) -> Sequence[Audit]:
    """Newest first."""
    return s.scalars(
        select(Audit).where(Audit.group_id == group_id).order_by(Audit.id.desc()).limit(limit)
    ).all()
