"""Trace rows in the store, and the byte budget that a group has for its trace files.

The budget lies in the store: whatever this server's settings say, they cut nobody's traces.
"""

from __future__ import annotations

import logging
from collections import Counter

import msgspec
import numpy as np

from aurora_sgl import clock
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.traces.derived import DerivedConversations
from aurora_sgl.sidecar.traces.donors import Donors
from aurora_sgl.sidecar.traces.writer import TraceRow
from aurora_sgl.store import queries
from aurora_sgl.store.erased import erased_ids
from aurora_sgl.store.faults import Kind, fault_of, in_words
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.pruning.traces import ROUND, over_budget

log = logging.getLogger(__name__)


class TraceStore:
    """Used by the batcher's thread alone."""

    def __init__(self, link: StoreLink, artifacts: ArtifactRoot) -> None:
        self._link = link
        self._artifacts = artifacts
        self._donors = Donors(link, artifacts)
        self.counts: Counter[str] = Counter()
        self._conversations = DerivedConversations()

    def add(self, rows: list[TraceRow]) -> None:
        """Insert rows, note whose rows they need, then delete what is over the budgets of their
        groups. The files of requests that were purged meanwhile go. Raises ``StoreAway``."""
        if rows:
            rows = self._without_purged(rows)
        if not rows:
            return
        if self._refusal(rows) is not None:
            for row in rows:
                kind = self._refusal([row])
                if kind is Kind.LOST_ROW:  # the record of its request was lost on the way
                    self.counts["without_request"] += 1
                elif kind is Kind.DATA:
                    self.counts["refused"] += 1
                if kind is not None:
                    self.delete(row.uri)
        with self._link.session(write=False) as s:
            ids = [row.request_id for row in rows]
            groups = {one: queries.traces.groups_of_traces(s, [one]) for one in ids}
        for group_id in sorted({group for of_one in groups.values() for group in of_one}):
            self._donors.note(group_id, [one for one in ids if group_id in groups[one]])
            self.enforce(group_id)

    def missing(self, rows: list[TraceRow]) -> list[TraceRow]:
        """Of rows that are read again those that the store has not, and whose files are there: the
        others were deleted since. Raises ``StoreAway``."""
        with self._link.session(write=False) as s:
            gone = [row for row in rows if queries.traces.trace(s, row.request_id) is None]
        return [row for row in gone if self._artifacts.exists(row.uri)]

    def _without_purged(self, rows: list[TraceRow]) -> list[TraceRow]:
        with self._link.session(write=False) as s:
            purged = erased_ids(s.connection(), (row.request_id for row in rows))
        for row in rows:
            if row.request_id in purged:
                self.delete(row.uri)
                self.counts["purged"] += 1
        return [row for row in rows if row.request_id not in purged]

    def _refusal(self, rows: list[TraceRow]) -> Kind | None:
        """Insert all the rows or none; whose fault it is when the store takes none."""
        try:
            self._insert(rows)
        except Exception as error:
            fault = fault_of(error)
            if fault is None or fault.kind not in (Kind.DATA, Kind.LOST_ROW):
                raise
            if len(rows) == 1:
                log.warning("the trace %s is not kept: %s", rows[0].uri, in_words(error))
            return fault.kind
        return None

    def _insert(self, rows: list[TraceRow]) -> None:
        with self._link.session() as s:
            self._conversations.refresh(s)
            for row in rows:
                fields = msgspec.structs.asdict(row)
                created_at = clock.from_us(fields.pop("created_us"))
                tokens = np.frombuffer(fields.pop("tokens"), np.int32)
                queries.traces.add_trace(s, **fields, created_at=created_at)
                self._conversations.place(s, row.request_id, tokens, row.output_start)
        self.counts["added"] += len(rows)

    def enforce(self, group_id: int) -> None:
        """Delete traces of the group until the rest fits its budget (see ``pruning.kept``).

        Rows go before files, so that no row names a file that is gone. A file of another machine's
        folder is swept there, see ``store.orphans``.
        """
        with self._link.session(write=False) as s:
            budget = queries.limits.limits(s, group_id).trace_bytes
        if budget is None:
            return
        while True:
            with self._link.guard() as engine:
                victims = over_budget(engine, group_id, budget, ROUND)
            if not victims:
                return
            with self._link.session() as s:
                queries.traces.delete_traces(s, [request_id for request_id, _, _ in victims])
            for _, uri, _ in victims:
                self.delete(uri)
            self.counts["evicted"] += len(victims)

    def delete(self, uri: str) -> None:
        try:
            self._artifacts.delete(uri)
        except (OSError, AuroraError) as error:
            self.counts["undeleted"] += 1
            log.warning("can't delete %s: %s", uri, error)
