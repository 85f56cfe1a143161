"""Swaps as the servers made them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from sqlalchemy import Connection, select, update
from sqlalchemy.orm import Session

from aurora_sgl import wire
from aurora_sgl.clock import from_us
from aurora_sgl.store.models import Server, Swap
from aurora_sgl.store.upsert import insert_missing, storable


def add_swaps(connection: Connection, server_id: int, done: Iterable[wire.SwapDone]) -> None:
    """One row an answer of the engine; the same answer again changes nothing."""
    rows = [
        {
            "server_id": server_id,
            "at": from_us(one.at_us),
            "version_id": one.version_id,
            "ok": one.ok,
            "reason": storable(one.reason),
            "live_sha256": one.live_sha256,
            "staged_ms": one.staged_ms,
            "apply_ms": one.apply_ms,
        }
        for one in done
    ]
    if rows:
        insert_missing(connection, Swap, rows, ["server_id", "at"])


def set_stall(s: Session, server_id: int, moment: datetime, longest_stall_ms: float) -> bool:
    """Note how long a swap held up the stream that waited longest; ``False``: no such row yet."""
    changed = update(Swap).where(Swap.server_id == server_id, Swap.at == moment)
    server = s.scalar(changed.values(longest_stall_ms=longest_stall_ms).returning(Swap.server_id))
    return server is not None


def swaps(s: Session, group_id: int, *, limit: int | None = None) -> Sequence[Swap]:
    """Of all servers of a group, newest first."""
    return s.scalars(
        select(Swap)
        .join(Server, Server.id == Swap.server_id)
        .where(Server.group_id == group_id)
        .order_by(Swap.at.desc(), Swap.server_id)
        .limit(limit)
    ).all()
