"""How often drafted tokens are accepted, by what the drafter itself gives them.

The score of a node is the product of the drafter's probabilities along its path. Is it as sure as
it says, then a node is accepted as often as its score; a greedy target accepts more of the sure
ones, a drafter that just went live may be anything. So for each level and range of scores the
accepted nodes are counted against the sum of their scores, greedy and sampled requests apart.
"""

from __future__ import annotations

from bisect import bisect_left
from math import isfinite
from typing import Any

#: Upper ends of the ranges of scores but for the last, which ends at 1.
RANGES = (
    *(0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.27, 0.35, 0.45, 0.55, 0.65),
    *(0.75, 0.85, 0.92, 0.97),
)
#: What is believed before, as if so many accepted nodes had been expected.
_PRIOR = 4.0
_MEMORY = 400.0  # expected nodes of one cell, older ones count less
_KEPT = 8.0  # of them at most when another drafter goes live


class Ratios:
    """Accepted over expected nodes of one kind of request, by level and range.

    A level's ratio is held near that of its range at all levels, and that near 1.
    """

    def __init__(self, levels: int) -> None:
        cells = len(RANGES) + 1
        #: One more than the levels: the first is of all together.
        self._expected = [[0.0] * cells for _ in range(levels + 1)]
        self._accepted = [[0.0] * cells for _ in range(levels + 1)]
        self._ratios = [[1.0] * cells for _ in range(levels)]

    def chance(self, level: int, score: float) -> float:
        """That a node at this level (0: below the root) is accepted."""
        expected = score * self._ratios[level][bisect_left(RANGES, score)]
        return 1.0 if expected > 1.0 else expected

    def count(self, level: int, score: float, accepted: bool) -> None:
        cell = bisect_left(RANGES, score)
        for place in (0, level + 1):
            expected, counted = self._expected[place], self._accepted[place]
            if expected[cell] > _MEMORY:
                counted[cell] *= _MEMORY / expected[cell]
                expected[cell] = _MEMORY
            expected[cell] += score
            counted[cell] += accepted
        self._ratio(level, cell)

    def _ratio(self, level: int, cell: int) -> None:
        pooled = (self._accepted[0][cell] + _PRIOR) / (self._expected[0][cell] + _PRIOR)
        own = self._accepted[level + 1][cell] + _PRIOR * pooled
        self._ratios[level][cell] = own / (self._expected[level + 1][cell] + _PRIOR)

    def fade(self) -> None:
        """Another drafter: what was counted stays as a weak belief."""
        for expected, accepted in zip(self._expected, self._accepted, strict=True):
            for cell, weight in enumerate(expected):
                if weight > _KEPT:
                    accepted[cell] *= _KEPT / weight
                    expected[cell] = _KEPT
        self._all()

    def _all(self) -> None:
        for level in range(len(self._ratios)):
            for cell in range(len(RANGES) + 1):
                self._ratio(level, cell)

    def state(self) -> dict[str, Any]:
        return {
            "expected": [[round(x, 3) for x in row] for row in self._expected],
            "accepted": [[round(x, 3) for x in row] for row in self._accepted],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError``, ``KeyError`` or ``TypeError`` for what :meth:`state` did not
        make."""
        for name, own in (("expected", self._expected), ("accepted", self._accepted)):
            rows = [[float(x) for x in row] for row in state[name]]
            if [len(row) for row in rows] != [len(row) for row in own]:
                raise ValueError(f"{name} of another number of levels or ranges")
            if not all(isfinite(x) and x >= 0 for row in rows for x in row):
                raise ValueError(f"{name} is not a number")
            own[:] = rows
        self._all()
