"""What a candidate changes in each stratum of traffic, where many strata are small.

The change of a stratum is the logarithm of the ratio of both accept lengths, with conversations as
clusters. Changes of strata resemble each other: theta_j ~ N(mu, tau^2), mu with a flat prior, tau
half-normal and summed out over a grid (Gelman et al., Bayesian Data Analysis, 5.4). A stratum of
many requests speaks for itself, one of two is mostly judged by what the others say, unless it
contradicts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import ndtr, stdtr

from aurora_sgl.evaluation.evidence import Pair, conversation_of
from aurora_sgl.intervals import accept_length

Floats = NDArray[np.float64]

#: Scale of the half-normal prior of tau, the spread of the changes of strata, and its grid.
SPREAD, TAU = 0.03, np.linspace(0.005, 0.2, 20)
#: Share of strata that are odd, a priori, and how much wider they are spread.
ODD, WIDE = 0.02, 0.3
#: What an earlier try of the line counts beside this one, for single strata.
MEMORY = 0.5
#: Conversations' worth of evidence that the variance of all strata is for a single one.
PRIOR_FREEDOM = 6
#: Conversations of a domain with which its sampled or its greedy requests are a stratum.
ENOUGH = 8
#: Spread of a conversation's change where nothing can be estimated, and rounds of the fit.
ALONE, _FITS = 0.1, 4


@dataclass(frozen=True)
class StratumChange:
    """Of one stratum: change of the logarithm of the accept length, its standard error with
    degrees of freedom, conversations and requests."""

    change: float
    error: float
    freedom: float
    conversations: int
    requests: int


@dataclass(frozen=True)
class Pooled:
    """What is believed of one stratum: mean and standard deviation of its change."""

    mean: float
    deviation: float
    chance: float  # that it lost more than the margin


def partitions(pairs: Sequence[Pair]) -> list[dict[str, list[Pair]]]:
    """Requests by domain, ``all/chat``; and where a domain has ``ENOUGH`` conversations of both,
    those that were sampled and those that were not: ``greedy/chat`` and ``sampled/chat``. Requests
    without a step are left out."""
    domains: dict[str, list[Pair]] = {}
    for old, new in pairs:
        if old.verify_steps and new.verify_steps:
            domains.setdefault(f"all/{old.domain}", []).append((old, new))
    rules: dict[str, list[Pair]] = {}
    for name, mine in domains.items():
        domain = name.partition("/")[2]
        halves: dict[str, list[Pair]] = {f"greedy/{domain}": [], f"sampled/{domain}": []}
        for pair in mine:
            rule = "greedy" if pair[0].accept_rule == "greedy" else "sampled"
            halves[f"{rule}/{domain}"].append(pair)
        if all(len({conversation_of(old) for old, _ in half}) >= ENOUGH
               for half in halves.values()):  # fmt: skip
            rules |= halves
    return [part for part in (domains, rules) if part]


def changes(strata: Mapping[str, Sequence[Pair]]) -> dict[str, StratumChange]:
    """What a candidate changed in each stratum of a partition.

    A conversation of n steps deviates from its stratum's change with a variance ``a + b / n``: what
    it is like, and chance within it. Both are fitted to all strata; a stratum's error is a mean of
    this model, which counts as ``PRIOR_FREEDOM`` conversations, and of the stratum's own (the
    variance of a ratio of sums: Cochran, Sampling Techniques, 6.4; a moderated t: Smyth 2004). Two
    conversations that happen to be alike are no proof that all are.
    """
    raw = {name: _Raw.of(mine) for name, mine in sorted(strata.items())}
    of_all = [each for each in raw.values() if len(each.steps) > 1]
    model = np.array([ALONE**2, 1.0])
    if of_all:
        model = _variance_model(
            np.concatenate([each.steps for each in of_all]),
            np.concatenate([each.squares for each in of_all]),
        )
    return {name: each.moderated(*model) for name, each in raw.items()}


def _variance_model(
    steps: NDArray[np.float64], squares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """a and b of ``a + b / steps`` by weighted least squares; neither below zero."""
    design = np.column_stack([np.ones_like(steps), 1 / steps])
    model = np.array([float(squares.mean()), 0.0])
    for _ in range(_FITS):
        expected = np.maximum(design @ model, 1e-9)
        model, _ = nnls(design / expected[:, None], squares / expected)
    return np.asarray(np.maximum(model, [0.0, 1e-9]))


@dataclass(frozen=True)
class _Raw:
    """A stratum's change, and for each conversation its baseline's steps and the square of its
    deviation from that change. Shape of both: [conversations]."""

    change: float
    steps: NDArray[np.float64]
    squares: NDArray[np.float64]
    requests: int

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> _Raw:
        sums: dict[str, NDArray[np.float64]] = {}  # accepted and steps, old and new
        for old, new in pairs:
            row = np.array([old.accepted, old.verify_steps, new.accepted, new.verify_steps], float)
            key = conversation_of(old)
            sums[key] = sums[key] + row if key in sums else row
        y0, n0, y1, n1 = np.array(list(sums.values())).T
        before = accept_length(y0.sum(), n0.sum())
        after = accept_length(y1.sum(), n1.sum())
        parts = (y1 + n1 - after * n1) / (after * n1.sum())
        parts -= (y0 + n0 - before * n0) / (before * n0.sum())
        m, share = len(n0), n0 / n0.sum()
        squares = (parts / share) ** 2 * m / max(m - 1, 1)
        return cls(math.log(after / before), n0, squares, len(pairs))

    def moderated(self, between: float, within: float) -> StratumChange:
        share2 = (self.steps / self.steps.sum()) ** 2
        expected = float((share2 * (between + within / self.steps)).sum())
        m = len(self.steps)
        own = float((share2 * self.squares).sum())
        variance = (expected * PRIOR_FREEDOM + own * (m - 1)) / (PRIOR_FREEDOM + m - 1)
        return StratumChange(
            self.change, math.sqrt(variance), PRIOR_FREEDOM + m - 1, m, self.requests
        )


@dataclass(frozen=True)
class Memory:
    """How a stratum deviated from the mean of all in earlier tries of a line, and its precision."""

    deviation: float
    precision: float


def remembered(
    by_stratum: Mapping[str, StratumChange],
    memories: Mapping[str, Memory],
    margin: float,
    share: float,
) -> dict[str, StratumChange]:
    """Changes together with what earlier tries of the line measured of the same strata, which
    counts ``MEMORY`` times the ``share`` of conversations that are new now.

    Else a stratum that is worse would only have to wait for a try in which chance favours it. On
    the same conversations once more chance is the same, and nothing is to be remembered.
    """
    mean, _ = pool(by_stratum, margin) if memories else (0.0, {})
    combined = {}
    for name, each in by_stratum.items():
        old = memories.get(name, Memory(0.0, 0.0))
        own, past = 1 / each.error**2, MEMORY * share * old.precision
        change = (own * each.change + past * (mean + old.deviation)) / (own + past)
        combined[name] = replace(each, change=change, error=1 / math.sqrt(own + past))
    return combined


def memories_of(by_stratum: Mapping[str, StratumChange], mean: float) -> dict[str, Memory]:
    """Of :func:`remembered` changes, for the next try."""
    return {
        name: Memory(each.change - mean, 1 / each.error**2) for name, each in by_stratum.items()
    }


def pool(by_stratum: Mapping[str, StratumChange], margin: float) -> tuple[float, dict[str, Pooled]]:
    """The mean change of all strata, and what is believed of each. ``margin``: a share."""
    if not by_stratum:
        return 0.0, {}
    d = np.array([each.change for each in by_stratum.values()])
    s2 = np.array([each.error for each in by_stratum.values()]) ** 2
    believed = _believe(d, s2, _means(d, s2))
    chance = believed.chance_below(math.log1p(-margin))
    rows = zip(by_stratum, believed.mean, believed.deviation, chance, strict=True)
    pooled = {name: Pooled(float(m), float(v), float(p)) for name, m, v, p in rows}
    return believed.mean_of_all, pooled


def deviations(sums: Floats, variances: Floats) -> Floats:
    """What is believed of deviations around zero that were measured with these variances, by the
    same model. Shape of all: [strata]."""
    return _believe(sums, variances, np.zeros(1)).mean


def _means(d: Floats, s2: Floats) -> Floats:
    """A grid for mu around the weighted median, as wide as it can be in doubt."""
    order = np.argsort(d)
    share = np.cumsum(1 / s2[order]) / (1 / s2).sum()
    centre = d[order][int(np.searchsorted(share, 0.5))]
    half = 4 / math.sqrt((1 / (s2 + WIDE**2 / 4)).sum())
    return np.asarray(centre + np.linspace(-half, half, 81))


@dataclass(frozen=True)
class _Believed:
    """The posterior on the grid: weights [tau, mu], of the usual and the odd kind of stratum
    [2, tau, mu, strata], means likewise, variances [2, tau, 1, strata]."""

    weights: Floats
    kinds: Floats
    means: Floats
    variances: Floats
    mean_of_all: float

    def _summed(self, values: Floats) -> Floats:
        return np.asarray(np.einsum("tm,ktms->s", self.weights, self.kinds * values))

    @property
    def mean(self) -> Floats:
        return self._summed(self.means)

    @property
    def deviation(self) -> Floats:
        return np.asarray(np.sqrt(self._summed(self.variances + (self.means - self.mean) ** 2)))

    def chance_below(self, floor: float) -> Floats:
        return self._summed(ndtr((floor - self.means) / np.sqrt(self.variances)))


def _believe(d: Floats, s2: Floats, mu: Floats) -> _Believed:
    tau2 = np.stack([TAU**2, TAU**2 + WIDE**2])[:, :, None, None]  # [2, tau, 1, 1]
    mus = mu[:, None]  # [mu, 1]
    variance = s2 + tau2
    share = np.array([1 - ODD, ODD])[:, None, None, None]
    likelihood = share * np.exp(-((d - mus) ** 2) / (2 * variance)) / np.sqrt(variance)
    total = likelihood.sum(0) + 1e-300  # [tau, mu, strata]
    log = np.log(total).sum(-1) - ((TAU / SPREAD) ** 2 / 2)[:, None]
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    own = tau2 / variance
    return _Believed(
        weights, likelihood / total, own * d + (1 - own) * mus, own * s2, float(weights.sum(0) @ mu)
    )


def harmed(by_stratum: Mapping[str, StratumChange], margin: float, level: float) -> list[str]:
    """Strata that lost more than the margin beyond doubt, by what each says alone; all together
    err with probability ``level`` (Holm 1979)."""
    floor = math.log1p(-margin)
    chances = sorted(
        (float(stdtr(each.freedom, (each.change - floor) / each.error)), name)
        for name, each in by_stratum.items()
    )
    lost = []
    for position, (chance, name) in enumerate(chances):
        if chance > level / (len(chances) - position):
            break
        lost.append(name)
    return lost
