"""What looks after a promotion, what decides when to train, and who did what."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from aurora_sgl.store.models.base import Base


class Watch(Base):
    """The watch over one promotion. ``baseline`` is what was served before it, frozen when it
    began; ``settings`` are those under which it runs."""

    __tablename__ = "watch"
    __table_args__ = (
        UniqueConstraint("group_id", "generation"),
        CheckConstraint("status IN ('running', 'passed', 'failed', 'ended')", name="status"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    generation: Mapped[int]  # of the promotion
    version_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    baseline_id: Mapped[int | None] = mapped_column(ForeignKey("drafter_version.id"))
    status: Mapped[str] = mapped_column(default="running")  # ended: something else went live
    reason: Mapped[str] = mapped_column(default="")  # why it ended as it did
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    baseline: Mapped[dict[str, Any]] = mapped_column(default=dict)
    settings: Mapped[dict[str, Any]] = mapped_column(default=dict)


class WatchWindow(Base):
    """One window of a watch: requests that were prefilled after the swap and finished in it."""

    __tablename__ = "watch_window"
    __table_args__ = (
        CheckConstraint("verdict IN ('pass', 'bad', 'fail', 'empty')", name="verdict"),
    )

    watch_id: Mapped[int] = mapped_column(
        ForeignKey("watch.id"), primary_key=True, autoincrement=False
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime]
    requests: Mapped[int]
    verify_steps: Mapped[int]
    accepted: Mapped[int]
    accept_length: Mapped[float | None]
    expected_accept_length: Mapped[float | None]  # of the baseline on this mix of domains
    tokens_per_second: Mapped[float | None]  # of one stream
    expected_tokens_per_second: Mapped[float | None]
    verdict: Mapped[str]
    reason: Mapped[str]
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)


class SchedulerState(Base):
    """What the scheduler of a group does, what comes next, and why."""

    __tablename__ = "scheduler_state"

    group_id: Mapped[int] = mapped_column(
        ForeignKey("deployment_group.id"), primary_key=True, autoincrement=False
    )
    holder: Mapped[str]
    state: Mapped[str]  # waiting, training, gate, trial, watch, cooldown, off
    reason: Mapped[str]
    next_action: Mapped[str]
    next_at: Mapped[datetime | None]
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)
    updated_at: Mapped[datetime]


class Drift(Base):
    """The accept length of the live version fell in one domain, as the change detector saw it."""

    __tablename__ = "drift"
    __table_args__ = (Index(None, "group_id", "detected_at"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    version_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    domain: Mapped[str]
    detected_at: Mapped[datetime]
    last_request_id: Mapped[int]  # the request at which it was seen
    accept_length_before: Mapped[float]
    accept_length_after: Mapped[float]
    requests_before: Mapped[int]
    requests_after: Mapped[int]
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)  # detector and its settings


class Audit(Base):
    """What a person or a part of the system did that is no deployment; never changed (triggers
    refuse it)."""

    __tablename__ = "audit"
    __table_args__ = (
        Index(None, "group_id", "created_at"),
        CheckConstraint("reason <> ''", name="reason"),
        CheckConstraint("actor <> ''", name="actor"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    created_at: Mapped[datetime]
    actor: Mapped[str]
    action: Mapped[str]  # switch, pin, unpin, trial_start, trial_stop
    subject: Mapped[str]  # name of the switch, or "version 4"
    reason: Mapped[str]
    before: Mapped[dict[str, Any]] = mapped_column(default=dict)
    after: Mapped[dict[str, Any]] = mapped_column(default=dict)
