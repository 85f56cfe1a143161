"""Who did what, where it is no deployment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import Audit


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


def last_before(s: Session, group_id: int, action: str, moment: datetime) -> Audit | None:
    """The last of these actions up to a moment."""
    query = select(Audit).where(
        Audit.group_id == group_id, Audit.action == action, Audit.created_at <= moment
    )
    return s.scalars(query.order_by(Audit.created_at.desc(), Audit.id.desc()).limit(1)).first()
