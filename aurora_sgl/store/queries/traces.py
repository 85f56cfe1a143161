"""Traces: where the hidden states of a request lie."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import Request, Trace
from aurora_sgl.store.salt import Salt
from aurora_sgl.store.upsert import upsert


def add_trace(
    s: Session,
    *,
    request_id: int,
    uri: str,
    bytes: int,
    sha256: str,
    start: int,
    end: int,
    output_start: int,
    prompt_sha256: str,
    head_sha256: str,
    greedy: bool,
    aux_width: int,
    last_width: int,
    dtype: str,
    created_at: datetime | None = None,
) -> None:
    """Record a trace file; a second file of the same request takes the place of the first. Hashes
    of tokens are kept salted.

    The request's row must exist (ingest its start first).
    """
    salt = Salt(s.connection())
    row = {
        "request_id": request_id,
        "uri": uri,
        "bytes": bytes,
        "sha256": sha256,
        "created_at": created_at or utc_now(),
        "start": start,
        "end": end,
        "output_start": output_start,
        "prompt_sha256": salt(prompt_sha256),
        "head_sha256": salt(head_sha256),
        "greedy": greedy,
        "aux_width": aux_width,
        "last_width": last_width,
        "dtype": dtype,
    }
    changed = [column for column in row if column not in ("request_id", "created_at")]
    upsert(s.connection(), Trace, [{**row, "pinned": False}], ["request_id"], changed)
    s.execute(update(Request).where(Request.id == request_id).values(traced=True))


def trace(s: Session, request_id: int) -> Trace | None:
    """Where the hidden states of a request lie; None when it has no trace, or no longer."""
    return s.get(Trace, request_id)


def traces_oldest_first(
    s: Session, limit: int | None = None, *, with_pinned: bool = False
) -> Sequence[Trace]:
    query = select(Trace).order_by(Trace.created_at, Trace.request_id)
    if not with_pinned:
        query = query.where(~Trace.pinned)
    return s.scalars(query.limit(limit)).all()


def trace_bytes_total(s: Session) -> int:
    return int(s.scalar(select(func.coalesce(func.sum(Trace.bytes), 0))) or 0)


def trace_bytes_mean(s: Session) -> float:
    """Of one request's trace; 0 without any."""
    return float(s.scalar(select(func.avg(Trace.bytes))) or 0.0)


def delete_traces(s: Session, request_ids: Sequence[int]) -> None:
    """Forget these traces. Delete their files after the commit: a file without a row is only
    litter, a row without a file is a lie."""
    for begin in range(0, len(request_ids), 500):
        part = request_ids[begin : begin + 500]
        s.execute(delete(Trace).where(Trace.request_id.in_(part)))
        s.execute(update(Request).where(Request.id.in_(part)).values(traced=False))


def pin_traces(s: Session, request_ids: Sequence[int], pinned: bool = True) -> None:
    """Pinned traces are kept beyond the byte budget (a held-out set, for one)."""
    for begin in range(0, len(request_ids), 500):
        part = request_ids[begin : begin + 500]
        s.execute(update(Trace).where(Trace.request_id.in_(part)).values(pinned=pinned))
