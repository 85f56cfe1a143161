"""Stages of a rollout: a version on some servers of a group before the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import RolloutStage

#: While it is one of these, its servers run the version.
OPEN = ("running", "passed")


def add_stage(
    s: Session,
    group_id: int,
    *,
    version_id: int,
    baseline_id: int,
    generation: int,
    servers: Sequence[str],
    goes_on: bool,
    actor: str,
    reason: str,
    settings: Mapping[str, Any],
) -> RolloutStage:
    row = RolloutStage(
        group_id=group_id,
        version_id=version_id,
        baseline_id=baseline_id,
        generation=generation,
        servers=list(servers),
        goes_on=goes_on,
        actor=actor,
        reason=reason,
        started_at=utc_now(),
        settings=dict(settings),
    )
    s.add(row)
    s.flush()
    return row


def where(stage: RolloutStage) -> str:
    """The version and its servers, as a refusal or the scheduler says it."""
    return f"version {stage.version_id} is staged on {', '.join(stage.servers)}"


def end_stage(s: Session, stage: RolloutStage, status: str, outcome: str) -> None:
    """``status``: continued, aborted or failed."""
    stage.status, stage.outcome, stage.finished_at = status, outcome, utc_now()
    s.flush()


def open_stage(s: Session, group_id: int, *, lock: bool = False) -> RolloutStage | None:
    """The one whose servers run its version; ``None``: none does."""
    query = select(RolloutStage).where(
        RolloutStage.group_id == group_id, RolloutStage.status.in_(OPEN)
    )
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    return s.scalars(query.order_by(RolloutStage.id.desc()).limit(1)).one_or_none()


def stages(s: Session, group_id: int, *, limit: int | None = None) -> Sequence[RolloutStage]:
    """Newest first."""
    return s.scalars(
        select(RolloutStage)
        .where(RolloutStage.group_id == group_id)
        .order_by(RolloutStage.id.desc())
        .limit(limit)
    ).all()


def stages_of(s: Session, version_id: int, baseline_id: int) -> Sequence[RolloutStage]:
    """Of a version before one baseline, newest first."""
    return s.scalars(
        select(RolloutStage)
        .where(RolloutStage.version_id == version_id, RolloutStage.baseline_id == baseline_id)
        .order_by(RolloutStage.id.desc())
    ).all()
