"""What people must know: alerts with their history, and what was sent of them and to whom."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from aurora_sgl.store.models.base import Base

_OPEN = text("ended_at IS NULL")


class AlertRecord(Base):
    """Something that was off for a while; ``ended_at`` empty: it still is. Of one ``key`` there is
    one at a time that is not over."""

    __tablename__ = "alert"
    __table_args__ = (
        CheckConstraint("severity IN ('critical', 'warning')", name="severity"),
        Index(None, "group_id", "began_at"),
        Index(
            "ux_alert_open",
            "group_id",
            "key",
            unique=True,
            sqlite_where=_OPEN,
            postgresql_where=_OPEN,
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    key: Mapped[str]  # kind and subject, such as server_silent/h200-1
    kind: Mapped[str]
    severity: Mapped[str]
    text: Mapped[str]  # as it was last
    began_at: Mapped[datetime]
    seen_at: Mapped[datetime]  # when it was last looked at and still there
    ended_at: Mapped[datetime | None]
    acknowledged_at: Mapped[datetime | None]
    acknowledged_by: Mapped[str] = mapped_column(default="")
    acknowledgement: Mapped[str] = mapped_column(default="")  # what they said


class Notification(Base):
    """One event that people are told of. ``event_key`` names the event, so that it is written once
    whoever looks how often."""

    __tablename__ = "notification"
    __table_args__ = (
        UniqueConstraint("group_id", "event_key"),
        CheckConstraint("severity IN ('critical', 'warning', 'info')", name="severity"),
        Index(None, "group_id", "created_at"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    event_key: Mapped[str]
    uid: Mapped[str]  # by which a receiver knows one that it gets twice
    kind: Mapped[str]
    severity: Mapped[str]
    title: Mapped[str]
    text: Mapped[str]
    happened_at: Mapped[datetime]
    created_at: Mapped[datetime]
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Delivery(Base):
    """One notification on its way to one receiver, which settings name."""

    __tablename__ = "delivery"
    __table_args__ = (
        CheckConstraint("state IN ('waiting', 'delivered', 'given_up')", name="state"),
        Index(None, "state", "next_try_at"),
        {"sqlite_with_rowid": False},
    )

    notification_id: Mapped[int] = mapped_column(
        ForeignKey("notification.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    target: Mapped[str] = mapped_column(primary_key=True)  # webhook or slack
    state: Mapped[str] = mapped_column(default="waiting")
    attempts: Mapped[int] = mapped_column(default=0)
    next_try_at: Mapped[datetime]
    delivered_at: Mapped[datetime | None]
    error: Mapped[str] = mapped_column(default="")  # of the last attempt


class NotificationStart(Base):
    """From when on a group's events are told: not what was before anybody looked."""

    __tablename__ = "notification_start"

    group_id: Mapped[int] = mapped_column(
        ForeignKey("deployment_group.id"), primary_key=True, autoincrement=False
    )
    since: Mapped[datetime]
