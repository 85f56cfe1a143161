"""Smaller trees for busier steps: the draft shapes that one server moves between.

Verifying costs more the more rows a step has, so the tree that pays for one request alone does not
for several at once. SGLang's worker reads depth and number of nodes anew in every step; its own
adaptive mode moves them for chains. Here a step of a tree is made smaller in the same way, within
what the server was started with, so that its cache holds every shape. Each depth has one number of
nodes: what the store keeps by depth is then of one shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import log2
from typing import Any, NamedTuple

#: What each doubling of a tree's nodes adds to its width (replays of two SmolLM2-135M drafters).
_WIDER = 0.22


class Rung(NamedTuple):
    """A draft shape: depth, and nodes with the root. ``width`` is how many tries a level is worth:
    its token is accepted with 1 - (1 - p)^width where that of a chain is with p."""

    depth: int
    nodes: int
    width: float = 1.0


def rungs(depth: int, topk: int, nodes: int) -> tuple[Rung, ...]:
    """The shapes from one level up to what the server was started with. A chain has a node for each
    level; of a tree each level doubles the nodes."""
    if topk == 1:
        return tuple(Rung(at, at + 1) for at in range(1, depth + 1))
    smaller = (max(at + 1, min(nodes, 2**at)) for at in range(1, depth))
    return tuple(
        Rung(at, some, 1.0 + _WIDER * log2(some / 2))
        for at, some in enumerate((*smaller, nodes), 1)
    )


class Ladder:
    """Puts a rung's shape into SGLang's worker for one step."""

    def __init__(self, worker: Any, given: tuple[Rung, ...]) -> None:
        self.rungs = {rung.depth: rung for rung in given}
        self.deepest = given[-1].depth
        self._worker = worker
        self._chains: dict[int, tuple[Any, Any]] = {}  # depth -> what a chain's tree looks like

    @contextmanager
    def at(self, depth: int) -> Iterator[None]:
        """Drafts of this depth within; the deepest needs nothing."""
        if depth == self.deepest:
            yield
            return
        self._put(self.rungs[depth])
        try:
            yield
        finally:
            self._put(self.rungs[self.deepest])

    def _put(self, rung: Rung) -> None:
        drafter = self._worker.draft_worker
        for part in (self._worker, drafter):
            part.speculative_num_steps = rung.depth
            part.speculative_num_draft_tokens = rung.nodes
        # Where a level's tokens lie in the cache follows from the number of levels.
        drafter.draft_attn_backend.speculative_num_steps = rung.depth
        if self._worker.topk == 1:
            if rung.depth not in self._chains:
                drafter._rebuild_topk1_chain_buffers()
                self._chains[rung.depth] = (
                    drafter._topk1_parents_prealloc,
                    drafter._topk1_score_indices_prealloc,
                )
            drafter._topk1_parents_prealloc, drafter._topk1_score_indices_prealloc = self._chains[
                rung.depth
            ]
