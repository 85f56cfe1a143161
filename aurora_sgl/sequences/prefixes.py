"""Holes at the start of a trace, filled from traces that share the tokens.

A prefix that came from the radix cache was not computed again, so its hidden states were not seen.
They depend on the tokens before them alone, so any trace of the same tokens has the same ones.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from aurora_sgl.errors import AuroraError
from aurora_sgl.sequences.trace_reader import read_tokens
from aurora_sgl.store.queries.requests import RecentRequest
from aurora_sgl.trace_format import HEAD_TOKENS

Locate = Callable[[str], Path]  # uri of a trace -> a file on this machine

_TOKENS_KEPT = 256  # traces whose tokens stay in memory


@dataclass(frozen=True)
class Piece:
    """Features of positions ``begin .. end - 1`` from one trace, whose own start is ``start``."""

    uri: str
    start: int
    begin: int
    end: int


class Prefixes:
    """Finds the pieces that make a request's features whole."""

    def __init__(self, rows: Iterable[RecentRequest], locate: Locate) -> None:
        self.locate = locate
        self.rows = list(rows)
        self.by_id = {row.request_id: row for row in self.rows}
        self.by_head: dict[str, list[RecentRequest]] = defaultdict(list)
        for row in self.rows:
            self.by_head[row.head_sha256].append(row)
        self.tokens: OrderedDict[str, torch.Tensor] = OrderedDict()

    def pieces(self, row: RecentRequest) -> tuple[Piece, ...] | None:
        """Pieces from position 0 to ``row.end`` in order; None when the hole cannot be filled."""
        pieces = [Piece(row.uri, row.start, row.start, row.end)]
        need, link = row.start, row
        while need > 0:
            donor = self._donor(row, need, link.donor_id)
            if donor is None:
                return None
            pieces.append(Piece(donor.uri, donor.start, donor.start, need))
            need, link = donor.start, donor
        return tuple(reversed(pieces))

    def _donor(self, row: RecentRequest, need: int, noted: int | None) -> RecentRequest | None:
        """The trace that the store notes; without one that which reaches furthest back among those
        that hold position ``need - 1``."""
        first = self.by_id.get(noted) if noted is not None else None
        if first is not None and self._holds(first, row, need):
            return first
        near = self.by_head[row.head_sha256] if need >= HEAD_TOKENS else self.rows
        fitting = [d for d in near if d.start < need <= d.end and d.request_id != row.request_id]
        in_order = sorted(fitting, key=lambda d: (d.start, d.request_id))
        return next((donor for donor in in_order if self._holds(donor, row, need)), None)

    def _holds(self, donor: RecentRequest, row: RecentRequest, need: int) -> bool:
        if not donor.start < need <= donor.end:
            return False
        own = self.tokens_of(row)
        try:
            other = self.tokens_of(donor)
        except AuroraError:
            return False  # a broken donor is no donor
        return len(other) >= need and bool((other[:need] == own[:need]).all())

    def tokens_of(self, row: RecentRequest) -> torch.Tensor:  # [T] int64
        """Raises ``AuroraError`` when the trace is missing or broken."""
        if row.uri in self.tokens:
            self.tokens.move_to_end(row.uri)
            return self.tokens[row.uri]
        self.tokens[row.uri] = read_tokens(self.locate(row.uri))
        if len(self.tokens) > _TOKENS_KEPT:
            self.tokens.popitem(last=False)
        return self.tokens[row.uri]
