"""Counts of what was lost on the way into the store."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import DropCount, Server
from aurora_sgl.store.upsert import insert


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
