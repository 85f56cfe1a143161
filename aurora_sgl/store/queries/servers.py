"""The servers of a group, one row a boot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from aurora_sgl import wire
from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import (
    AcceptanceMinute,
    DeploymentGroup,
    Request,
    Server,
    SpoolWatermark,
)
from aurora_sgl.store.queries.limits import limits
from aurora_sgl.store.queries.traces import trace_bytes_mean
from aurora_sgl.store.queries.versions import known_version
from aurora_sgl.store.store_clock import StoreNow, store_now
from aurora_sgl.store.upsert import insert_missing, storable
from aurora_sgl.trace_room import TraceRoom


def group_of_boot(s: Session, boot_id: int) -> str | None:
    """The name of the group that this boot of a server is in; ``None`` for a boot without row."""
    return s.scalar(
        select(DeploymentGroup.name)
        .join(Server, Server.group_id == DeploymentGroup.id)
        .where(Server.boot_id == boot_id)
    )


def server_of_boot(s: Session, boot_id: int) -> Server | None:
    return s.scalars(select(Server).where(Server.boot_id == boot_id)).one_or_none()


def register_server(s: Session, group_id: int, hello: wire.Hello) -> Server:
    """The row of this boot, made or refreshed from what the engine says of itself."""
    labels = hello.server
    row: dict[str, Any] = {
        "group_id": group_id,
        "boot_id": hello.boot_id,
        "started_at": utc_now(),
        "last_seen_at": (now := store_now(s)),
        **{
            name: storable(str(labels.get(name, "")))
            for name in ("name", "sglang_version", "dtype")
        },
    }
    if (left := _left_behind(s, hello.boot_id)) is not None:
        row["id"] = left
    insert_missing(s.connection(), Server, [row], ["boot_id"])
    server = s.scalars(select(Server).where(Server.boot_id == hello.boot_id)).one()
    if server.group_id != group_id:
        raise AuroraError(f"server {server.name!r} (boot {hello.boot_id}) is in another group")
    come_back(s, server.id)
    server.last_seen_at = now
    server.state = "running"
    server.counters = storable(hello.counters)
    server.notices = storable(hello.notices)
    if hello.live_version_id:
        live = s.scalar(select(known_version(hello.live_version_id)))
        if live != server.live_version_id:
            server.live_sha256 = ""  # the hash that is there is of the version before
        server.live_version_id = live
    s.flush()
    return server


def _left_behind(s: Session, boot_id: int) -> int | None:
    """The id of the boot's row when it was deleted and rows that name it stayed, which SQLite lets
    anybody do; else ``None``. The next server would get it otherwise, and those rows with it."""
    return s.scalar(
        select(SpoolWatermark.server_id)
        .outerjoin(Server, Server.id == SpoolWatermark.server_id)
        .where(SpoolWatermark.boot_id == boot_id, Server.id.is_(None))
    )


def touch_server(s: Session, server_id: int, **fields: Any) -> None:
    """Set columns of ``server``; without any, ``last_seen_at`` becomes now, by the store's clock
    as all that decides who is there."""
    if fields.get("live_version_id"):
        fields["live_version_id"] = known_version(fields["live_version_id"])
    s.execute(
        update(Server)
        .where(Server.id == server_id)
        .values(fields or {"last_seen_at": StoreNow()})
        .execution_options(synchronize_session="fetch")
    )


def report_server(s: Session, server_id: int, **fields: Any) -> bool:
    """As ``touch_server``, for a server that runs. True: it had counted as gone, and is back."""
    if fields.get("live_version_id"):
        fields["live_version_id"] = known_version(fields["live_version_id"])
    here = s.scalar(
        update(Server)
        .where(Server.id == server_id, Server.state != "gone")
        .values(fields)
        .returning(Server.id)
        .execution_options(synchronize_session=False)
    )
    if here is not None or not come_back(s, server_id):
        return False
    touch_server(s, server_id, **fields)
    return True


def server(s: Session, server_id: int) -> Server:
    row = s.get(Server, server_id)
    if row is None:
        raise AuroraError(f"there is no server with id {server_id}")
    return row


def servers(
    s: Session, group_id: int | None = None, *, states: Sequence[str] = ("running",)
) -> Sequence[Server]:
    """Boots in these states, newest first."""
    query = select(Server).where(Server.state.in_(states)).order_by(Server.id.desc())
    if group_id is not None:
        query = query.where(Server.group_id == group_id)
    return s.scalars(query).all()


def trace_room(
    s: Session, group_id: int | None = None, *, states: Sequence[str] = ("running",)
) -> TraceRoom | None:
    """What the budgets of traces hold, of the newest server that captures; None without one. The
    files' budget is the group's, where it has one."""
    mean = trace_bytes_mean(s)
    for row in servers(s, group_id, states=states):
        room = TraceRoom.of(row.counters, mean)
        if room is not None:
            budget = limits(s, row.group_id).trace_bytes
            return room if budget is None else replace(room, disk_bytes=budget)
    return None


def earlier_boots(s: Session, server: Server) -> Sequence[Server]:
    """Other boots of the same name in the same group that still count as running."""
    return s.scalars(
        select(Server).where(
            Server.group_id == server.group_id,
            Server.name == server.name,
            Server.id != server.id,
            Server.state == "running",
        )
    ).all()


def silent_servers(s: Session, group_id: int, seconds: float) -> Sequence[Server]:
    """Servers that count as running and were not heard of for so long, by the store's clock."""
    return s.scalars(
        select(Server).where(
            Server.group_id == group_id,
            Server.state == "running",
            Server.last_seen_at < StoreNow(seconds),
        )
    ).all()


def end_silent(s: Session, server: Server, seconds: float) -> int | None:
    """It is gone, and its running requests are lost; how many were. ``None``: it has spoken."""
    silent = s.scalar(
        select(Server.id)
        .where(
            Server.id == server.id,
            Server.state == "running",
            Server.last_seen_at < StoreNow(seconds),
        )
        .with_for_update()
    )
    return None if silent is None else mark_lost(s, server.id, server.boot_id)


def come_back(s: Session, server_id: int) -> bool:
    """A server that counted as gone speaks again: it runs, and so do the requests that were given
    up with it. False: it was not gone."""
    boot_id = s.scalar(
        update(Server)
        .where(Server.id == server_id, Server.state == "gone")
        .values(state="running", last_seen_at=StoreNow())
        .returning(Server.boot_id)
        .execution_options(synchronize_session=False)
    )
    if boot_id is None:
        return False
    first = boot_id << wire.REQUEST_COUNTER_BITS
    s.execute(
        update(Request)
        .where(
            Request.server_id == server_id,
            Request.status == "lost",
            Request.id.between(first, first + (1 << wire.REQUEST_COUNTER_BITS) - 1),
        )
        .values(status="running", finished_at=None)
        .execution_options(synchronize_session=False)
    )
    return True


def mark_lost(s: Session, server_id: int, boot_id: int) -> int:
    """A boot is gone: its running requests are ``lost``. Returns how many were."""
    first = boot_id << wire.REQUEST_COUNTER_BITS
    lost = s.execute(
        update(Request)
        .where(
            Request.server_id == server_id,
            Request.status == "running",
            Request.id.between(first, first + (1 << wire.REQUEST_COUNTER_BITS) - 1),
        )
        .values(status="lost", finished_at=utc_now())
    )
    s.execute(
        update(Server)
        .where(Server.id == server_id, Server.boot_id == boot_id, Server.state == "running")
        .values(state="gone")
    )
    return int(lost.rowcount)  # type: ignore[attr-defined]


def served_shape(s: Session, group_id: int) -> tuple[int, int, int] | None:
    """(depth, top-k, nodes) that the group's newest server was started with, running or not, or of
    most steps with drafts where it did not say; ``None``: nobody knows. Busy steps may carry
    smaller trees; what is trained and replayed are whole ones."""
    query = select(Server).where(Server.group_id == group_id)
    server = s.scalar(query.order_by(Server.state != "running", Server.id.desc()).limit(1))
    counters = server.counters if server is not None else {}
    if counters.get("depth") and counters.get("topk") and counters.get("nodes"):
        return int(counters["depth"]), int(counters["topk"]), int(counters["nodes"])
    m = AcceptanceMinute
    steps = func.sum(m.verify_steps)
    minutes = (
        select(m.depth, m.topk, m.nodes)
        .join(Server, Server.id == m.server_id)
        .where(Server.group_id == group_id, m.depth > 0, m.nodes > 0)
        .group_by(m.depth, m.topk, m.nodes)
        .order_by(steps.desc())
        .limit(1)
    )
    row = s.execute(minutes).one_or_none()
    return None if row is None else (row[0], row[1], row[2])
