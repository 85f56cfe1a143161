"""The high-water mark: how far each stratum lies below the best that it had.

A candidate may lose a little in a stratum, and one promotion after the other may. So what each
promotion changed is summed up since the stratum's highest point: the changes as measured, their
variances, and what all strata changed on the mean. The level is that mean plus what is believed of
the stratum's own deviation from it; where that
level and what was measured of the stratum alone lie above the highest point, it is the new highest
point, and the sums begin anew (Page's cumulative sums, Biometrika 1954).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aurora_sgl.evaluation.pooling import StratumChange, deviations


@dataclass(frozen=True)
class Reach:
    """A stratum since its highest point, in logarithms of accept lengths: the sum of its changes,
    of their variances and of the mean changes of all strata, and its level (0: the highest)."""

    change: float = 0.0
    variance: float = 0.0
    mean: float = 0.0
    level: float = 0.0

    def as_json(self) -> list[float]:
        return [round(v, 6) for v in (self.change, self.variance, self.mean, self.level)]


Standing = Mapping[str, Reach]


def standing_of(kept: Mapping[str, Sequence[float]] | None) -> dict[str, Reach]:
    """From :meth:`Reach.as_json` by stratum; empty for a version that stands at its highest."""
    return {name: Reach(*values) for name, values in (kept or {}).items()}


def advance(
    before: Standing, changes: Mapping[str, StratumChange], mean: float
) -> tuple[dict[str, float], dict[str, Reach]]:
    """Levels of a candidate whose live version stands at ``before``, which may lie above 0, and its
    standing, with new highest points; by stratum. ``mean``: what all strata changed on the mean."""
    sums = {
        name: (old.change + each.change, old.variance + each.error**2, old.mean + mean)
        for name, each in changes.items()
        for old in [before.get(name, Reach())]
    }
    change, variance, means = np.array(list(sums.values()), dtype=float).reshape(-1, 3).T
    levels = dict(zip(sums, map(float, means + deviations(change - means, variance)), strict=True))
    return levels, {
        name: Reach() if min(levels[name], sums[name][0]) > 0 else Reach(*sums[name], levels[name])
        for name in sums
    }
