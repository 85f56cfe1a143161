"""The gate: a candidate against the live version, by replay over held-out recent requests.

One statement decides whether it is better, over all traffic; single strata (domains, and in large
ones the accept rules) only have to be unlikely to be harmed. All candidates that are tried in turn
against one live version, each continued from the one before, are one *line*, and one test: evidence
of fresh conversations is multiplied up from try to try (:mod:`aurora_sgl.evaluation.evidence`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aurora_sgl.config import GateSettings
from aurora_sgl.evaluation.evidence import Pair, conversation_of, log_evidence, steps_saved
from aurora_sgl.evaluation.pooling import (
    Memory,
    Pooled,
    StratumChange,
    changes,
    harmed,
    memories_of,
    partitions,
    pool,
    remembered,
)
from aurora_sgl.evaluation.standing import Reach, Standing, advance
from aurora_sgl.intervals import RESAMPLES, Difference, paired_difference, student_interval
from aurora_sgl.sequences.held_out import left_out_in_words

if TYPE_CHECKING:
    from aurora_sgl.evaluation.replay import RequestReplay

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
#: Level of the intervals that are shown: one-sided 95% that the candidate or a domain is no worse.
LEVEL = 0.90
#: Level at which the whole is worse beyond doubt, and the chance that a domain fails by error.
WORSE_LEVEL, HARM = 0.99, 0.05
#: Level of an interval of one standard error to each side.
ONE_ERROR = 0.683


@dataclass(frozen=True)
class CandidateLine:
    """The tries so far against one live version: how many, the logarithm of their common e-value,
    which requests and conversations they were made on, and what they measured of strata."""

    tries: int = 0
    log_e: float = 0.0
    requests: Collection[int] = ()
    conversations: Collection[str] = ()
    memories: Mapping[str, Memory] = field(default_factory=dict)

    def fresh(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Of conversations that no try was made on."""
        judged = {conversation_of(old) for old, _ in pairs if old.request_id in self.requests}
        judged |= set(self.conversations)
        return [pair for pair in pairs if conversation_of(pair[0]) not in judged]


@dataclass(frozen=True)
class Stratum:
    """What this try measured of one stratum, what is believed of it, and where it stands."""

    change: StratumChange
    pooled: Pooled
    level: float  # below its high-water mark, as a logarithm


@dataclass(frozen=True)
class Judgement:
    """``by_domain`` holds difference and verdict of each domain. ``log_e`` is the line's after this
    try, from ``fresh`` conversations; ``attempt`` is ``None`` for a try that lacked requests.
    ``standing`` is the candidate's, once it is live. ``continues``: the next candidate may start
    from this one, which did not fail and lies at most one standard error below the live version."""

    verdict: str  # pass | fail | inconclusive
    reason: str
    overall: Difference
    by_domain: dict[str, tuple[Difference, str]] = field(default_factory=dict)
    attempt: int | None = None
    log_e: float = 0.0
    fresh: int = 0
    strata: dict[str, Stratum] = field(default_factory=dict)
    standing: dict[str, Reach] = field(default_factory=dict)
    memories: dict[str, Memory] = field(default_factory=dict)
    continues: bool = False


def judge(
    before: Sequence[RequestReplay],
    after: Sequence[RequestReplay],
    *,
    line: CandidateLine | None = None,
    standing: Standing | None = None,
    fewest: int = 4,
    seed: int = 0,
    settings: GateSettings | None = None,
    left_out: Mapping[str, int] | None = None,
    resamples: int = RESAMPLES,
) -> Judgement:
    """Verdict over two replays of the same requests, in the same order.

    Pass: the e-value of the ``line`` reaches 1 / alpha, the candidate's own 90% interval lies above
    zero, no stratum has lost more than the margin with a chance above ``domain_risk``, and none
    lies more than the margin below its high-water mark (``standing``: the live version's). Fail: a
    stratum lost more than the margin beyond doubt, or the whole is worse beyond doubt. Anything
    else, and fewer than ``fewest`` requests, is inconclusive. ``left_out``, for the reason given:
    requests that could not be judged, by why. Raises ``ValueError`` when the lists are not of the
    same requests.
    """
    gate, line = settings or GateSettings(), line or CandidateLine()
    pairs = pairs_of(before, after)
    overall = difference_of(pairs, level=LEVEL, seed=seed, resamples=resamples)
    judged = _Strata.of(pairs, line, standing or {}, gate)
    strata = judged.strata
    lost = harmed({name: each.change for name, each in strata.items()}, gate.domain_margin, HARM)
    risky = [name for name, each in strata.items() if each.pooled.chance > gate.domain_risk]
    low = [name for name, each in strata.items() if each.level < math.log1p(-gate.domain_margin)]
    domains = {
        domain: (
            difference_of(
                [pair for pair in pairs if pair[0].domain == domain],
                level=LEVEL, seed=seed, resamples=resamples,
            ),
            _domain_verdict(domain, lost, [*risky, *low]),
        )
        for domain in sorted({r.domain for r in before})
    }  # fmt: skip
    judgement = Judgement(
        INCONCLUSIVE,
        "",
        overall,
        domains,
        log_e=line.log_e,
        strata=strata,
        standing=judged.standing,
        memories=judged.memories,
    )
    if overall.requests < max(2, fewest):
        reason = (
            f"{overall.requests} held-out requests can be judged, at least {max(2, fewest)} needed"
            + left_out_in_words(left_out or {})
        )
        return replace(judgement, reason=reason)
    saved = steps_saved(line.fresh(pairs))
    log_e = line.log_e + log_evidence(saved)
    evidence = _Evidence(overall, _top(pairs, WORSE_LEVEL) < 0, log_e, lost, risky, low)
    verdict, reason = evidence.verdict(gate)
    return replace(
        judgement, verdict=verdict, reason=reason, attempt=line.tries + 1, log_e=log_e,
        fresh=len(saved), continues=verdict != FAIL and _top(pairs, ONE_ERROR) >= 0,
    )  # fmt: skip


@dataclass(frozen=True)
class _Strata:
    """Of all partitions, each pooled by itself: strata, the standing of the candidate, and what the
    next try remembers."""

    strata: dict[str, Stratum]
    standing: dict[str, Reach]
    memories: dict[str, Memory]

    @classmethod
    def of(
        cls, pairs: Sequence[Pair], line: CandidateLine, standing: Standing, gate: GateSettings
    ) -> _Strata:
        fresh, margin = line.fresh(pairs), gate.domain_margin
        share = _conversations(fresh) / max(1, _conversations(pairs))
        result = cls({}, dict(standing), dict(line.memories))
        for part in partitions(pairs):
            own = changes(part)
            by_stratum = remembered(own, line.memories, margin, share)
            mean, pooled = pool(by_stratum, margin)
            levels, reached = advance(standing, by_stratum, mean)
            result.standing.update(reached)
            result.memories.update(memories_of(by_stratum, mean))
            result.strata.update(
                {name: Stratum(own[name], pooled[name], levels[name]) for name in own}
            )
        return result


def _conversations(pairs: Sequence[Pair]) -> int:
    return len({conversation_of(old) for old, _ in pairs})


def pairs_of(before: Sequence[RequestReplay], after: Sequence[RequestReplay]) -> list[Pair]:
    """Two replays side by side. Raises ``ValueError`` when they are not of the same requests in
    the same order."""
    if [r.request_id for r in before] != [r.request_id for r in after]:
        raise ValueError("paired lists must hold the same requests in the same order")
    return list(zip(before, after, strict=True))


def difference_of(
    pairs: Sequence[Pair], *, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """The paired difference of two replays with conversations as clusters, see
    :func:`aurora_sgl.intervals.paired_difference`."""
    sums, requests = _by_conversation(pairs)
    difference = paired_difference(sums, level=level, seed=seed, resamples=resamples)
    return replace(difference, requests=requests)


def _top(pairs: Sequence[Pair], level: float) -> float:
    """Upper end of Student's interval of the difference; nan below two conversations."""
    return student_interval(_by_conversation(pairs)[0], level)[1]


def _by_conversation(
    pairs: Sequence[Pair],
) -> tuple[list[tuple[float, float, float, float]], int]:
    """Accepted and steps of both by conversation, and how many requests have a step."""
    sums: dict[str, tuple[float, float, float, float]] = {}
    requests = 0
    for a, b in pairs:
        if a.verify_steps and b.verify_steps:
            y, n, z, m = sums.get(conversation_of(a), (0.0, 0.0, 0.0, 0.0))
            sums[conversation_of(a)] = (
                y + a.accepted, n + a.verify_steps, z + b.accepted, m + b.verify_steps
            )  # fmt: skip
            requests += 1
    return list(sums.values()), requests


def _domain_verdict(domain: str, lost: Sequence[str], doubtful: Sequence[str]) -> str:
    """pass: its strata are unlikely to have lost more than the margin."""
    for verdict, strata in ((FAIL, lost), (INCONCLUSIVE, doubtful)):
        if any(stratum.partition("/")[2] == domain for stratum in strata):
            return verdict
    return PASS


@dataclass(frozen=True)
class _Evidence:
    """``lost``, ``risky`` and ``low``: strata harmed beyond doubt, perhaps, and by and by."""

    overall: Difference
    worse: bool
    log_e: float
    lost: Sequence[str]
    risky: Sequence[str]
    low: Sequence[str]

    def verdict(self, gate: GateSettings) -> tuple[str, str]:
        overall = self.overall
        summary = (
            f"{overall.baseline:.3f} -> {overall.candidate:.3f} on {overall.requests} requests"
        )
        if self.lost:
            return FAIL, f"{summary}, but worse by more than the margin in {_listed(self.lost)}"
        if self.worse:
            return FAIL, f"{summary}: worse"
        if not overall.ci_low > 0:
            return INCONCLUSIVE, f"{summary}: not told apart"
        if self.log_e < -math.log(gate.alpha):
            evidence = f"evidence {math.exp(self.log_e):.2g} of {1 / gate.alpha:.0f}"
            return INCONCLUSIVE, f"{summary}: not told apart from chance yet ({evidence})"
        if self.risky:
            return INCONCLUSIVE, f"{summary}, but it may be worse in {_listed(self.risky)}"
        if self.low:
            lower = "too far below what earlier versions reached"
            return INCONCLUSIVE, f"{summary}, but {lower} in {_listed(self.low)}"
        return PASS, f"{summary}: better"


def _listed(strata: Sequence[str]) -> str:
    """Domains; for a part of one, which."""
    names = []
    for stratum in strata:
        rule, _, domain = stratum.partition("/")
        names.append(domain if rule == "all" else f"{domain} ({rule})")
    return ", ".join(names)
