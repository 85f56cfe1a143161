"""What steps take, by their shape and by how many requests run at once.

A machine is slower at one time than at another, and a time taken in a noisy minute would stand for
long where steps of its kind are rare. So a plain step and one with drafts are compared only where
both were made next to each other: every step of the rarer kind with those of the other kind just
before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from aurora_sgl.draft_shape import NO_DRAFT, DraftShape

WINDOW = 16  # last steps of one shape and group of batch sizes
ENOUGH = 8  # of them from which their median counts
#: Last comparisons of a group, so that a few new ones outvote those of a noisy minute.
_COMPARISONS = 5
_NEIGHBOURS, _NEAR = 12, 64  # steps of a group that are looked back at, within so many of all
_LEAST = 4  # of the other kind among them


class StepTimings:
    """In seconds. A group is one of ``batch_sizes.batch_bucket``."""

    def __init__(self) -> None:
        self._times: dict[tuple[DraftShape, int], deque[float]] = {}
        self._medians: dict[tuple[DraftShape, int], float] = {}
        #: By group: a shape, and the time of a plain step over that of one of this shape.
        self._compared: dict[int, deque[tuple[DraftShape, float]]] = {}
        self._last: dict[int, deque[tuple[int, DraftShape, float]]] = {}
        self._steps = 0

    def add(self, shape: DraftShape, group: int, seconds: float) -> None:
        self._steps += 1
        times = self._times.setdefault((shape, group), deque(maxlen=WINDOW))
        times.append(seconds)
        if len(times) >= ENOUGH:
            self._medians[shape, group] = median(times)
        last = self._last.setdefault(group, deque(maxlen=_NEIGHBOURS))
        self._compare(shape, group, seconds, [one for one in last if self._steps - one[0] <= _NEAR])
        last.append((self._steps, shape, seconds))

    def _compare(
        self,
        shape: DraftShape,
        group: int,
        seconds: float,
        before: Iterable[tuple[int, DraftShape, float]],
    ) -> None:
        others = [one for one in before if (one[1] == NO_DRAFT) is not (shape == NO_DRAFT)]
        if not others:
            return
        other = others[-1][1]
        near = [took for _, kind, took in others if kind == other]
        if len(near) < _LEAST:
            return
        drafts, ratio = (
            (other, seconds / median(near))
            if shape == NO_DRAFT
            else (shape, median(near) / seconds)
        )
        self._compared.setdefault(group, deque(maxlen=_COMPARISONS)).append((drafts, ratio))

    @property
    def groups(self) -> list[int]:
        """Those at which any step was timed."""
        return sorted({group for _, group in self._times})

    def count(self, shape: DraftShape, group: int) -> int:
        return len(self._times.get((shape, group), ()))

    def of(self, shape: DraftShape, group: int) -> float | None:
        """The median of the last steps of a shape; None: too few."""
        return self._medians.get((shape, group))

    def forget(self, shape: DraftShape, group: int) -> None:
        """Time a shape anew."""
        self._times.pop((shape, group), None)
        self._medians.pop((shape, group), None)

    def least(self, shape: DraftShape, group: int) -> float:
        """The shortest of the last steps of a shape; 0: there was none."""
        return min(self._times.get((shape, group), ()), default=0.0)

    def plain(self, group: int) -> float | None:
        """Of steps without drafts, as they would be now; None: not known."""
        timed = self.of(NO_DRAFT, group)
        if timed is None:
            return None
        compared = [
            ratio * time
            for shape, ratio in self._compared.get(group, ())
            if (time := self.of(shape, group)) is not None
        ]
        return median(compared) if compared else timed
