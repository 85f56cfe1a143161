"""The verify steps of one request, decoded."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from aurora_sgl.store.models import AcceptanceEvent, Request
from aurora_sgl.store.packing import unpack_floats, unpack_ints

_PACKED = ("draft_tokens", "draft_parents", "accepted_nodes", "target_tokens")


def events(s: Session, request_id: int) -> list[dict[str, Any]]:
    """Verify steps in order; token columns as lists of int, log-probabilities as floats or None."""
    table = AcceptanceEvent.__table__
    found = s.execute(select(table).where(table.c.request_id == request_id).order_by(table.c.step))
    decoded = []
    for row in found.mappings():
        event = dict(row)
        for name in _PACKED:
            event[name] = unpack_ints(event[name])
        packed = event["draft_logprobs"]
        event["draft_logprobs"] = unpack_floats(packed) if packed is not None else None
        decoded.append(event)
    return decoded


def step_times(s: Session, server_id: int) -> dict[int, list[datetime]]:
    """When the verify steps of each request of a server were made, in order, by request id."""
    found = s.execute(
        select(AcceptanceEvent.request_id, AcceptanceEvent.at)
        .join(Request, Request.id == AcceptanceEvent.request_id)
        .where(Request.server_id == server_id)
        .order_by(AcceptanceEvent.request_id, AcceptanceEvent.step)
    )
    times: dict[int, list[datetime]] = {}
    for request_id, at in found:
        times.setdefault(request_id, []).append(at)
    return times
