"""Deployments: what was put live, when, by whom and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import Deployment, DeploymentGroup


def add_deployment(
    s: Session,
    group: DeploymentGroup,
    *,
    action: str,
    version_id: int,
    previous_version_id: int | None,
    actor: str,
    reason: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    evidence: Mapping[str, Any],
    evaluation_id: int | None = None,
) -> Deployment:
    """Count the group one generation up and write the row; the group must be locked."""
    group.generation += 1
    row = Deployment(
        group_id=group.id,
        generation=group.generation,
        action=action,
        version_id=version_id,
        previous_version_id=previous_version_id,
        actor=actor,
        reason=reason,
        evaluation_id=evaluation_id,
        created_at=utc_now(),
        before=dict(before),
        after=dict(after),
        evidence=dict(evidence),
    )
    s.add(row)
    s.flush()
    return row


def deployments(
    s: Session, group_id: int, *, since: datetime | None = None, limit: int | None = None
) -> Sequence[Deployment]:
    """Newest first."""
    query = select(Deployment).where(Deployment.group_id == group_id)
    if since is not None:
        query = query.where(Deployment.created_at >= since)
    return s.scalars(query.order_by(Deployment.generation.desc()).limit(limit)).all()


def last_to(s: Session, group_id: int, version_id: int) -> Deployment | None:
    """The last promotion or rollback that put this version live."""
    return s.scalars(
        select(Deployment)
        .where(Deployment.group_id == group_id, Deployment.version_id == version_id)
        .order_by(Deployment.generation.desc())
        .limit(1)
    ).one_or_none()


def promotion_of(s: Session, group_id: int, version_id: int) -> Deployment | None:
    """The last promotion that put this version live."""
    return s.scalars(
        select(Deployment)
        .where(
            Deployment.group_id == group_id,
            Deployment.version_id == version_id,
            Deployment.action == "promote",
        )
        .order_by(Deployment.generation.desc())
        .limit(1)
    ).one_or_none()
