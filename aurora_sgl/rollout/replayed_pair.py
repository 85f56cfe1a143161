"""Replays that set two versions against each other, whichever of them was the candidate.

Differences are the second version's less the first's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from aurora_sgl.intervals import accept_length
from aurora_sgl.store import queries
from aurora_sgl.store.models import Evaluation

#: Requests a side that differ most, and verify steps below which a request says little.
MOST_REQUESTS, FEWEST_STEPS = 6, 5


@dataclass(frozen=True)
class Replayed:
    """One replay of both on the same requests."""

    evaluation_id: int
    created_at: datetime
    candidate_id: int
    baseline_id: int | None
    requests: int
    verdict: str
    level: float | None  # of the interval
    accept_length: tuple[float | None, float | None]
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    shape: tuple[int | None, int | None, int | None]
    served_dtype: str = ""
    has_requests: bool = False
    by_domain: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Against:
    """Both were replayed against a third version, each on its own requests at its own time."""

    baseline_id: int
    replays: tuple[Replayed, Replayed]  # with the third version first


@dataclass(frozen=True)
class RequestContrast:
    """One replayed request under both versions."""

    request_id: int
    domain: str
    accept_rule: str
    verify_steps: tuple[float, float]
    accepted: tuple[float, float]

    @property
    def accept_length(self) -> tuple[float, float]:
        first, second = (
            accept_length(y, n) for y, n in zip(self.accepted, self.verify_steps, strict=True)
        )
        return first, second

    @property
    def difference(self) -> float:
        first, second = self.accept_length
        return second - first


def replayed(row: Evaluation, first: int) -> Replayed:
    """``first``: the version whose numbers come first."""
    is_turned = row.candidate_id == first
    lengths = (row.baseline_accept_length, row.candidate_accept_length)
    domains = dict(row.details.get("by_domain") or {})
    return Replayed(
        evaluation_id=row.id,
        created_at=row.created_at,
        candidate_id=row.candidate_id,
        baseline_id=row.baseline_id,
        requests=row.requests,
        verdict=row.verdict,
        level=_level(row),
        accept_length=lengths[::-1] if is_turned else lengths,
        **turned(row.difference, row.ci_low, row.ci_high, is_turned),
        shape=(row.depth, row.topk, row.nodes),
        served_dtype=str(row.details.get("served_dtype") or ""),
        has_requests=bool(row.details.get("requests")),
        by_domain={
            domain: _domain(one, is_turned)
            for domain, one in sorted(domains.items())
            if isinstance(one, dict)
        },
    )


def _domain(one: Mapping[str, Any], is_turned: bool) -> dict[str, Any]:
    lengths = (one.get("baseline"), one.get("candidate"))
    ends = (one.get("difference"), one.get("ci_low"), one.get("ci_high"))
    return {
        "requests": one.get("requests"),
        "accept_length": lengths[::-1] if is_turned else lengths,
        **turned(*ends, is_turned),
        "verdict": one.get("verdict"),
    }


def turned(
    difference: float | None, low: float | None, high: float | None, is_turned: bool
) -> dict[str, Any]:
    if is_turned:
        difference, low, high = (None if x is None else -x for x in (difference, high, low))
    return {"difference": difference, "ci_low": low, "ci_high": high}


def _level(row: Evaluation) -> float:
    """As ``queries.evaluations.add_evaluation`` says."""
    kept = row.details.get("level")
    return float(kept) if kept else 0.95 if row.alpha is None else 1 - 2 * row.alpha


def against(s: Session, one: int, other: int) -> Against | None:
    """The newest replays of both against the same third version."""
    newest: list[dict[int, Evaluation]] = []
    for version_id in (one, other):
        rows = queries.evaluations.evaluations(s, version_id)
        whole = [row for row in rows if row.kind == "replay" and not row.domain]
        newest.append({row.baseline_id: row for row in reversed(whole) if row.baseline_id})
    first, second = newest
    if not (common := first.keys() & second.keys()):
        return None
    baseline = max(common, key=lambda each: min(first[each].id, second[each].id))
    pair = replayed(first[baseline], baseline), replayed(second[baseline], baseline)
    return Against(baseline, pair)


# -- single requests ----------------------------------------------------------------------------


def contrasts(
    replays: Sequence[Evaluation], first: int
) -> tuple[list[RequestContrast], list[RequestContrast]]:
    """Of the newest replay that keeps its requests: those on which the second version is worse by
    most, and those on which it is better by most."""
    row = next((row for row in replays if row.details.get("requests")), None)
    if row is None:
        return [], []
    contrasts = [
        one for one in (_contrast(each, row.candidate_id == first)
                        for each in row.details["requests"]) if one is not None
    ]  # fmt: skip
    contrasts.sort(key=lambda one: (one.difference, one.request_id))
    worse = [one for one in contrasts[:MOST_REQUESTS] if one.difference < 0]
    better = [one for one in contrasts[: -MOST_REQUESTS - 1 : -1] if one.difference > 0]
    return worse, better


def _contrast(row: Any, is_turned: bool) -> RequestContrast | None:
    """From a row of ``details["requests"]``, see ``evaluation.record``; ``None`` for one with
    hardly a step."""
    if not isinstance(row, list) or len(row) < 6:
        return None
    accepted, steps = (row[2], row[4]), (row[3], row[5])
    if min(steps) < FEWEST_STEPS:
        return None
    rule = str(row[6]) if len(row) > 6 else ""
    if is_turned:
        accepted, steps = accepted[::-1], steps[::-1]
    return RequestContrast(int(row[0]), str(row[1]), rule, steps, accepted)
