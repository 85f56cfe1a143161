"""The shape of a draft: how deep, how wide, and how many tokens are verified at once."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import NamedTuple, Self

#: How much wider a tree is by the logarithm of its drafts a level (replays of two SmolLM2-135M
#: drafters).
_WIDER = 0.53


class _Numbers(NamedTuple):
    depth: int
    topk: int
    nodes: int


class DraftShape(_Numbers):
    """Depth, top-k and nodes (the root counted) of a draft; a chain has ``topk`` 1.

    SGLang's ``--speculative-num-steps``, ``-eagle-topk`` and ``-num-draft-tokens``. Raises
    ``ValueError`` for more nodes than the shape has candidates, and for a chain of another length.
    ``nodes`` 0: depth + 1, a chain's. A tuple, since each step looks up many things by it.
    """

    __slots__ = ()

    def __new__(cls, depth: int, topk: int = 1, nodes: int = 0) -> Self:
        self = super().__new__(cls, depth, topk, nodes or depth + 1)
        if self.depth < 0 or self.topk < 1:
            raise ValueError(f"a draft of depth {self.depth} and top-k {self.topk} is none")
        if self.is_chain and self.nodes != self.depth + 1:
            raise ValueError(f"a chain of depth {self.depth} has {self.depth + 1} nodes")
        if not 1 <= self.nodes <= self.candidates + 1:
            raise ValueError(
                f"depth {depth} and top-k {topk} have room for 1 to {self.candidates + 1} nodes, "
                f"not {self.nodes}"
            )
        return self

    @property
    def is_chain(self) -> bool:
        return self.topk == 1

    @property
    def candidates(self) -> int:
        """Tokens that the drafter scores for a draft, of which the best become its nodes."""
        return self.topk + (self.depth - 1) * self.topk**2 if self.depth else 0

    @property
    def width(self) -> float:
        """How many tries a level is worth: its token is accepted with 1 - (1 - p)^width where that
        of a chain is with p."""
        return 1.0 + _WIDER * log((self.nodes - 1) / self.depth) if self.depth else 1.0

    @property
    def flags(self) -> dict[str, str]:
        """SGLang's flags for it."""
        return {
            "--speculative-num-steps": str(self.depth),
            "--speculative-eagle-topk": str(self.topk),
            "--speculative-num-draft-tokens": str(self.nodes),
        }


#: A step without drafts.
NO_DRAFT = DraftShape(0)


@dataclass(frozen=True)
class ReplayedShape:
    """What exact replay found of a drafter in one draft shape."""

    shape: DraftShape
    accept_length: float
