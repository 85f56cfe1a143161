"""The oldest traces of a group, until the rest fits its budget."""

from __future__ import annotations

from sqlalchemy import Engine

from aurora_sgl.store import queries
from aurora_sgl.store.connection import session
from aurora_sgl.store.pruning.pace import PrunePace

#: Traces of one transaction.
ROUND = 200


def over_budget(
    engine: Engine, group_id: int, budget: int, limit: int | None = None
) -> list[tuple[int, str, int]]:
    """(request id, URI, bytes) of the traces that are too many, at most ``limit`` of them."""
    with session(engine, write=False) as s:
        excess = queries.traces.trace_bytes_total(s, group_id) - budget
        chosen: list[tuple[int, str, int]] = []
        if excess <= 0:
            return chosen
        for trace in queries.traces.traces_oldest_first(s, limit, group_id=group_id):
            if excess <= 0:
                break
            chosen.append((trace.request_id, trace.uri, trace.bytes))
            excess -= trace.bytes
        return chosen


def prune_traces(
    engine: Engine, pace: PrunePace, group_id: int, budget: int
) -> tuple[int, int, list[str]]:
    """How many went, their bytes, and their files."""
    count = freed = 0
    uris: list[str] = []
    while chosen := over_budget(engine, group_id, budget, ROUND):
        with session(engine) as s:
            queries.traces.delete_traces(s, [request_id for request_id, _, _ in chosen])
        count, freed = count + len(chosen), freed + sum(size for _, _, size in chosen)
        uris += [uri for _, uri, _ in chosen]
        pace.rest(0.05)
    return count, freed, uris
