"""What was purged, without its content, and what training learnt from."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Index
from sqlalchemy.orm import Mapped, mapped_column

from aurora_sgl.store.models.base import Base


class Erasure(Base):
    """One purge: a rule that holds for good, for what still lies in a spool somewhere.

    ``key_hash`` is the keyed hash of a rid, a conversation or a domain (``store.erased``), so that
    the row says nothing of it: of a conversation two of them, of its hash and of its salted one, a
    space between; "" where ``until`` alone decides. ``finished_at`` is empty while
    something is left to do.
    """

    __tablename__ = "erasure"
    __table_args__ = (
        CheckConstraint(
            "kind IN ('request', 'rid', 'conversation', 'domain', 'before')", name="kind"
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    salt: Mapped[str]  # of the hash, hexadecimal; one a store
    key_hash: Mapped[str]
    until: Mapped[datetime]  # requests that were admitted up to then
    started_at: Mapped[datetime]
    rows_at: Mapped[datetime | None]  # when the last row was gone; spools come after
    finished_at: Mapped[datetime | None]
    actor: Mapped[str]
    reason: Mapped[str]
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)  # counts, runs, versions


class ErasedRequest(Base):
    """The number of a request that was purged: what still comes of it is thrown away."""

    __tablename__ = "erased_request"
    __table_args__ = ({"sqlite_with_rowid": False},)

    request_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    erasure_id: Mapped[int]


class TrainingRequest(Base):
    """A request that a training run learnt from, or chose its result by."""

    __tablename__ = "training_request"
    __table_args__ = (Index(None, "request_id"), {"sqlite_with_rowid": False})

    run_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    request_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
