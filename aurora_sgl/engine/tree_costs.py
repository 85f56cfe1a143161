"""What the parts of a step with drafts take: one more level of the drafter, and the rest of the
step by its nodes.

A machine is slower at one time than at another. So a step's time is taken relative to those around
it, whatever their shapes, and what is known of a shape does not get better because it was timed in
a quiet minute. Only ratios matter to what is made of it.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

_MEMORY = 32.0  # steps of one number of nodes, older ones count less
ENOUGH = 3  # from which they count
_SCALE = 4.0  # steps over which the speed of the machine is averaged
_SMOOTHED = 8  # steps between two times that ``rest`` is made of what was timed
_OUTLIER = 1.5  # times what was expected: others had the processor


class TreeCosts:
    """Of one group of batch sizes, seconds. ``nodes``: the most of a step, with the root."""

    def __init__(self, levels: int, nodes: int) -> None:
        self.knots = [n for n in range(1, nodes + 1) if n <= 8 or n % 4 == 0 or n == nodes]
        self._rest = dict.fromkeys(self.knots, 0.0)
        self._counts = dict.fromkeys(self.knots, 0)
        self._scale = 1.0
        self._steps = 0
        #: Seconds by nodes (index), as far as known; never less than those of fewer nodes.
        self.rest = [0.0] * (nodes + 1)
        #: Seconds that the drafter takes for level 1, 2, ... below the first.
        self.levels = [0.0] * max(1, levels - 1)
        self._level_counts = [0] * len(self.levels)

    @property
    def untimed(self) -> int | None:
        """The largest number of nodes that was timed too rarely."""
        return next((n for n in reversed(self.knots) if self._counts[n] < ENOUGH), None)

    def add(self, levels: list[float], nodes: int, rest: float) -> None:
        """One step: seconds of each level but the first, and of all else."""
        if not isfinite(rest) or rest <= 0:
            return
        if self._counts.get(nodes, 0) >= ENOUGH:
            ratio = rest / self.rest[nodes]
            ratio = min(_OUTLIER * self._scale, max(self._scale / _OUTLIER, ratio))
            self._scale += (ratio - self._scale) / _SCALE
        for place, seconds in enumerate(levels):
            count = self._level_counts[place] = self._level_counts[place] + 1
            before = self.levels[place]
            self.levels[place] = _nearer(before, seconds / self._scale, count)
        if nodes in self._counts:
            self._counts[nodes] += 1
            before = self._rest[nodes]
            self._rest[nodes] = _nearer(before, rest / self._scale, self._counts[nodes])
            self._steps += 1
            if self._counts[nodes] <= ENOUGH or self._steps % _SMOOTHED == 0:
                self._smooth()

    def _smooth(self) -> None:
        timed = [n for n in self.knots if self._counts[n]]
        least = float("inf")
        values = {}
        for n in reversed(timed):
            values[n] = least = min(least, self._rest[n])
        for n in range(1, len(self.rest)):
            low = max((m for m in timed if m <= n), default=timed[0])
            high = min((m for m in timed if m >= n), default=timed[-1])
            part = (n - low) / (high - low) if high > low else 0.0
            self.rest[n] = values[low] + part * (values[high] - values[low])

    def of(self, depth: int, nodes: int) -> float:
        return sum(self.levels[: depth - 1], self.rest[nodes])

    def state(self) -> dict[str, Any]:
        return {
            "rest": {str(n): self._rest[n] for n in self.knots if self._counts[n]},
            "levels": [x for x, n in zip(self.levels, self._level_counts, strict=True) if n],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError``, ``KeyError`` or ``TypeError`` for what :meth:`state` did not
        make. What is restored counts as timed just often enough."""
        rest = {int(n): positive(x) for n, x in state["rest"].items()}
        levels = [positive(x) for x in state["levels"]]
        if not set(rest) <= set(self.knots) or len(levels) > len(self.levels):
            raise ValueError("times of another number of nodes or levels")
        for n, seconds in rest.items():
            self._rest[n], self._counts[n] = seconds, ENOUGH
        for place, seconds in enumerate(levels):
            self.levels[place], self._level_counts[place] = seconds, ENOUGH
        if rest:
            self._smooth()


def _nearer(before: float, seconds: float, count: int) -> float:
    """An average over the last steps that one slow step does not move far."""
    if count == 1:
        return seconds
    if count > ENOUGH:
        seconds = min(_OUTLIER * before, max(before / _OUTLIER, seconds))
    return before + (seconds - before) / min(float(count), _MEMORY)


def positive(value: Any) -> float:
    """Raises ``ValueError`` or ``TypeError`` for anything but a number above 0."""
    number = float(value)
    if not (isfinite(number) and 0 < number < 1e9):
        raise ValueError(f"{number} is no measure of a step")
    return number
