"""Stores a batch of one boot; of a batch that the store refuses, all but the records to blame.

A batch that fails for an error of the data is halved until single records are left. A single one
is to blame when the store takes a sound record of each kind in its place (and gives it back);
when it doesn't, something is wrong with the store, and all waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from aurora_sgl import wire
from aurora_sgl.sidecar.refused import RefusedRecord
from aurora_sgl.store.faults import Kind, fault_of, in_words
from aurora_sgl.store.ingest import RULES, IngestRules, ingest, rehearse
from aurora_sgl.store.link import StoreLink

Envelope = tuple[int, Sequence[wire.Record]]  # its number and its records


class Sift:
    """One batch of one boot."""

    def __init__(
        self,
        link: StoreLink,
        server_id: int,
        boot_id: int,
        rules: IngestRules = RULES,
        *,
        expected: int = 0,
    ) -> None:
        """``expected``: the store's watermark as it was."""
        self._link = link
        self._server_id = server_id
        self._boot_id = boot_id
        self._rules = rules
        self._expected = expected
        self._rehearsed = False
        self.events = 0  # verify steps that are new in the store
        self.purged = 0  # records of requests that were purged
        self.refused: list[RefusedRecord] = []

    def store(self, batch: Sequence[Envelope]) -> None:
        """Raises ``StoreAway``, ``LostRow`` when the server's row is gone, and ``StoreBehind``."""
        why = self._try(batch)
        if not why:
            return
        if len(batch) > 1:
            half = len(batch) // 2
            self.store(batch[:half])
            self.store(batch[half:])
            return
        ((seq, records),) = batch
        self._divide(seq, records, why)
        self._try([(seq, [])])  # now the watermark may pass it

    def _divide(self, seq: int, records: Sequence[wire.Record], why: str) -> None:
        if len(records) == 1:
            self._rehearse()
            self.refused.append(RefusedRecord(self._boot_id, seq, records[0], why))
            return
        half = len(records) // 2
        for part in (records[:half], records[half:]):
            if why := self._try([(seq, part)], partial=True):
                self._divide(seq, part, why)

    def _try(self, batch: Sequence[Envelope], *, partial: bool = False) -> str:
        """Why the data were refused; "" when the store has them."""
        try:
            self._take(batch, partial=partial)
        except Exception as error:
            fault = fault_of(error)
            if fault is None or fault.kind is not Kind.DATA:
                raise
            if not any(records for _, records in batch):
                self._link.away(error)
            return in_words(error)
        return ""

    def _take(self, batch: Sequence[Envelope], *, partial: bool = False) -> None:
        with self._link.guard() as engine:
            result = ingest(
                engine,
                self._server_id,
                self._boot_id,
                batch,
                partial=partial,
                expected=self._expected,
                rules=self._rules,
            )
        self.events += result.inserted_events
        self.purged += result.purged_records

    def _rehearse(self) -> None:
        if self._rehearsed:
            return
        try:
            with self._link.guard() as engine:
                rehearse(engine, self._server_id, self._boot_id)
        except Exception as error:
            fault = fault_of(error)
            if fault is None or fault.kind is not Kind.DATA:
                raise
            self._link.away(error)
        self._rehearsed = True
