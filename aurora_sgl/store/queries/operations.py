"""Kill switches, leases, watermarks and counts of what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import DropCount, Lease, Server, SpoolWatermark, Switch
from aurora_sgl.store.upsert import insert, upsert


def set_switch(
    s: Session, group_id: int, name: str, enabled: bool, *, actor: str, reason: str
) -> None:
    """Raises ``AuroraError`` without an actor or a reason."""
    if not actor.strip() or not reason.strip():
        raise AuroraError(f"switching {name} needs an actor and a reason (--reason)")
    row = {
        "group_id": group_id,
        "name": name,
        "enabled": enabled,
        "actor": actor,
        "reason": reason,
        "updated_at": utc_now(),
    }
    change = ["enabled", "actor", "reason", "updated_at"]
    upsert(s.connection(), Switch, [row], ["group_id", "name"], change)


def is_on(s: Session, group_id: int, name: str) -> bool:
    """A switch that was never set is on."""
    enabled = s.scalar(
        select(Switch.enabled).where(Switch.group_id == group_id, Switch.name == name)
    )
    return True if enabled is None else enabled


def switches(s: Session, group_id: int) -> Sequence[Switch]:
    return s.scalars(select(Switch).where(Switch.group_id == group_id).order_by(Switch.name)).all()


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
    seen: tuple[int, datetime],
    now: datetime | None = None,
) -> int | None:
    """Take a lease that has not expired from a holder that did not renew it: only while its
    (token, expires_at) are still ``seen``. Its new token, or ``None`` when they are not."""
    now = now or utc_now()
    return s.scalar(
        update(Lease)
        .where(Lease.name == name, Lease.token == seen[0], Lease.expires_at == seen[1])
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


def watermark(s: Session, server_id: int, boot_id: int) -> int:
    """The last envelope of a boot that was taken; 0: none."""
    return s.scalar(
        select(SpoolWatermark.last_seq).where(
            SpoolWatermark.server_id == server_id, SpoolWatermark.boot_id == boot_id
        )
    ) or 0  # fmt: skip


def set_drops(s: Session, server_id: int, place: str, total: int) -> None:
    """What was lost at this place since the boot; a smaller total than the stored one is old
    news and changes nothing. So a retry counts nothing twice."""
    if total <= 0:
        return
    row = {"server_id": server_id, "place": place, "count": total, "updated_at": utc_now()}
    statement = insert(s.connection(), DropCount).values(row)
    s.execute(
        statement.on_conflict_do_update(
            index_elements=["server_id", "place"],
            set_={"count": total, "updated_at": row["updated_at"]},
            where=DropCount.count < total,
        )
    )


def add_drops(s: Session, server_id: int, place: str, count: int) -> None:
    """Count more as lost at this place."""
    if count <= 0:
        return
    row = {"server_id": server_id, "place": place, "count": count, "updated_at": utc_now()}
    statement = insert(s.connection(), DropCount).values(row)
    s.execute(
        statement.on_conflict_do_update(
            index_elements=["server_id", "place"],
            set_={"count": DropCount.count + count, "updated_at": row["updated_at"]},
        )
    )


def drops(s: Session, group_id: int) -> dict[str, int]:
    """What was lost by place, over all boots of the group."""
    rows = s.execute(
        select(DropCount.place, DropCount.count)
        .join(Server, Server.id == DropCount.server_id)
        .where(Server.group_id == group_id)
    )
    total: dict[str, int] = {}
    for place, count in rows:
        total[place] = total.get(place, 0) + count
    return total
