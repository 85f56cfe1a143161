"""The traces of a group that its budget has no room for; see ``kept``."""

from __future__ import annotations

from sqlalchemy import Engine

from aurora_sgl.store import queries
from aurora_sgl.store.connection import session
from aurora_sgl.store.pruning.kept import victims
from aurora_sgl.store.pruning.pace import PrunePace

#: Traces of one transaction.
ROUND = 200


def over_budget(
    engine: Engine, group_id: int, budget: int, limit: int | None = None
) -> list[tuple[int, str, int]]:
    """(request id, URI, bytes) of the traces that are too many, at most ``limit`` of them."""
    with session(engine, write=False) as s:
        if queries.traces.trace_bytes_total(s, group_id) <= budget:
            return []
        traces = queries.traces.held_traces(s, group_id)
    chosen = victims(traces, budget)[:limit]
    return [(trace.request_id, trace.uri, trace.bytes) for trace in chosen]


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
