"""Kill switches, leases, what was taken from the spool and what was lost."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey
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
