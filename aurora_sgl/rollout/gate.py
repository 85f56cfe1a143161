"""The gate: a candidate against the live version, by replay over held-out recent requests.

All tries against one live version spend from one allowance: the k-th may pass by chance with
probability alpha / (k (k + 1)), which sums to alpha, so that trying often enough proves nothing.
Against a new live version the allowance is new.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import GateSettings
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.rollout.interval import RESAMPLES, Difference, paired_difference
from aurora_sgl.store import queries
from aurora_sgl.store.models import Evaluation
from aurora_sgl.training.held_out import left_out_in_words

if TYPE_CHECKING:
    from aurora_sgl.training.replay import Replayed
    from aurora_sgl.training.settings import TrainSettings

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
    before: Sequence[Replayed],
    after: Sequence[Replayed],
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
    if [r.request_id for r in before] != [r.request_id for r in after]:
        raise ValueError("paired lists must hold the same requests in the same order")
    pairs = list(zip(before, after, strict=True))
    alpha = spent_by(attempt, gate.alpha)
    overall = paired_difference(_sums(pairs), level=1 - 2 * alpha, seed=seed)
    domains: dict[str, tuple[Difference, str]] = {}
    for domain in sorted({r.domain for r in before}):
        here = [pair for pair in pairs if pair[0].domain == domain]
        found = paired_difference(_sums(here), level=DOMAIN_LEVEL, seed=seed)
        domains[domain] = (found, _domain_verdict(found, gate))
    if overall.requests < max(2, fewest):
        reason = (
            f"{overall.requests} held-out requests can be judged, at least {max(2, fewest)} needed"
            + left_out_in_words(left_out or {})
        )
        return Judgement(INCONCLUSIVE, reason, overall, domains)
    verdict, reason = _verdict(overall, domains, gate)
    return Judgement(verdict, reason, overall, domains, attempt, alpha)


def _sums(pairs: Sequence[tuple[Replayed, Replayed]]) -> list[tuple[int, int, int, int]]:
    return [(a.accepted, a.verify_steps, b.accepted, b.verify_steps) for a, b in pairs]


def _domain_verdict(found: Difference, gate: GateSettings) -> str:
    """pass: loses no more than the margin; inconclusive also for a domain that is not judged."""
    if found.requests < gate.min_domain_requests:
        return INCONCLUSIVE
    floor = -gate.domain_margin * found.baseline
    if found.ci_low >= floor:
        return PASS
    return FAIL if found.ci_high < floor else INCONCLUSIVE


def _verdict(
    overall: Difference, domains: Mapping[str, tuple[Difference, str]], gate: GateSettings
) -> tuple[str, str]:
    said = f"{overall.baseline:.3f} -> {overall.candidate:.3f} on {overall.requests} requests"
    lost = [domain for domain, (_, verdict) in domains.items() if verdict == FAIL]
    if lost:
        return FAIL, f"{said}, but worse by more than the margin in {', '.join(lost)}"
    if overall.ci_high < 0:
        return FAIL, f"{said}: worse"
    if overall.ci_low <= 0:
        return INCONCLUSIVE, f"{said}: not told apart"
    open_ = [
        domain
        for domain, (found, verdict) in domains.items()
        if verdict == INCONCLUSIVE and found.requests >= gate.min_domain_requests
    ]
    if open_:
        return INCONCLUSIVE, f"{said}, but it may be worse in {', '.join(open_)}"
    return PASS, f"{said}: better"


# -- in the store ---------------------------------------------------------------------------


def record(
    engine: Engine,
    before: Sequence[Replayed],
    after: Sequence[Replayed],
    *,
    candidate_id: int,
    baseline_id: int,
    recipe: TrainSettings,
    settings: GateSettings | None = None,
    details: Mapping[str, Any] | None = None,
    left_out: Mapping[str, int] | None = None,
) -> Evaluation:
    """Judge a candidate and store it: one row over all domains, which is returned, and one for
    each domain. The same requests again are the same try: its row is returned as it is.
    ``left_out``: held-out requests that can't be judged, by reason.

    The group is locked meanwhile, so that of two tries at once one is the next.
    """
    gate = settings or GateSettings()
    with store.session(engine) as s:
        candidate, baseline = (queries.version(s, i) for i in (candidate_id, baseline_id))
        queries.lock_group(s, candidate.group_id)
        told = _told(s, before, after, recipe, gate)
        for known in queries.evaluations(s, candidate_id):
            if (
                known.baseline_id == baseline_id
                and not known.domain
                and known.details.get("replay_sha256") == told["replay_sha256"]
            ):
                return known
        judged = judge(
            before,
            after,
            attempt=1 + queries.attempts(s, baseline_id),
            fewest=recipe.min_gate_requests,
            seed=recipe.seed,
            settings=gate,
            left_out=left_out,
        )
        told |= {
            "reason": judged.reason,
            "judged": {"requests": judged.overall.requests, "left_out": dict(left_out or {})},
            "candidate_sha256": candidate.weights_sha256,
            "baseline_sha256": baseline.weights_sha256,
            "by_domain": {
                domain: {**asdict(found), "verdict": verdict}
                for domain, (found, verdict) in judged.by_domain.items()
            },
            **(details or {}),
        }
        row = _add(s, candidate_id, baseline_id, "", judged.overall, judged.verdict, recipe,
                   attempt=judged.attempt, alpha=judged.alpha, details=_clean(told))  # fmt: skip
        for domain, (found, verdict) in judged.by_domain.items():
            of = {"evaluation_id": row.id, "level": DOMAIN_LEVEL}
            _add(s, candidate_id, baseline_id, domain, found, verdict, recipe, details=of)
        return row


def _add(
    s: Session,
    candidate_id: int,
    baseline_id: int,
    domain: str,
    found: Difference,
    verdict: str,
    recipe: TrainSettings,
    **columns: Any,
) -> Evaluation:
    return queries.add_evaluation(
        s,
        candidate_id=candidate_id,
        baseline_id=baseline_id,
        kind="replay",
        domain=domain,
        requests=found.requests,
        verdict=verdict,
        candidate_accept_length=_number(found.candidate),
        baseline_accept_length=_number(found.baseline),
        difference=_number(found.difference),
        ci_low=_number(found.ci_low),
        ci_high=_number(found.ci_high),
        depth=recipe.depth,
        topk=recipe.topk,
        nodes=recipe.shape.nodes,
        **columns,
    )


def _told(
    s: Session,
    before: Sequence[Replayed],
    after: Sequence[Replayed],
    recipe: TrainSettings,
    gate: GateSettings,
) -> dict[str, Any]:
    """What repeats the comparison: which requests, of which bytes, replayed how."""
    rows = [
        [a.request_id, a.domain, a.accepted, a.verify_steps, b.accepted, b.verify_steps]
        for a, b in zip(before, after, strict=True)
    ]
    traces = (queries.trace(s, a.request_id) for a in before)
    replayed = {
        "requests": rows,  # id, domain, baseline's accepted and steps, candidate's
        "traces_sha256": sha256_bytes(
            ",".join(trace.sha256 if trace else "-" for trace in traces).encode()
        ),
        "shape": [recipe.depth, recipe.topk, recipe.shape.nodes],
        "served_dtype": recipe.served_dtype,
    }
    return {
        **replayed,
        "replay_sha256": sha256_bytes(json.dumps(replayed).encode()),
        "seed": recipe.seed,
        "resamples": RESAMPLES,
        "gate_share": recipe.gate_share,
        "fewest": recipe.min_gate_requests,
        "settings": gate.model_dump(mode="json"),
    }


def evaluate(
    engine: Engine,
    artifacts: ArtifactRoot,
    candidate_id: int,
    *,
    baseline_id: int | None = None,
    recipe: TrainSettings | None = None,
    settings: GateSettings | None = None,
    target: Path | None = None,
) -> Evaluation:
    """Replay a candidate and the live version (or ``baseline_id``) over the newest held-out
    requests, in the shape and dtype that were served, and store the verdict.

    Raises ``Refused`` when the candidate is live already or of another target, and ``AuroraError``
    when weights or requests are missing.
    """
    from aurora_sgl.training.gate import replay_pair
    from aurora_sgl.training.settings import TrainSettings

    gate = settings or GateSettings()
    with store.session(engine, write=False) as s:
        candidate = queries.version(s, candidate_id)
        group = queries.group(s, candidate.group_id)
        if baseline_id is None:
            baseline_id = queries.aliases(s, group.id).get("live")
        if baseline_id is None:
            raise AuroraError(f"nothing is live in group {group.name!r} to compare with")
        if baseline_id == candidate_id:
            raise Refused(f"version {candidate_id} is live; there is nothing to compare it with")
        if queries.version(s, baseline_id).group_id != group.id:
            raise Refused(f"version {baseline_id} belongs to another group")
        recipe = as_served(s, group.id, recipe or TrainSettings())
    before, after = replay_pair(
        engine, artifacts, group, baseline_id, candidate_id, recipe,
        limit=gate.requests, target=target,
    )  # fmt: skip
    return record(
        engine, before, after,
        candidate_id=candidate_id, baseline_id=baseline_id, recipe=recipe, settings=gate,
    )  # fmt: skip


def as_served(s: Session, group_id: int, recipe: TrainSettings) -> TrainSettings:
    """The recipe with the draft shape and dtype that the group's servers run."""
    change: dict[str, Any] = {}
    shape = queries.served_shape(s, group_id)
    if shape is not None:
        change |= {"depth": shape[0], "topk": shape[1], "nodes": shape[2]}
    dtypes = [row.dtype for row in queries.servers(s, group_id, states=("running", "stopped"))]
    if dtypes and dtypes[0]:
        change["served_dtype"] = dtypes[0]
    return recipe.model_copy(update=change)


def _number(value: float) -> float | None:
    """NaN has no place in JSON or SQL."""
    return value if value == value else None


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    return _number(value) if isinstance(value, float) else value
