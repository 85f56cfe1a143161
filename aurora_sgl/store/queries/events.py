"""Acceptance events: every verify step as it was recorded."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from aurora_sgl import wire
from aurora_sgl.store.events import PACKED_INTS
from aurora_sgl.store.models import AcceptanceEvent, Request, Server
from aurora_sgl.store.packing import unpack_floats, unpack_ints


def events(s: Session, request_id: int) -> list[dict[str, Any]]:
    """Verify steps in order; token columns as lists of int, log-probabilities as floats or None."""
    table = AcceptanceEvent.__table__
    rows = s.execute(select(table).where(table.c.request_id == request_id).order_by(table.c.step))
    decoded = []
    for row in rows.mappings():
        event = dict(row)
        for name in PACKED_INTS:
            event[name] = unpack_ints(event[name])
        packed = event["draft_logprobs"]
        event["draft_logprobs"] = unpack_floats(packed) if packed is not None else None
        decoded.append(event)
    return decoded


def step_moments(s: Session, server_id: int) -> dict[int, list[datetime]]:
    """When the verify steps of each request of a server were made, in order, by request id."""
    rows = s.execute(
        select(AcceptanceEvent.request_id, AcceptanceEvent.at)
        .join(Request, Request.id == AcceptanceEvent.request_id)
        .where(Request.server_id == server_id)
        .order_by(AcceptanceEvent.request_id, AcceptanceEvent.step)
    )
    times: dict[int, list[datetime]] = {}
    for request_id, moment in rows:
        times.setdefault(request_id, []).append(moment)
    return times


def count_events(s: Session, server_id: int) -> int:
    """Verify steps of one server that are in the store (until retention takes them)."""
    boot_id = s.scalar(select(Server.boot_id).where(Server.id == server_id))
    if boot_id is None:
        return 0
    first = wire.request_id(boot_id, 1) - 1
    last = first + (1 << wire.REQUEST_COUNTER_BITS) - 1
    return (
        s.scalar(
            select(func.count())
            .select_from(AcceptanceEvent)
            .where(AcceptanceEvent.request_id.between(first, last))
        )
        or 0
    )
