"""Training runs, evaluations and deployments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.models import (
    Deployment,
    DeploymentGroup,
    DrafterVersion,
    Evaluation,
    TrainingRun,
)


def start_run(
    s: Session,
    group_id: int,
    *,
    trigger: str,
    base_version_id: int | None = None,
    window_start: datetime | None = None,
    window_end: datetime | None = None,
    objective: str = "",
    config: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """A new run in the status ``running``."""
    run = TrainingRun(
        group_id=group_id,
        trigger=trigger,
        started_at=utc_now(),
        base_version_id=base_version_id,
        window_start=window_start,
        window_end=window_end,
        objective=objective,
        config=dict(config or {}),
    )
    s.add(run)
    s.flush()
    return run


def finish_run(s: Session, run_id: int, status: str, **fields: Any) -> TrainingRun:
    """End a run: ``status`` is succeeded, failed or skipped; ``fields`` are columns of
    ``training_run`` such as requests, tokens, metrics, error, window_start.

    Raises ``AuroraError`` for an unknown run or one that has ended.
    """
    run = s.get(TrainingRun, run_id)
    if run is None or run.status != "running":
        raise AuroraError(f"training run {run_id} is {run.status if run else 'unknown'}")
    for name, value in {"finished_at": utc_now(), **fields, "status": status}.items():
        if name not in TrainingRun.__table__.columns:
            raise AttributeError(f"training_run has no column {name}")
        setattr(run, name, value)
    s.flush()
    return run


def runs(
    s: Session, group_id: int, *, status: str = "", limit: int | None = None
) -> Sequence[TrainingRun]:
    """Newest first; with a status only those in it."""
    query = select(TrainingRun).where(TrainingRun.group_id == group_id)
    if status:
        query = query.where(TrainingRun.status == status)
    return s.scalars(query.order_by(TrainingRun.id.desc()).limit(limit)).all()


def tokens_of_runs(s: Session, run_ids: Sequence[int]) -> int:
    """Positions that these runs trained on, together."""
    found = s.scalar(
        select(func.coalesce(func.sum(TrainingRun.tokens), 0)).where(TrainingRun.id.in_(run_ids))
    )
    return int(found or 0)


def explain_stop(s: Session, group_id: int, why: str) -> None:
    """The newest run was ended by a signal: write down why, instead of which signal."""
    last = runs(s, group_id, limit=1)
    if last and last[0].status == "failed" and last[0].error.startswith("SystemExit"):
        last[0].error = why


def fail_running(s: Session, group_id: int, error: str) -> int:
    """Runs that were left running by a trainer that is gone become ``failed``."""
    left = s.scalars(
        select(TrainingRun).where(TrainingRun.group_id == group_id, TrainingRun.status == "running")
    ).all()
    for run in left:
        run.status, run.error, run.finished_at = "failed", error, utc_now()
    s.flush()
    return len(left)


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
    """``difference`` is candidate less baseline, with its interval (95%, or 1 - 2 alpha for a try
    that spends ``alpha`` of the gate's allowance); ``verdict`` is pass, fail or inconclusive;
    ``domain`` empty means all of them together."""
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
    found = s.get(Evaluation, evaluation_id)
    if found is None:
        raise AuroraError(f"there is no evaluation {evaluation_id}")
    return found


def evaluations(s: Session, candidate_id: int) -> Sequence[Evaluation]:
    """Newest first."""
    return s.scalars(
        select(Evaluation)
        .where(Evaluation.candidate_id == candidate_id)
        .order_by(Evaluation.id.desc())
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


def count_verdicts(s: Session, group_id: int) -> dict[tuple[str, str], int]:
    """Evaluations over all domains by (kind, verdict)."""
    rows = s.execute(
        select(Evaluation.kind, Evaluation.verdict, func.count())
        .join(DrafterVersion, DrafterVersion.id == Evaluation.candidate_id)
        .where(DrafterVersion.group_id == group_id, Evaluation.domain == "")
        .group_by(Evaluation.kind, Evaluation.verdict)
    )
    return {(kind, verdict): count for kind, verdict, count in rows}


def add_deployment(
    s: Session,
    group: DeploymentGroup,
    *,
    action: str,
    version_id: int,
    previous_version_id: int | None,
    actor: str,
    reason: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    evidence: Mapping[str, Any],
    evaluation_id: int | None = None,
) -> Deployment:
    """Count the group one generation up and write the row; the group must be locked."""
    group.generation += 1
    row = Deployment(
        group_id=group.id,
        generation=group.generation,
        action=action,
        version_id=version_id,
        previous_version_id=previous_version_id,
        actor=actor,
        reason=reason,
        evaluation_id=evaluation_id,
        created_at=utc_now(),
        before=dict(before),
        after=dict(after),
        evidence=dict(evidence),
    )
    s.add(row)
    s.flush()
    return row


def deployments(s: Session, group_id: int, *, limit: int | None = None) -> Sequence[Deployment]:
    """Newest first."""
    return s.scalars(
        select(Deployment)
        .where(Deployment.group_id == group_id)
        .order_by(Deployment.generation.desc())
        .limit(limit)
    ).all()


def promotion_of(s: Session, group_id: int, version_id: int) -> Deployment | None:
    """The last promotion that put this version live."""
    return s.scalars(
        select(Deployment)
        .where(
            Deployment.group_id == group_id,
            Deployment.version_id == version_id,
            Deployment.action == "promote",
        )
        .order_by(Deployment.generation.desc())
        .limit(1)
    ).one_or_none()
