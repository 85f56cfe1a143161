"""What operators note and decide: notes and tags, stages of a rollout, freezes, saved views."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from aurora_sgl.store.models.base import Base


class VersionNote(Base):
    """What somebody wrote about a version, or a tag that he gave it or took off; never changed
    (triggers refuse it)."""

    __tablename__ = "version_note"
    __table_args__ = (
        CheckConstraint("kind IN ('note', 'tag', 'untag')", name="kind"),
        CheckConstraint("text <> ''", name="text"),
        CheckConstraint("actor <> ''", name="actor"),
        Index(None, "version_id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    created_at: Mapped[datetime]
    actor: Mapped[str]
    kind: Mapped[str]
    text: Mapped[str]  # the note, or the tag


class RolloutStage(Base):
    """A version on some servers of a group before the rest: not a deployment, which is what comes
    of it. ``generation`` is the group's when it began; another deployment ends it."""

    __tablename__ = "rollout_stage"
    __table_args__ = (
        CheckConstraint(
            "status IN ('running', 'passed', 'continued', 'aborted', 'failed')", name="status"
        ),
        CheckConstraint("reason <> ''", name="reason"),
        CheckConstraint("actor <> ''", name="actor"),
        Index(None, "group_id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    version_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    baseline_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    generation: Mapped[int]
    status: Mapped[str] = mapped_column(default="running")
    servers: Mapped[list[str]]  # names of those that run it
    goes_on: Mapped[bool] = mapped_column(default=False)  # to the rest by itself, once passed
    actor: Mapped[str]
    reason: Mapped[str]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    outcome: Mapped[str] = mapped_column(default="")  # why it is as it is
    settings: Mapped[dict[str, Any]] = mapped_column(default=dict)
    windows: Mapped[list[Any]] = mapped_column(default=list)


class FreezeWindow(Base):
    """A time in which nothing is promoted by itself."""

    __tablename__ = "freeze_window"
    __table_args__ = (
        CheckConstraint("reason <> ''", name="reason"),
        CheckConstraint("actor <> ''", name="actor"),
        CheckConstraint("ends_at > starts_at", name="ends_at"),
        Index(None, "group_id", "ends_at"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    starts_at: Mapped[datetime]
    ends_at: Mapped[datetime]
    actor: Mapped[str]
    reason: Mapped[str]
    created_at: Mapped[datetime]
    lifted_at: Mapped[datetime | None]  # before its end
    lifted_by: Mapped[str] = mapped_column(default="")


class SavedView(Base):
    """A page as somebody looked at it, under a name."""

    __tablename__ = "saved_view"
    __table_args__ = (Index(None, "group_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    name: Mapped[str]
    page: Mapped[str]  # as in its address: versions
    query: Mapped[str] = mapped_column(default="")  # of the address, without ?
    actor: Mapped[str]
    created_at: Mapped[datetime]
