"""Freezes: times in which nothing is promoted by itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import FreezeWindow


def add_freeze(
    s: Session, group_id: int, *, starts_at: datetime, ends_at: datetime, actor: str, reason: str
) -> FreezeWindow:
    row = FreezeWindow(
        group_id=group_id,
        starts_at=starts_at,
        ends_at=ends_at,
        actor=actor,
        reason=reason,
        created_at=utc_now(),
    )
    s.add(row)
    s.flush()
    return row


def freeze(s: Session, group_id: int, freeze_id: int) -> FreezeWindow:
    """Raises ``AuroraError`` when the group has no such one."""
    row = s.get(FreezeWindow, freeze_id)
    if row is None or row.group_id != group_id:
        raise AuroraError(f"there is no freeze {freeze_id} in this group")
    return row


def current_freeze(s: Session, group_id: int, now: datetime | None = None) -> FreezeWindow | None:
    """The one that goes on and ends last; ``None``: nothing is frozen."""
    moment = now or utc_now()
    return s.scalars(
        select(FreezeWindow)
        .where(
            FreezeWindow.group_id == group_id,
            FreezeWindow.lifted_at.is_(None),
            FreezeWindow.starts_at <= moment,
            FreezeWindow.ends_at > moment,
        )
        .order_by(FreezeWindow.ends_at.desc(), FreezeWindow.id)
        .limit(1)
    ).one_or_none()


def freezes(s: Session, group_id: int, *, limit: int | None = None) -> Sequence[FreezeWindow]:
    """Those that end last first."""
    return s.scalars(
        select(FreezeWindow)
        .where(FreezeWindow.group_id == group_id)
        .order_by(FreezeWindow.ends_at.desc(), FreezeWindow.id.desc())
        .limit(limit)
    ).all()
