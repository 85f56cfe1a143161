"""Alerts: what is off, since when, until when, and who has taken notice."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import AlertRecord


def open_alerts(s: Session, group_id: int) -> Sequence[AlertRecord]:
    """Those that are not over, oldest first."""
    return s.scalars(
        select(AlertRecord)
        .where(AlertRecord.group_id == group_id, AlertRecord.ended_at.is_(None))
        .order_by(AlertRecord.id)
    ).all()


def alerts(s: Session, group_id: int, *, limit: int | None = None) -> Sequence[AlertRecord]:
    """Also those that are over, newest first."""
    return s.scalars(
        select(AlertRecord)
        .where(AlertRecord.group_id == group_id)
        .order_by(AlertRecord.id.desc())
        .limit(limit)
    ).all()


def alert(s: Session, group_id: int, alert_id: int, *, lock: bool = False) -> AlertRecord:
    """Raises ``AuroraError`` where the group has none of this number."""
    row = s.get(AlertRecord, alert_id, with_for_update=lock or None)
    if row is None or row.group_id != group_id:
        raise AuroraError(
            f"there is no alert {alert_id} in this group; see aurora-sgl alerts list --history"
        )
    return row


def begin_alert(
    s: Session, group_id: int, *, key: str, kind: str, severity: str, text: str, now: datetime
) -> AlertRecord:
    row = AlertRecord(
        group_id=group_id,
        key=key,
        kind=kind,
        severity=severity,
        text=text,
        began_at=now,
        seen_at=now,
    )
    s.add(row)
    s.flush()
    return row


def see_alerts(s: Session, alert_ids: Sequence[int], now: datetime) -> None:
    """These are still there."""
    if alert_ids:
        s.execute(
            update(AlertRecord)
            .where(AlertRecord.id.in_(alert_ids))
            .values(seen_at=now)
            .execution_options(synchronize_session="fetch")
        )


def acknowledge(
    s: Session, group_id: int, alert_id: int, *, actor: str, note: str, now: datetime
) -> AlertRecord:
    """Raises ``AuroraError`` where there is none, or somebody was faster."""
    row = alert(s, group_id, alert_id, lock=True)
    if row.acknowledged_at is not None:
        raise AuroraError(
            f"alert {alert_id} was acknowledged by {row.acknowledged_by} at "
            f"{row.acknowledged_at:%Y-%m-%d %H:%M} UTC"
        )
    row.acknowledged_at, row.acknowledged_by, row.acknowledgement = now, actor, note
    s.flush()
    return row


def count_open(s: Session, group_id: int) -> dict[tuple[str, str], int]:
    """Alerts that are not over and that nobody acknowledged, by (kind, severity)."""
    rows = s.execute(
        select(AlertRecord.kind, AlertRecord.severity, func.count())
        .where(
            AlertRecord.group_id == group_id,
            AlertRecord.ended_at.is_(None),
            AlertRecord.acknowledged_at.is_(None),
        )
        .group_by(AlertRecord.kind, AlertRecord.severity)
    )
    return {(kind, severity): count for kind, severity, count in rows}


def forget_alerts(s: Session, group_id: int, before: datetime) -> int:
    """Delete those that were over before; how many."""
    gone = s.execute(
        delete(AlertRecord).where(AlertRecord.group_id == group_id, AlertRecord.ended_at < before)
    )
    return int(gone.rowcount)  # type: ignore[attr-defined]
