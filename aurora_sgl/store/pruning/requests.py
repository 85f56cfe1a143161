"""Old requests, with their traces, tallies and what training noted of them. What people pinned
keeps its request; the reservoir of training, which is pinned too, does not."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ColumnElement, Connection, Engine, delete, exists, func, select

from aurora_sgl.store.connection import reading
from aurora_sgl.store.models import Request, RequestTally, Server, Trace, TrainingRequest
from aurora_sgl.store.pruning.kept import RESERVOIR
from aurora_sgl.store.pruning.pace import PrunePace


def count_old(engine: Engine, group_id: int, cutoff: datetime) -> int:
    """Requests that :func:`prune_requests` would delete."""
    query = select(func.count()).select_from(Request)
    with reading(engine) as connection:
        return sum(
            connection.scalar(query.where(*which)) or 0
            for which in (_ended(group_id, cutoff), _abandoned(group_id, cutoff))
        )


def prune_requests(
    engine: Engine, pace: PrunePace, group_id: int, cutoff: datetime
) -> tuple[int, list[str]]:
    """How many went, and the files of the traces that went with them."""
    uris: list[str] = []
    position: datetime | None = None  # what stays, of other groups for one, is passed once

    def ended(connection: Connection, most: int) -> int:
        nonlocal position
        query = select(Request.id, Request.finished_at).where(*_ended(group_id, cutoff))
        if position is not None:
            query = query.where(Request.finished_at >= position)
        rows = connection.execute(query.order_by(Request.finished_at).limit(most)).all()
        if rows:
            position = rows[-1].finished_at
        return _delete(connection, [row.id for row in rows], uris)

    def abandoned(connection: Connection, most: int) -> int:
        query = select(Request.id).where(*_abandoned(group_id, cutoff)).limit(most)
        return _delete(connection, list(connection.scalars(query)), uris)

    return pace.all_of(engine, ended) + pace.all_of(engine, abandoned), uris


def _ended(group_id: int, cutoff: datetime) -> tuple[ColumnElement[bool], ...]:
    ours = select(Server.id).where(Server.group_id == group_id)
    return (Request.finished_at < cutoff, Request.server_id.in_(ours), _is_not_pinned())


def _abandoned(group_id: int, cutoff: datetime) -> tuple[ColumnElement[bool], ...]:
    """Nobody will end them: their server is not there any more."""
    over = select(Server.id).where(Server.group_id == group_id, Server.state != "running")
    return (
        Request.status == "running",
        Request.finished_at.is_(None),
        Request.server_id.in_(over),
        Request.admitted_at < cutoff,
        _is_not_pinned(),
    )


def _is_not_pinned() -> ColumnElement[bool]:
    """Nor is its trace needed by a pinned one."""
    pinned = Trace.pinned & (Trace.pin_reason != RESERVOIR)
    is_pinned = exists().where(Trace.request_id == Request.id, pinned)
    return ~is_pinned & ~exists().where(Trace.donor_id == Request.id, pinned)


def _delete(connection: Connection, ids: list[int], uris: list[str]) -> int:
    if ids:
        traces = delete(Trace).where(Trace.request_id.in_(ids)).returning(Trace.uri)
        uris.extend(connection.scalars(traces))
        for model in (RequestTally, TrainingRequest):
            connection.execute(delete(model).where(model.request_id.in_(ids)))
        connection.execute(delete(Request).where(Request.id.in_(ids)))
    return len(ids)
