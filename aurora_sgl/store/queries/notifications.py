"""Notifications: events that people are told of, and how far each is on its way to whom."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import (
    Delivery,
    Notification,
    NotificationStart,
)
from aurora_sgl.store.upsert import insert_missing, storable


def begins_at(s: Session, group_id: int) -> datetime:
    """From when on events of a group are told; the first who asks sets it to now."""
    row = {"group_id": group_id, "since": utc_now()}
    insert_missing(s.connection(), NotificationStart, [row], ["group_id"])
    return s.scalars(
        select(NotificationStart.since).where(NotificationStart.group_id == group_id)
    ).one()


def written_since(s: Session, group_id: int, since: datetime) -> set[str]:
    """Keys of the events that were written since then."""
    return set(
        s.scalars(
            select(Notification.event_key).where(
                Notification.group_id == group_id, Notification.created_at >= since
            )
        )
    )


def add_notification(
    s: Session,
    group_id: int,
    *,
    event_key: str,
    kind: str,
    severity: str,
    title: str,
    text: str,
    happened_at: datetime,
    details: Mapping[str, Any],
    targets: Iterable[str],
) -> bool:
    """Write an event and whom it goes to; False: it was written before."""
    key = {"group_id": group_id, "event_key": event_key}
    if s.scalar(select(exists().where(*(getattr(Notification, k) == v for k, v in key.items())))):
        return False
    now = utc_now()
    row = Notification(
        **key,
        uid=uuid.uuid4().hex,
        kind=kind,
        severity=severity,
        title=storable(title),
        text=storable(text),
        happened_at=happened_at,
        created_at=now,
        details=storable(dict(details)),
    )
    s.add(row)
    s.flush()
    s.add_all(Delivery(notification_id=row.id, target=one, next_try_at=now) for one in targets)
    s.flush()
    return True


def notifications(
    s: Session, group_id: int, *, limit: int | None = None
) -> Sequence[tuple[Notification, Sequence[Delivery]]]:
    """Newest first, each with its deliveries."""
    rows = s.scalars(
        select(Notification)
        .where(Notification.group_id == group_id)
        .order_by(Notification.id.desc())
        .limit(limit)
    ).all()
    by_id: dict[int, list[Delivery]] = {row.id: [] for row in rows}
    for begin in range(0, len(rows), 400):
        part = [row.id for row in rows[begin : begin + 400]]
        for one in s.scalars(select(Delivery).where(Delivery.notification_id.in_(part))):
            by_id[one.notification_id].append(one)
    return [(row, sorted(by_id[row.id], key=lambda one: one.target)) for row in rows]


def due_deliveries(
    s: Session, group_id: int, targets: Sequence[str], now: datetime, *, limit: int
) -> Sequence[tuple[Delivery, Notification]]:
    """What is to be sent to these receivers now, in the order of the events."""
    rows = s.execute(
        select(Delivery, Notification)
        .join(Notification, Notification.id == Delivery.notification_id)
        .where(
            Notification.group_id == group_id,
            Delivery.state == "waiting",
            Delivery.next_try_at <= now,
            Delivery.target.in_(targets),
        )
        .order_by(Notification.id)
        .limit(limit)
    )
    return [(delivery, notification) for delivery, notification in rows]


def end_attempt(
    s: Session,
    notification_id: int,
    target: str,
    *,
    state: str,
    next_try_at: datetime,
    error: str,
) -> None:
    """Note how an attempt ended. One that was delivered stays so: another scheduler may have been
    faster."""
    row = s.get(Delivery, (notification_id, target), with_for_update=True)
    if row is None or row.state == "delivered":
        return
    row.state, row.error, row.attempts = state, storable(error), row.attempts + 1
    row.next_try_at = next_try_at
    row.delivered_at = utc_now() if state == "delivered" else None
    s.flush()


def give_up_unnamed(s: Session, group_id: int, targets: Sequence[str]) -> int:
    """Give up what waits for receivers that nobody names any more; how many."""
    mine = select(Notification.id).where(Notification.group_id == group_id)
    gone = s.execute(
        update(Delivery)
        .where(
            Delivery.state == "waiting",
            Delivery.target.not_in(targets),
            Delivery.notification_id.in_(mine),
        )
        .values(state="given_up", error="no setting names its receiver any more")
        .execution_options(synchronize_session=False)
    )
    return int(gone.rowcount)  # type: ignore[attr-defined]


def count_deliveries(s: Session, group_id: int) -> dict[tuple[str, str], int]:
    """Deliveries by (target, state)."""
    rows = s.execute(
        select(Delivery.target, Delivery.state, func.count())
        .join(Notification, Notification.id == Delivery.notification_id)
        .where(Notification.group_id == group_id)
        .group_by(Delivery.target, Delivery.state)
    )
    return {(target, state): count for target, state, count in rows}


def oldest_waiting(s: Session, group_id: int) -> tuple[str, datetime, str] | None:
    """(target, since when, last error) of what waits longest after it failed once."""
    row = s.execute(
        select(Delivery.target, Notification.created_at, Delivery.error)
        .join(Notification, Notification.id == Delivery.notification_id)
        .where(
            Notification.group_id == group_id, Delivery.state == "waiting", Delivery.attempts > 0
        )
        .order_by(Notification.id)
        .limit(1)
    ).first()
    return None if row is None else (row[0], row[1], row[2])


def forget_notifications(s: Session, group_id: int, before: datetime) -> int:
    """Delete those of before; how many."""
    old = select(Notification.id).where(
        Notification.group_id == group_id, Notification.created_at < before
    )
    s.execute(delete(Delivery).where(Delivery.notification_id.in_(old)))
    gone = s.execute(
        delete(Notification).where(
            Notification.group_id == group_id, Notification.created_at < before
        )
    )
    return int(gone.rowcount)  # type: ignore[attr-defined]
