"""Paired comparison of two drafters that were replayed over the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aurora_sgl.training.replay import Replayed


@dataclass(frozen=True)
class PairedDifference:
    """Accept lengths of two drafters on the same requests; ``difference`` is b less a."""

    requests: int
    a: float
    b: float
    difference: float
    ci_low: float
    ci_high: float


def accept_length(results: Sequence[Replayed]) -> float:
    """1 + accepted / verify steps over all requests (ratio of sums); nan without a step."""
    steps = sum(r.verify_steps for r in results)
    return 1 + sum(r.accepted for r in results) / steps if steps else float("nan")


def paired_difference(
    a: Sequence[Replayed],
    b: Sequence[Replayed],
    *,
    resamples: int = 4000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """Difference of the accept lengths (ratios of sums) with a percentile bootstrap interval.

    Requests are resampled, not steps: steps of one request are correlated. Requests without a
    determined step on either side are left out. With fewer than two requests the interval is nan.
    Raises ``ValueError`` when the two lists are not of the same requests in the same order.
    """
    if [r.request_id for r in a] != [r.request_id for r in b]:
        raise ValueError("paired lists must hold the same requests in the same order")
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.verify_steps and y.verify_steps]
    sums = np.array(
        [(x.accepted, x.verify_steps, y.accepted, y.verify_steps) for x, y in pairs], dtype=float
    ).reshape(-1, 4)
    nan = float("nan")
    if len(sums) == 0:
        return PairedDifference(0, nan, nan, nan, nan, nan)
    total = sums.sum(0)
    length_a, length_b = 1 + total[0] / total[1], 1 + total[2] / total[3]
    low = high = nan
    if len(sums) > 1:
        picks = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
        drawn = sums[picks].sum(1)
        differences = drawn[:, 2] / drawn[:, 3] - drawn[:, 0] / drawn[:, 1]
        tail = (1 - level) / 2
        low, high = (float(q) for q in np.quantile(differences, [tail, 1 - tail]))
    return PairedDifference(
        len(sums), float(length_a), float(length_b), float(length_b - length_a), low, high
    )
