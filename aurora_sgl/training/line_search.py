"""How far to go from the live drafter towards the trained one, by replay on the dev split.

Training pulls a drafter towards the requests of its window, and away from what it served before.
Part of the way often keeps most of the gain for little of the loss: from a well-trained drafter at
a turn to a new domain the whole way gave the new one 27% for 7.2% of the old, half the way 19% for
2.2% (linear interpolation of weights: Wortsman et al. 2022, arXiv 2109.01903). What counts is the
gain on traffic as it is now: after a turn the dev split has as much of what was as of what is. The
gate's requests take no part in the choice.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.device import as_served, device_of
from aurora_sgl.evaluation.pooling import changes, partitions, pool
from aurora_sgl.evaluation.replay import RequestReplay, replay_one
from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.sequences.sequence import Sequences, readable
from aurora_sgl.training.settings import TrainSettings

#: Shares of the way that are tried.
ALPHAS = (1.0, 0.75, 0.5, 0.25)
#: Share of its accept length that a domain may lose on the dev split.
FLOOR = 0.02
#: Gain at which the whole way is taken without a look at the others, if no domain loses.
PLENTY = 0.05
#: Dev requests below which nothing is searched.
FEWEST = 4


@dataclass(frozen=True)
class Way:
    """One share of the way, on the dev split: accept length, and what is believed of it as a share
    of the live drafter's, of traffic as it is now (``ratio``) and of the domain that loses most
    (``worst``); both 1.0 without a domain to look at. Small domains are judged together, as the
    gate does (:mod:`aurora_sgl.evaluation.pooling`)."""

    alpha: float
    accept_length: float
    ratio: float
    worst: float


@dataclass(frozen=True)
class LineSearchResult:
    """``tried`` begins with the live drafter itself, alpha 0; empty: too few dev requests."""

    alpha: float
    drafter: Drafter
    requests: int
    tried: tuple[Way, ...] = ()

    @property
    def metrics(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "dev_requests": self.requests,
            "line_search": [
                [way.alpha, *map(_rounded, (way.accept_length, way.ratio, way.worst))]
                for way in self.tried
            ],
        }


def _rounded(value: float) -> float | None:
    """NaN, where no request has a determined step, has no place in JSON or SQL."""
    return None if math.isnan(value) else round(value, 4)


def interpolate(start: Drafter, trained: Drafter, alpha: float) -> Drafter:
    """``start + alpha (trained - start)`` in float32, tensor by tensor; both on the CPU."""
    blend = copy.deepcopy(trained)
    origin = start.state_dict()
    with torch.no_grad():
        for name, value in blend.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.lerp(origin[name].to(value.dtype), value, alpha))
    return blend


def search(
    live: Drafter,
    start: Drafter,
    trained: Drafter,
    dev: Sequences,
    head: TargetHead,
    settings: TrainSettings,
    progress: Callable[[int, int], None] | None = None,
    traffic: Mapping[str, float] | None = None,
) -> LineSearchResult:
    """The best of ``ALPHAS`` for ``traffic``, requests by domain (default: the dev split's).

    Among those with which no domain loses more than ``FLOOR``; where there is none, the one whose
    worst domain loses least. ``start`` is what training began from: ``live``, or ``live`` with a
    refreshed draft vocabulary. With fewer than ``FEWEST`` readable requests the whole way is taken.
    ``progress`` gets (replays of the split that were made, at most to make).
    """
    sequences = list(readable(dev))
    if len(sequences) < FEWEST:
        return LineSearchResult(1.0, trained, len(sequences))
    head = head.to(device_of(settings))

    def replayed(drafter: Drafter) -> list[RequestReplay]:
        served = as_served(drafter, settings)
        return [replay_one(served, each, settings.shape, head) for each in sequences]

    before = replayed(live)
    tried = [Way(0.0, AcceptCounts.of(before).accept_length, 1.0, 1.0)]
    for done, alpha in enumerate(ALPHAS, start=1):
        if progress is not None:
            progress(done, 1 + len(ALPHAS))
        after = replayed(interpolate(start, trained, alpha))
        length = AcceptCounts.of(after).accept_length
        tried.append(Way(alpha, length, *believed_ratios(before, after, traffic)))
        if alpha == 1.0 and _is_plenty(tried[0], tried[1]):
            break
    best = choose(tried[1:])
    drafter = trained if best.alpha == 1.0 else interpolate(start, trained, best.alpha)
    return LineSearchResult(best.alpha, drafter, len(sequences), tuple(tried))


def choose(ways: Sequence[Way]) -> Way:
    """The largest gain that keeps the floor, of equal ones the longest way; else the least loss."""
    kept = [way for way in ways if way.worst >= 1 - FLOOR]
    if kept:
        return max(kept, key=lambda way: (way.ratio, way.alpha))
    return max(ways, key=lambda way: way.worst)


def _is_plenty(live: Way, whole: Way) -> bool:
    return whole.ratio >= (1 + PLENTY) * live.ratio and whole.worst >= 1.0


def believed_ratios(
    before: Sequence[RequestReplay],
    after: Sequence[RequestReplay],
    traffic: Mapping[str, float] | None = None,
) -> tuple[float, float]:
    """(of all traffic, of the worst domain), see :class:`Way`: the first is the weighted geometric
    mean over domains; a domain without dev requests changes as all do. Accept rules of a domain
    count as domains for the worst, where there is enough of both: of eight requests alone, chance
    takes 2% from the worst of four domains more often than not."""
    pairs = list(zip(before, after, strict=True))
    pooled = [pool(changes(part), FLOOR) for part in partitions(pairs)]
    if not pooled:
        return 1.0, 1.0
    mean, by_domain = pooled[0]
    requests = traffic or Counter(old.domain for old, _ in pairs)
    of_traffic = sum(
        count * (by_domain[f"all/{domain}"].mean if f"all/{domain}" in by_domain else mean)
        for domain, count in requests.items()
    ) / sum(requests.values())
    worst = min(stratum.mean for _, strata in pooled for stratum in strata.values())
    return math.exp(of_traffic), math.exp(worst)
