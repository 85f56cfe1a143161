"""Two versions on what both served under the same draft shape, accept rule and domain.

Traffic's mix changes from one version's time to the other's, so sums over all that each served
would compare the mixes. Here only strata count that both served, and each counts the same on both
sides: the difference is the plain mean of the differences of the strata. It is still of other
requests at another time; only a replay pairs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy.orm import Session

from aurora_sgl.intervals import AcceptCounts
from aurora_sgl.store import queries
from aurora_sgl.store.queries.strata import DepthCounts, ServedStratum

#: Requests and verify steps that a stratum needs on both sides; of fewer requests the error is not
#: known.
FEWEST_REQUESTS, FEWEST_STEPS = 3, 30
#: How far back positions are counted, from when each version served last.
POSITIONS = timedelta(days=7)


@dataclass(frozen=True)
class EqualStrata:
    """Mean accept lengths over some strata that both versions served, each of one weight."""

    strata: int
    requests: tuple[int, int]
    accept_length: tuple[float, float]
    interval: tuple[tuple[float, float], tuple[float, float]]  # 95% of each
    difference: float  # the second less the first
    ci_low: float  # 95%
    ci_high: float


@dataclass(frozen=True)
class ServedAtEqualShape:
    """``overall`` is ``None`` where both have no stratum in common; ``steps`` of each version with
    drafts, and how many of them lie in strata in common. ``over_shapes``: servers choose each
    step's tree, so shapes are taken together."""

    steps: tuple[int, int]
    compared_steps: tuple[int, int]
    over_shapes: bool
    overall: EqualStrata | None
    by_domain: dict[str, EqualStrata]
    by_shape: dict[str, EqualStrata]  # ``depth 3, top-k 2, 6 nodes, greedy``


@dataclass(frozen=True)
class PositionShares:
    """Share of the steps that accepted a proposal at each depth, over strata in common; of one
    draft depth, the one with the most steps."""

    depth: int
    strata: int
    steps: tuple[int, int]
    reached: tuple[tuple[float, ...], tuple[float, ...]]

    def rates(self, side: int) -> list[float | None]:
        """Of the steps that came to a depth, the share that accepted there; ``None``: none came."""
        rates: list[float | None] = []
        before = 1.0
        for share in self.reached[side]:
            rates.append(share / before if before else None)
            before = share
        return rates


def served_at_equal_shape(s: Session, group_id: int, one: int, other: int) -> ServedAtEqualShape:
    over_shapes = queries.request_counts.chooses_trees(s, group_id)
    first, second = (
        queries.strata.served_strata(s, version, over_shapes=over_shapes)
        for version in (one, other)
    )
    pairs = {
        key: (first[key], second[key])
        for key in first
        if key in second and all(map(_is_enough, (first[key], second[key])))
    }
    domains, shapes = (
        {name: of_strata(pairs[key] for key in keys) for name, keys in _by(pairs, naming).items()}
        for naming in (lambda key: key.domain, shape_in_words)
    )
    return ServedAtEqualShape(
        steps=(_steps(first.values()), _steps(second.values())),
        compared_steps=(
            _steps(a for a, _ in pairs.values()), _steps(b for _, b in pairs.values())
        ),
        over_shapes=over_shapes,
        overall=of_strata(pairs.values()) if pairs else None,
        by_domain=domains,
        by_shape=shapes,
    )  # fmt: skip


def positions(s: Session, one: int, other: int) -> PositionShares | None:
    """``None``: they have no stratum in common in what they served last."""
    first, second = (
        dict(queries.strata.positions(s, version, newest=POSITIONS)) for version in (one, other)
    )
    common = [key for key in first if key in second
              and min(first[key].steps, second[key].steps) >= FEWEST_STEPS]  # fmt: skip
    if not common:
        return None
    by_depth: dict[int, list[ServedStratum]] = {}
    for key in common:
        by_depth.setdefault(key.depth, []).append(key)
    depth, keys = max(
        by_depth.items(),
        key=lambda item: min(sum(of[key].steps for key in item[1]) for of in (first, second)),
    )
    return PositionShares(
        depth,
        len(keys),
        (sum(first[key].steps for key in keys), sum(second[key].steps for key in keys)),
        (_shares([first[key] for key in keys]), _shares([second[key] for key in keys])),
    )


def of_strata(pairs: Iterable[tuple[AcceptCounts, AcceptCounts]]) -> EqualStrata:
    """Of one stratum or more; see the module for the weights."""
    rows = list(pairs)
    first, second = [a for a, _ in rows], [b for _, b in rows]
    lengths = tuple(sum(c.accept_length for c in side) / len(rows) for side in (first, second))
    intervals = [_interval(length, side, len(rows))
                 for length, side in zip(lengths, (first, second), strict=True)]  # fmt: skip
    difference = lengths[1] - lengths[0]
    low, high = _interval(difference, [*first, *second], len(rows))
    return EqualStrata(
        strata=len(rows),
        requests=(sum(c.requests for c in first), sum(c.requests for c in second)),
        accept_length=(lengths[0], lengths[1]),
        interval=(intervals[0], intervals[1]),
        difference=difference,
        ci_low=low,
        ci_high=high,
    )


def _interval(middle: float, counts: Sequence[AcceptCounts], strata: int) -> tuple[float, float]:
    """95%, with Student's t and the degrees of freedom of a sum of variances (Satterthwaite
    1946)."""
    from scipy.special import stdtrit  # slow to import

    variances = [c.variance for c in counts]
    total = sum(variances)
    if not total:
        return middle, middle
    freedom = total**2 / sum(
        v**2 / (c.requests - 1) for v, c in zip(variances, counts, strict=True)
    )
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(total) / strata
    return middle - half, middle + half


def shape_in_words(stratum: ServedStratum) -> str:
    rule = stratum.accept_rule.replace("_", " ") or "unknown rule"
    if not stratum.depth:
        return f"shapes together, {rule}"
    nodes = f"{stratum.nodes} nodes" if stratum.nodes else "nodes not known"
    return f"depth {stratum.depth}, top-k {stratum.topk}, {nodes}, {rule}"


def _is_enough(counts: AcceptCounts) -> bool:
    return counts.requests >= FEWEST_REQUESTS and counts.steps >= FEWEST_STEPS


def _steps(counts: Iterable[AcceptCounts]) -> int:
    return int(sum(c.steps for c in counts))


def _by(pairs: Mapping[ServedStratum, object], naming: object) -> dict[str, list[ServedStratum]]:
    assert callable(naming)
    groups: dict[str, list[ServedStratum]] = {}
    for key in sorted(pairs, key=lambda key: (naming(key), key.domain)):
        groups.setdefault(naming(key), []).append(key)
    return groups


def _shares(counts: Sequence[DepthCounts]) -> tuple[float, ...]:
    """Mean over strata of one depth."""
    return tuple(
        sum(one.reached[i] / one.steps for one in counts) / len(counts)
        for i in range(len(counts[0].reached))
    )
