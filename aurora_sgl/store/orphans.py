"""Trace files that no row names: of a sidecar that was killed between file and row, and of rows
that somebody deleted who could not reach the file.

Only files of boots that this store has are looked at: what another store has written into the same
folder is not ours to judge.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import Protocol

from sqlalchemy import Engine, select

from aurora_sgl import wire
from aurora_sgl.store import queries
from aurora_sgl.store.connection import session
from aurora_sgl.store.models import Server

#: Seconds after which a file without a row is an orphan: of a boot whose records are all in the
#: store, and of others, whose row may still wait in a spool.
OWN_SECONDS, OTHERS_SECONDS = 600.0, 7 * 86_400.0
_TRACES = "traces"
_AT_ONCE = 2_000

log = logging.getLogger(__name__)


class SweptFiles(Protocol):
    """What the sweep needs of ``artifacts.ArtifactRoot``."""

    def files(self, folder: str) -> Iterator[tuple[str, float]]: ...

    def delete(self, uri: str) -> None: ...


def sweep_traces(
    engine: Engine, files: SweptFiles, stored_boots: Collection[int] = (), own: float = OWN_SECONDS
) -> int:
    """Delete the orphans; how many. ``stored_boots``: of which nothing waits in a spool, as it was
    when the call began or later. Raises ``AuroraError``, and what the database raises."""
    uris: dict[int, str] = {}
    for uri, age in files.files(_TRACES):
        name = uri.rpartition("/")[2].removesuffix(".safetensors")
        if not name.isdecimal() or len(name) > 19 or uri.endswith(name):
            continue
        request_id = int(name)
        is_stored = request_id >> wire.REQUEST_COUNTER_BITS in stored_boots
        if age > (own if is_stored else OTHERS_SECONDS):
            uris[request_id] = uri
    count = 0
    ids = list(uris)
    for begin in range(0, len(ids), _AT_ONCE):
        for request_id in _without_row(engine, ids[begin : begin + _AT_ONCE]):
            files.delete(uris[request_id])
            count += 1
    if count:
        log.info("%d trace files that no row names are deleted", count)
    return count


def _without_row(engine: Engine, request_ids: list[int]) -> set[int]:
    boots = {request_id >> wire.REQUEST_COUNTER_BITS for request_id in request_ids}
    with session(engine, write=False) as s:
        ours = set(s.scalars(select(Server.boot_id).where(Server.boot_id.in_(boots))))
        asked = [one for one in request_ids if one >> wire.REQUEST_COUNTER_BITS in ours]
        return queries.traces.without_trace(s, asked)
