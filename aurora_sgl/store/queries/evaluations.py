"""Evaluations: comparisons of two versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import Deployment, DrafterVersion, Evaluation, TrainingRun


def add_evaluation(
    s: Session,
    *,
    candidate_id: int,
    baseline_id: int | None,
    kind: str,
    requests: int,
    verdict: str,
    candidate_accept_length: float | None = None,
    baseline_accept_length: float | None = None,
    difference: float | None = None,
    ci_low: float | None = None,
    ci_high: float | None = None,
    domain: str = "",
    depth: int | None = None,
    topk: int | None = None,
    nodes: int | None = None,
    attempt: int | None = None,
    alpha: float | None = None,
    details: Mapping[str, Any] | None = None,
) -> Evaluation:
    """``difference`` is candidate less baseline, with its interval (at ``details["level"]``, else
    95%; in rows from before lines, 1 - 2 ``alpha``: what the try spent of an allowance that was
    shared by all against one live version); ``attempt`` counts the tries of a line; ``verdict`` is
    pass, fail or inconclusive; ``domain`` empty means all of them together."""
    row = Evaluation(
        candidate_id=candidate_id,
        baseline_id=baseline_id,
        created_at=utc_now(),
        kind=kind,
        domain=domain,
        depth=depth,
        topk=topk,
        nodes=nodes,
        requests=requests,
        candidate_accept_length=candidate_accept_length,
        baseline_accept_length=baseline_accept_length,
        difference=difference,
        ci_low=ci_low,
        ci_high=ci_high,
        verdict=verdict,
        attempt=attempt,
        alpha=alpha,
        details=dict(details or {}),
    )
    s.add(row)
    s.flush()
    return row


def evaluation(s: Session, evaluation_id: int) -> Evaluation:
    """Raises ``AuroraError`` when there is none."""
    row = s.get(Evaluation, evaluation_id)
    if row is None:
        raise AuroraError(f"there is no evaluation {evaluation_id}")
    return row


def evaluations(s: Session, candidate_id: int) -> Sequence[Evaluation]:
    """Newest first."""
    return s.scalars(
        select(Evaluation)
        .where(Evaluation.candidate_id == candidate_id)
        .order_by(Evaluation.id.desc())
    ).all()


def between(s: Session, one: int, other: int, kind: str) -> Sequence[Evaluation]:
    """Of two versions against each other, either way round, over all domains; newest first."""
    ways = [(one, other), (other, one)]
    e = Evaluation
    return s.scalars(
        select(e)
        .where(tuple_(e.candidate_id, e.baseline_id).in_(ways), e.kind == kind, e.domain == "")
        .order_by(e.id.desc())
    ).all()


def last_replay(s: Session, group_id: int) -> Evaluation | None:
    """The gate's newest evaluation of a group, over all domains."""
    return s.scalars(
        select(Evaluation)
        .join(DrafterVersion, DrafterVersion.id == Evaluation.candidate_id)
        .where(
            DrafterVersion.group_id == group_id,
            Evaluation.kind == "replay",
            Evaluation.domain == "",
        )
        .order_by(Evaluation.id.desc())
        .limit(1)
    ).one_or_none()


def verdicts(
    s: Session, group_id: int, *, since: datetime | None = None, limit: int | None = None
) -> Sequence[Evaluation]:
    """Evaluations over all domains of a group's versions, newest first."""
    query = (
        select(Evaluation)
        .join(DrafterVersion, DrafterVersion.id == Evaluation.candidate_id)
        .where(DrafterVersion.group_id == group_id, Evaluation.domain == "")
    )
    if since is not None:
        query = query.where(Evaluation.created_at >= since)
    return s.scalars(query.order_by(Evaluation.id.desc()).limit(limit)).all()


def count_verdicts(s: Session, group_id: int) -> dict[tuple[str, str], int]:
    """Evaluations over all domains by (kind, verdict)."""
    rows = s.execute(
        select(Evaluation.kind, Evaluation.verdict, func.count())
        .join(DrafterVersion, DrafterVersion.id == Evaluation.candidate_id)
        .where(DrafterVersion.group_id == group_id, Evaluation.domain == "")
        .group_by(Evaluation.kind, Evaluation.verdict)
    )
    return {(kind, verdict): count for kind, verdict, count in rows}


def replays_against(s: Session, baseline_id: int) -> Sequence[Evaluation]:
    """The gate's evaluations of candidates against this version over all domains, oldest first."""
    return s.scalars(
        select(Evaluation)
        .where(
            Evaluation.baseline_id == baseline_id,
            Evaluation.kind == "replay",
            Evaluation.domain == "",
        )
        .order_by(Evaluation.id)
    ).all()


def passed_against(
    s: Session, group_id: int, live_id: int, triggers: Sequence[str]
) -> Sequence[Evaluation]:
    """Evaluations by replay that versions passed against what is live, newest first; of versions
    from runs with these triggers that were never live and still have their weights."""
    version = DrafterVersion
    deployed = select(Deployment.version_id).where(Deployment.group_id == group_id)
    return s.scalars(
        select(Evaluation)
        .join(version, version.id == Evaluation.candidate_id)
        .join(TrainingRun, TrainingRun.id == version.training_run_id)
        .where(
            version.group_id == group_id,
            TrainingRun.trigger.in_(triggers),
            version.pruned_at.is_(None),
            version.id.not_in(deployed),
            Evaluation.baseline_id == live_id,
            Evaluation.kind == "replay",
            Evaluation.domain == "",
            Evaluation.verdict == "pass",
        )
        .order_by(Evaluation.id.desc())
    ).all()


def newest_evaluations(s: Session, version_ids: Sequence[int]) -> dict[int, Evaluation]:
    """The last evaluation over all domains of each of these versions, by candidate."""
    e = Evaluation
    newest: dict[int, Evaluation] = {}
    for begin in range(0, len(version_ids), 400):
        part = version_ids[begin : begin + 400]
        query = select(e).where(e.candidate_id.in_(part), e.domain == "").order_by(e.id)
        newest |= {row.candidate_id: row for row in s.scalars(query)}
    return newest
