"""Pooled gain over pooled gain of two recipes, with a bootstrap interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.measure import accept_length, lengths


@dataclass(frozen=True)
class Cell:
    """Both recipes after the same requests, and the drafter that both began with."""

    domain: str
    seed: int
    served: int
    start: Mapping[str, Any]  # measure.Measured, as are the two below
    rival: Mapping[str, Any]
    mine: Mapping[str, Any]

    def gain(self, who: Mapping[str, Any], shape: str) -> float:
        return accept_length(who, shape) - accept_length(self.start, shape)


@dataclass(frozen=True)
class Ratio:
    """Of ``cells`` cells, those that ``counted``; nan where none did."""

    cells: int
    counted: int
    rival: float  # mean gain over the counted cells
    mine: float
    ratio: float
    ci_low: float
    ci_high: float


def pooled(
    cells: Sequence[Cell], shape: str, *, least: float, draws: int = 2000, seed: int = 0
) -> Ratio:
    """The ratio over the cells in which the rival gained more than ``least``.

    Held-out requests are resampled by domain, the same in all its cells, and seeds within their
    domain: cells of one seed stand on one another.
    """
    counted = [cell for cell in cells if cell.gain(cell.rival, shape) > least]
    nan = float("nan")
    if not counted:
        return Ratio(len(cells), 0, nan, nan, nan, nan, nan)
    rival = sum(cell.gain(cell.rival, shape) for cell in counted)
    mine = sum(cell.gain(cell.mine, shape) for cell in counted)
    random = np.random.default_rng(seed)
    drawn_rival, drawn_mine = np.zeros(draws), np.zeros(draws)
    by_domain: dict[str, list[Cell]] = defaultdict(list)
    for cell in counted:
        by_domain[cell.domain].append(cell)
    for own in by_domain.values():
        requests = len(own[0].start[shape]["steps"])
        picks = random.integers(0, requests, (draws, requests))
        seeds = sorted({cell.seed for cell in own})
        times = random.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), draws)
        for cell in own:
            weight = times[:, seeds.index(cell.seed)]
            start = lengths(cell.start[shape], picks)
            drawn_rival += weight * (lengths(cell.rival[shape], picks) - start)
            drawn_mine += weight * (lengths(cell.mine[shape], picks) - start)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanquantile(drawn_mine / drawn_rival, [0.025, 0.975])
    count = len(counted)
    return Ratio(
        len(cells), count, rival / count, mine / count, mine / rival, float(low), float(high)
    )
