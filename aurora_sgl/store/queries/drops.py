"""Counts of what was lost on the way into the store."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import DropCount, Server
from aurora_sgl.store.upsert import insert

#: The place under which those are counted that were refused and could be stored later.
STORED_LATER = "stored_later"


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


def drops(s: Session, group_id: int, *, since: datetime | None = None) -> dict[str, int]:
    """What was lost by place, over all boots of the group, or over those that lost something there
    after a moment. Records, but for the place ``trace``, which counts traces. What was refused and
    stored later is not lost."""
    query = (
        select(DropCount.place, DropCount.server_id, DropCount.count, DropCount.updated_at)
        .join(Server, Server.id == DropCount.server_id)
        .where(Server.group_id == group_id)
    )
    rows = s.execute(query).tuples().all()
    later = {server_id: count for place, server_id, count, _ in rows if place == STORED_LATER}
    total: dict[str, int] = {}
    for place, server_id, count, updated_at in rows:
        if place == STORED_LATER or (since is not None and updated_at < since):
            continue
        stored = later.get(server_id, 0) if place == "rejected" else 0
        total[place] = total.get(place, 0) + max(0, count - stored)
    return {place: count for place, count in total.items() if count}


def drops_of_server(s: Session, server_id: int) -> dict[str, int]:
    """What was lost by place of one boot."""
    query = select(DropCount.place, DropCount.count).where(DropCount.server_id == server_id)
    return {place: count for place, count in s.execute(query)}
