"""Kill switches, leases, limits and rounds of retention, what was taken from the spool or lost."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from aurora_sgl.store.models.base import Base


class Switch(Base):
    """A kill switch of a group: ``learning`` or ``auto_promote``. No row means on. Its history is
    in ``audit``."""

    __tablename__ = "switch"

    group_id: Mapped[int] = mapped_column(
        ForeignKey("deployment_group.id"), primary_key=True, autoincrement=False
    )
    name: Mapped[str] = mapped_column(primary_key=True)
    enabled: Mapped[bool]
    actor: Mapped[str]
    reason: Mapped[str]
    updated_at: Mapped[datetime]


class Lease(Base):
    """Who may do a thing that only one may do. ``token`` grows with each new holder: a write that
    carries an older token comes from a holder that lost the lease."""

    __tablename__ = "lease"

    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    token: Mapped[int]
    acquired_at: Mapped[datetime]
    expires_at: Mapped[datetime]


class RetentionLimit(Base):
    """How much a group keeps of one thing (see ``limits.Limits``): set from the settings of the
    server that makes the group, afterwards by a command. Its history is in ``audit``."""

    __tablename__ = "retention_limit"

    group_id: Mapped[int] = mapped_column(
        ForeignKey("deployment_group.id"), primary_key=True, autoincrement=False
    )
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int]
    actor: Mapped[str]
    updated_at: Mapped[datetime]


class TreeMemory(Base):
    """What the server of a name learnt of its trees (``engine.tree_choice.TreePolicy.state``),
    with ``version_id`` live, which may be none of this store."""

    __tablename__ = "tree_memory"

    group_id: Mapped[int] = mapped_column(
        ForeignKey("deployment_group.id"), primary_key=True, autoincrement=False
    )
    name: Mapped[str] = mapped_column(primary_key=True)
    version_id: Mapped[int | None]
    state: Mapped[dict[str, Any]]
    updated_at: Mapped[datetime]


class PruneRun(Base):
    """One round of retention over a group, its times by the store's clock. ``error`` empty and
    ``finished_at`` set: it did all that it had to."""

    __tablename__ = "prune_run"
    __table_args__ = (Index(None, "group_id", "started_at"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    actor: Mapped[str]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    report: Mapped[dict[str, Any]] = mapped_column(default=dict)  # retention.PruneReport
    error: Mapped[str] = mapped_column(default="")


class SpoolWatermark(Base):
    """The last envelope of a boot that the store has taken. Its row lock orders the ingests."""

    __tablename__ = "spool_watermark"

    server_id: Mapped[int] = mapped_column(
        ForeignKey("server.id"), primary_key=True, autoincrement=False
    )
    boot_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    last_seq: Mapped[int]
    updated_at: Mapped[datetime]


class StoreKey(Base):
    """A secret of the store by its name, see ``store.salt``. No SQL page reads it."""

    __tablename__ = "store_key"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class DropCount(Base):
    """Records that were lost at one place (engine, spool, trace) of one server."""

    __tablename__ = "drop_count"

    server_id: Mapped[int] = mapped_column(
        ForeignKey("server.id"), primary_key=True, autoincrement=False
    )
    place: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int]
    updated_at: Mapped[datetime]
