"""The gate: a candidate against the live version, by replay over held-out recent requests.

All tries against one live version spend from one allowance: the k-th may pass by chance with
probability alpha / (k (k + 1)), which sums to alpha, so that trying often enough proves nothing.
Against a new live version the allowance is new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aurora_sgl.config import GateSettings
from aurora_sgl.intervals import Difference, paired_difference
from aurora_sgl.sequences.held_out import left_out_in_words

if TYPE_CHECKING:
    from aurora_sgl.evaluation.replay import RequestReplay

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
#: Level of the intervals of single domains: one-sided 95% that a domain loses no more.
DOMAIN_LEVEL = 0.90


@dataclass(frozen=True)
class Judgement:
    """``by_domain`` holds difference and verdict of each domain; ``attempt`` and ``alpha`` are
    ``None`` for a try that spent nothing, for lack of requests."""

    verdict: str  # pass | fail | inconclusive
    reason: str
    overall: Difference
    by_domain: dict[str, tuple[Difference, str]] = field(default_factory=dict)
    attempt: int | None = None
    alpha: float | None = None


def spent_by(attempt: int, alpha: float) -> float:
    """What the k-th try spends of an allowance ``alpha``; all tries together spend alpha."""
    return alpha / (attempt * (attempt + 1))


def judge(
    before: Sequence[RequestReplay],
    after: Sequence[RequestReplay],
    *,
    attempt: int = 1,
    fewest: int = 4,
    seed: int = 0,
    settings: GateSettings | None = None,
    left_out: Mapping[str, int] | None = None,
) -> Judgement:
    """Verdict over two replays of the same requests, in the same order.

    Pass: the interval of the difference at level 1 - 2 * (what this try spends) lies above zero,
    and in no domain the 90% interval reaches below the margin. Fail: it lies below zero, or a
    domain's lies below the margin. Anything else, and fewer than ``fewest`` requests, is
    inconclusive. ``left_out``, for the reason given: requests that could not be judged, by why.
    Raises ``ValueError`` when the lists are not of the same requests.
    """
    gate = settings or GateSettings()
    pairs = pairs_of(before, after)
    alpha = spent_by(attempt, gate.alpha)
    overall = difference_of(pairs, level=1 - 2 * alpha, seed=seed)
    domains: dict[str, tuple[Difference, str]] = {}
    for domain in sorted({r.domain for r in before}):
        here = [pair for pair in pairs if pair[0].domain == domain]
        difference = difference_of(here, level=DOMAIN_LEVEL, seed=seed)
        domains[domain] = (difference, _domain_verdict(difference, gate))
    if overall.requests < max(2, fewest):
        reason = (
            f"{overall.requests} held-out requests can be judged, at least {max(2, fewest)} needed"
            + left_out_in_words(left_out or {})
        )
        return Judgement(INCONCLUSIVE, reason, overall, domains)
    verdict, reason = _verdict(overall, domains, gate)
    return Judgement(verdict, reason, overall, domains, attempt, alpha)


def pairs_of(
    before: Sequence[RequestReplay], after: Sequence[RequestReplay]
) -> list[tuple[RequestReplay, RequestReplay]]:
    """Two replays side by side. Raises ``ValueError`` when they are not of the same requests in
    the same order."""
    if [r.request_id for r in before] != [r.request_id for r in after]:
        raise ValueError("paired lists must hold the same requests in the same order")
    return list(zip(before, after, strict=True))


def difference_of(
    pairs: Sequence[tuple[RequestReplay, RequestReplay]], *, level: float = 0.95, seed: int = 0
) -> Difference:
    """The paired difference of two replays, see :func:`aurora_sgl.intervals.paired_difference`."""
    sums = [(a.accepted, a.verify_steps, b.accepted, b.verify_steps) for a, b in pairs]
    return paired_difference(sums, level=level, seed=seed)


def _domain_verdict(difference: Difference, gate: GateSettings) -> str:
    """pass: loses no more than the margin; inconclusive also for a domain that is not judged."""
    if difference.requests < gate.min_domain_requests:
        return INCONCLUSIVE
    floor = -gate.domain_margin * difference.baseline
    if difference.ci_low >= floor:
        return PASS
    return FAIL if difference.ci_high < floor else INCONCLUSIVE


def _verdict(
    overall: Difference, domains: Mapping[str, tuple[Difference, str]], gate: GateSettings
) -> tuple[str, str]:
    summary = f"{overall.baseline:.3f} -> {overall.candidate:.3f} on {overall.requests} requests"
    lost = [domain for domain, (_, verdict) in domains.items() if verdict == FAIL]
    if lost:
        return FAIL, f"{summary}, but worse by more than the margin in {', '.join(lost)}"
    if overall.ci_high < 0:
        return FAIL, f"{summary}: worse"
    if overall.ci_low <= 0:
        return INCONCLUSIVE, f"{summary}: not told apart"
    open_ = [
        domain
        for domain, (difference, verdict) in domains.items()
        if verdict == INCONCLUSIVE and difference.requests >= gate.min_domain_requests
    ]
    if open_:
        return INCONCLUSIVE, f"{summary}, but it may be worse in {', '.join(open_)}"
    return PASS, f"{summary}: better"
