"""Leases: one holder at a time, told apart by a token that grows."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import or_, update
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import Lease
from aurora_sgl.store.upsert import insert


def acquire_lease(
    s: Session, name: str, holder: str, seconds: float, now: datetime | None = None
) -> int | None:
    """Take the lease, or take it again; its token, or ``None`` while another one holds it.

    One statement, so that of two that try at once one wins. The token grows by one with each
    acquisition.
    """
    now = now or utc_now()
    until = now + timedelta(seconds=seconds)
    statement = insert(s.connection(), Lease).values(
        name=name, holder=holder, token=1, acquired_at=now, expires_at=until
    )
    taken = statement.on_conflict_do_update(
        index_elements=["name"],
        set_={
            "holder": holder,
            "token": Lease.token + 1,
            "acquired_at": now,
            "expires_at": until,
        },
        where=or_(Lease.expires_at <= now, Lease.holder == holder),
    ).returning(Lease.token)
    return s.scalar(taken)


def renew_lease(
    s: Session, name: str, holder: str, token: int, seconds: float, now: datetime | None = None
) -> bool:
    """Hold it for longer; ``False``: it is lost, stop what it allowed."""
    now = now or utc_now()
    return (
        s.scalar(
            update(Lease)
            .where(
                Lease.name == name,
                Lease.holder == holder,
                Lease.token == token,
                Lease.expires_at > now,
            )
            .values(expires_at=now + timedelta(seconds=seconds))
            .returning(Lease.token)
        )
        is not None
    )


def take_lease_over(
    s: Session,
    name: str,
    holder: str,
    seconds: float,
    observed: tuple[int, datetime],
    now: datetime | None = None,
) -> int | None:
    """Take a lease that has not expired from a holder that did not renew it: only while its
    (token, expires_at) are still ``observed``. Its new token, or ``None`` when they are not."""
    now = now or utc_now()
    return s.scalar(
        update(Lease)
        .where(Lease.name == name, Lease.token == observed[0], Lease.expires_at == observed[1])
        .values(
            holder=holder,
            token=Lease.token + 1,
            acquired_at=now,
            expires_at=now + timedelta(seconds=seconds),
        )
        .returning(Lease.token)
    )


def release_lease(s: Session, name: str, holder: str, token: int) -> None:
    """Give it back. The row stays, expired, so that tokens go on growing."""
    s.execute(
        update(Lease)
        .where(Lease.name == name, Lease.holder == holder, Lease.token == token)
        .values(expires_at=utc_now())
    )


def lease(s: Session, name: str) -> Lease | None:
    return s.get(Lease, name, populate_existing=True)
