"""Drifts that the scheduler noticed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import Drift


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
