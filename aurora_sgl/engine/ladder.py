"""Smaller trees for busier steps: the draft shapes that one server moves between.

Verifying costs more the more rows a step has, so the tree that pays for one request alone does not
for several at once. SGLang's worker reads depth and number of nodes anew in every step; its own
adaptive mode moves them for chains. Here a step of a tree is made smaller in the same way, within
what the server was started with, so that its cache holds every shape. No two shapes share depth and
top-k: what the store keeps by them is of one shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import log
from typing import Any, NamedTuple

#: How much wider a tree is by the logarithm of its drafts a level (replays of two SmolLM2-135M
#: drafters).
_WIDER = 0.53
_SIBLINGS = 4  # nodes of the widest tree of one level, with the root


class Rung(NamedTuple):
    """A draft shape: depth, and nodes with the root."""

    depth: int
    nodes: int

    @property
    def width(self) -> float:
        """How many tries a level is worth: its token is accepted with 1 - (1 - p)^width where that
        of a chain is with p."""
        return 1.0 + _WIDER * log((self.nodes - 1) / self.depth) if self.depth else 1.0


#: A step without drafts.
PLAIN = Rung(0, 1)


def rungs(depth: int, topk: int, nodes: int) -> tuple[Rung, ...]:
    """The shapes up to what the server was started with, those that take longer last. A chain has a
    node for each level. Trees begin with one draft, then several on one level, which need no more
    of the drafter; each further level doubles the nodes."""
    if topk == 1:
        return tuple(Rung(at, at + 1) for at in range(1, depth + 1))
    found = [Rung(1, 2)]
    if depth > 1:
        found.append(Rung(1, min(topk + 1, nodes, _SIBLINGS)))
    found += [Rung(at, max(at + 1, min(nodes, 2**at))) for at in range(2, depth)]
    return tuple(dict.fromkeys((*found, Rung(depth, nodes))))


class Ladder:
    """Puts a shape into SGLang's worker for one step."""

    def __init__(self, worker: Any, whole: Rung) -> None:
        self.whole = whole  # what the server was started with
        self._worker = worker

    @contextmanager
    def at(self, rung: Rung) -> Iterator[None]:
        """Within, steps have drafts of this shape, or none."""
        changes = self._changes(rung) if rung != self.whole else []
        before = [getattr(part, name) for part, name, _ in changes]
        for part, name, value in changes:
            setattr(part, name, value)
        try:
            yield
        finally:
            for (part, name, _), value in zip(changes, before, strict=True):
                setattr(part, name, value)

    def _changes(self, rung: Rung) -> list[tuple[Any, str, Any]]:
        """What differs from the whole shape: object, attribute, value."""
        worker, drafter = self._worker, self._worker.draft_worker
        # SGLang's own zero-step mode verifies the root alone and asks nothing of the drafter.
        parts = [worker, drafter] if rung.depth else [worker]
        found = [(part, "speculative_num_steps", rung.depth) for part in parts]
        found += [(part, "speculative_num_draft_tokens", rung.nodes) for part in parts]
        if not rung.depth:
            return found
        # Where a level's tokens lie in the cache follows from the number of levels. A server that
        # was started with one level has no such backend.
        if drafter.draft_attn_backend is not None:
            found.append((drafter.draft_attn_backend, "speculative_num_steps", rung.depth))
        if worker.topk == 1:  # a chain of one level has no parents
            for name, width in (
                ("_topk1_parents_prealloc", rung.depth if rung.depth > 1 else 0),
                ("_topk1_score_indices_prealloc", rung.depth),
            ):
                found.append((drafter, name, getattr(drafter, name)[:, :width].contiguous()))
        return found
