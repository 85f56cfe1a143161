"""Arithmetic over what was served: lengths against a baseline, and the speed of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from aurora_sgl.batch_sizes import batch_bucket
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.store.queries.request_counts import RequestCounts
from aurora_sgl.store.queries.steps import Step

#: Verify steps below which a stratum of the baseline says nothing.
FEWEST_STEPS = 30
#: Spread of requests, as standard deviation of the root of the accepted drafts per step, and how
#: many requests' worth of evidence that is. The demo's requests, within a domain: 0.24.
SPREAD, SPREAD_FREEDOM = 0.25, 6
#: Gaps between two steps of a stream that are left out, in medians: it waited for something else.
LONG_GAP = 10.0


def shape_of(served: RequestCounts | Step) -> str:
    """The draft shape as text: depth, top-k and nodes."""
    return f"{served.depth}/{served.topk}/{served.nodes}"


def key_of(served: RequestCounts | Step) -> str:
    """What is compared with its like alone: draft shape, accept rule and domain. A sampled request
    accepts less than a greedy one of the same drafter, and traffic's mix of both changes."""
    return f"{shape_of(served)}/{served.accept_rule}/{served.domain}"


def strata(clusters: Iterable[RequestCounts]) -> dict[str, AcceptCounts]:
    """Requests by :func:`key_of`."""
    sums: dict[str, AcceptCounts] = {}
    for cluster in clusters:
        key = key_of(cluster)
        sums[key] = sums.get(key, AcceptCounts()) + AcceptCounts.of([cluster])
    return sums


@dataclass(frozen=True)
class Comparison:
    """Accept length of some requests against what a baseline would have had on the same mix of
    domains, draft shapes and accept rules. ``error`` is the standard error of the difference
    between the roots of the accepted drafts per step, ``freedom`` its degrees of freedom."""

    requests: int  # of those that could be compared
    accept_length: float
    expected: float
    error: float
    freedom: int

    @property
    def difference(self) -> float:
        return self.accept_length - self.expected

    def chance(self, loss: float = 0.0) -> float:
        """Of an accept length as low as this, or lower, if the share ``loss`` of the expected one
        were lost (one-sided, Student's t)."""
        from scipy.special import stdtr  # slow to import

        lowest = max(0.0, self.expected * (1 - loss) - 1)
        score = ((self.accept_length - 1) ** 0.5 - lowest**0.5) / self.error
        return float(stdtr(self.freedom, score))


def telling(baseline: Mapping[str, AcceptCounts]) -> dict[str, AcceptCounts]:
    """The strata that something can be compared with."""
    return {key: s for key, s in baseline.items() if s.accepted and s.steps >= FEWEST_STEPS}


def compare(
    clusters: Sequence[RequestCounts], baseline: Mapping[str, AcceptCounts]
) -> Comparison | None:
    """``None`` when fewer than two requests have a counterpart in the baseline.

    On the scale of square roots (Anscombe, Biometrika 1948) requests differ about as much whether
    many drafts are accepted or next to none, so one spread holds for the window and the baseline.
    It is estimated from both and from ``SPREAD``, which counts as ``SPREAD_FREEDOM`` requests
    (a moderated t, Smyth 2004): two requests that happen to be alike are no proof that all are.
    """
    base_strata = telling(baseline)
    here = [c for c in clusters if key_of(c) in base_strata]
    requests: dict[int, list[float]] = {}  # steps, accepted, accepted by the baseline's ratios
    shares: dict[str, float] = {}
    steps = sum(c.verify_steps for c in here)
    for c in here:
        sums = requests.setdefault(c.request_id, [0.0, 0.0, 0.0])
        for index, more in enumerate(
            (1.0, c.accepted / c.verify_steps, base_strata[key_of(c)].ratio)
        ):
            sums[index] += more * c.verify_steps
        shares[key_of(c)] = shares.get(key_of(c), 0.0) + c.verify_steps / steps
    if len(requests) < 2:
        return None
    expected = sum(share * base_strata[key].ratio for key, share in shares.items())
    ratio = sum(c.accepted for c in here) / steps
    weight = sum(n * n for n, _, _ in requests.values()) / steps**2  # about 1 / requests
    spreads = [(SPREAD**2, SPREAD_FREEDOM)]
    if ratio:
        each = ratio / expected
        residuals = sum((y - each * of_baseline) ** 2 for _, y, of_baseline in requests.values())
        freedom = len(requests) - 1
        variance = residuals * len(requests) / freedom / steps**2
        spreads.append((variance / weight / (4 * ratio), freedom))
    for key in shares:
        s = base_strata[key]
        spreads.append((s.variance / s.weight / (4 * s.ratio), s.requests - 1))
    freedom = sum(n for _, n in spreads)
    spread2 = sum(value * n for value, n in spreads) / freedom
    error_of_baseline = sum(
        share**2 * base_strata[key].ratio * base_strata[key].weight for key, share in shares.items()
    )
    error = (spread2 * (weight + error_of_baseline / expected)) ** 0.5
    return Comparison(len(requests), 1 + ratio, 1 + expected, error, freedom)


class Pace(NamedTuple):
    """Verify steps, the tokens that they kept, and the seconds that they took."""

    steps: int
    tokens: int
    seconds: float


def paces(steps: Sequence[Step]) -> dict[str, Pace]:
    """What single streams made, by draft shape and group of batch sizes.

    Each step counts with the time since the step before it of the same request; steps come by
    request and in order.
    """
    gaps: list[tuple[str, int, float]] = []
    for before, now in pairwise(steps):
        if now.request_id == before.request_id and now.step == before.step + 1:
            seconds = (now.at - before.at).total_seconds()
            if seconds > 0:
                key = f"{shape_of(now)}/{batch_bucket(now.batch_size)}"
                gaps.append((key, now.kept, seconds))
    if not gaps:
        return {}
    longest = LONG_GAP * median(seconds for _, _, seconds in gaps)
    by_key: dict[str, Pace] = {}
    for key, kept, seconds in gaps:
        if seconds <= longest:
            old = by_key.get(key, Pace(0, 0, 0.0))
            by_key[key] = Pace(old.steps + 1, old.tokens + kept, old.seconds + seconds)
    return by_key


def speeds(
    now: Mapping[str, Pace], before: Mapping[str, Pace], gain: float = 1.0
) -> tuple[float, float] | None:
    """Tokens per second of a stream now, and what the baseline would have made of the same
    requests in the same draft shapes and at the same batch sizes.

    How fast a stream is depends on its domain by the accept length alone, so the baseline's steps
    per second are taken with as many tokens a step as now, over ``gain``: the accept length now
    over the one that was expected. ``None`` when no such pair was seen for long enough on both
    sides.
    """
    both = [b for b in now if b in before and min(now[b].steps, before[b].steps) >= FEWEST_STEPS]
    seconds = sum(now[b].seconds for b in both)
    if not seconds:
        return None
    tokens = sum(now[b].tokens for b in both)
    expected_steps = sum(now[b].seconds * before[b].steps / before[b].seconds for b in both)
    expected = expected_steps * tokens / sum(now[b].steps for b in both) / gain
    return tokens / seconds, expected / seconds
