"""Which trace holds the rows that another one lacks: noted when the later of the two is stored.

A prefix that came from the radix cache was computed for an earlier request, whose trace has its
hidden states. It may still be on its way: a request can use the prefix of one that runs, and end
first. So each new trace looks for its donor, and for those whose donor it is.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.models import Trace
from aurora_sgl.store.salt import Salt
from aurora_sgl.trace_format import tokens_of

#: Traces looked at for one, the newest, and tokens of traces that stay in memory.
_LOOKED_AT, _TOKENS_KEPT = 256, 1 << 22

log = logging.getLogger(__name__)


class Donors:
    """Used by the batcher's thread alone."""

    def __init__(self, link: StoreLink, artifacts: ArtifactRoot) -> None:
        self._link, self._artifacts = link, artifacts
        self._tokens: OrderedDict[str, NDArray[np.int64]] = OrderedDict()
        self._kept = 0

    def note(self, group_id: int, request_ids: Sequence[int]) -> None:
        """These traces of a group were just stored. Raises ``StoreAway``."""
        pairs: dict[int, list[int]] = defaultdict(list)  # donor -> those that need it
        with self._link.session(write=False) as s:
            for request_id in request_ids:
                trace = queries.traces.trace(s, request_id)
                if trace is None:
                    continue
                donor = self._donor_of(s, group_id, trace)
                if donor is not None:
                    pairs[donor].append(request_id)
                pairs[request_id] += self._needed_by(s, group_id, trace)
        if any(pairs.values()):
            with self._link.session() as s:
                for donor, needed_by in pairs.items():
                    queries.traces.set_donor(s, needed_by, donor)

    def _donor_of(self, s: Session, group_id: int, trace: Trace) -> int | None:
        if not trace.prefix_sha256:
            return None
        donor = queries.traces.donor_of_prefix(s, group_id, trace.prefix_sha256)
        if donor is not None:
            return donor
        own = self._read(trace)
        candidates = queries.traces.may_hold(s, trace, group_id, _LOOKED_AT)
        for one in sorted(candidates, key=lambda c: c.start):  # the fewer links the better
            other = self._read(one)
            if len(own) and np.array_equal(other[: trace.start], own[: trace.start]):
                return one.request_id
        return None

    def _needed_by(self, s: Session, group_id: int, trace: Trace) -> list[int]:
        waiting = queries.traces.without_donor(s, trace, group_id, _LOOKED_AT)
        if not waiting:
            return []
        own, salt = self._read(trace), Salt(s.connection())
        starts = {one.start for one in waiting}
        hashes = {n: salt(sha256_ints(own[:n].tolist())) for n in starts if n <= len(own)}
        return [one.request_id for one in waiting if hashes.get(one.start) == one.prefix_sha256]

    def _read(self, trace: Trace) -> NDArray[np.int64]:
        """The tokens of a trace; none when its file is gone or broken."""
        if trace.uri in self._tokens:
            self._tokens.move_to_end(trace.uri)
            return self._tokens[trace.uri]
        try:
            with self._artifacts.open(trace.uri) as file:
                tokens = tokens_of(file)
        except (OSError, AuroraError, ValueError, KeyError, TypeError) as error:
            log.debug("no tokens of %s: %s", trace.uri, error)
            return np.empty(0, np.int64)
        self._tokens[trace.uri] = tokens
        self._kept += len(tokens)
        while self._kept > _TOKENS_KEPT and len(self._tokens) > 1:
            _, old = self._tokens.popitem(last=False)
            self._kept -= len(old)
        return tokens
