"""What was learned and what went live: versions, runs, evaluations, deployments, trials."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from aurora_sgl.store.models.base import Base


class DrafterVersion(Base):
    """One immutable drafter. Triggers refuse a change of what it is; ``pinned``, ``note``,
    ``metrics`` and ``pruned_at`` may change."""

    __tablename__ = "drafter_version"
    __table_args__ = (
        UniqueConstraint("group_id", "weights_sha256"),
        CheckConstraint("source IN ('scratch', 'train', 'import')", name="source"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("drafter_version.id"))
    created_at: Mapped[datetime]
    architecture: Mapped[str]
    weights_uri: Mapped[str]  # relative to the artifact root
    weights_sha256: Mapped[str]  # drafter.checkpoint.content_sha256
    vocab_sha256: Mapped[str]
    draft_vocab_size: Mapped[int]
    target_model: Mapped[str]
    target_revision: Mapped[str] = mapped_column(default="")
    training_run_id: Mapped[int | None] = mapped_column(
        ForeignKey("training_run.id", use_alter=True)
    )
    source: Mapped[str]
    note: Mapped[str] = mapped_column(default="")
    config: Mapped[dict[str, Any]] = mapped_column(default=dict)
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    pinned: Mapped[bool] = mapped_column(default=False)
    pruned_at: Mapped[datetime | None]  # when its weights were deleted


class Alias(Base):
    """``live``, ``candidate`` or ``previous`` of a group."""

    __tablename__ = "alias"
    __table_args__ = (CheckConstraint("name IN ('live', 'candidate', 'previous')", name="name"),)

    group_id: Mapped[int] = mapped_column(
        ForeignKey("deployment_group.id"), primary_key=True, autoincrement=False
    )
    name: Mapped[str] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    updated_at: Mapped[datetime]


class TrainingRun(Base):
    """One training run."""

    __tablename__ = "training_run"
    __table_args__ = (
        CheckConstraint("status IN ('running', 'succeeded', 'failed', 'skipped')", name="status"),
        Index(None, "group_id", "started_at"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    trigger: Mapped[str]
    status: Mapped[str] = mapped_column(default="running")
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    base_version_id: Mapped[int | None] = mapped_column(ForeignKey("drafter_version.id"))
    window_start: Mapped[datetime | None]
    window_end: Mapped[datetime | None]
    requests: Mapped[int] = mapped_column(default=0)
    tokens: Mapped[int] = mapped_column(default=0)
    objective: Mapped[str] = mapped_column(default="")
    config: Mapped[dict[str, Any]] = mapped_column(default=dict)
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[str] = mapped_column(default="")
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)  # while it goes on


class Evaluation(Base):
    """One comparison of two versions; ``domain`` empty: all domains together."""

    __tablename__ = "evaluation"
    __table_args__ = (
        CheckConstraint("verdict IN ('pass', 'fail', 'inconclusive')", name="verdict"),
        Index(None, "candidate_id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    candidate_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    baseline_id: Mapped[int | None] = mapped_column(ForeignKey("drafter_version.id"))
    created_at: Mapped[datetime]
    kind: Mapped[str]  # replay, live, trial
    domain: Mapped[str] = mapped_column(default="")
    depth: Mapped[int | None]
    topk: Mapped[int | None]
    nodes: Mapped[int | None]
    requests: Mapped[int]
    candidate_accept_length: Mapped[float | None]
    baseline_accept_length: Mapped[float | None]
    difference: Mapped[float | None]
    ci_low: Mapped[float | None]
    ci_high: Mapped[float | None]
    verdict: Mapped[str]
    attempt: Mapped[int | None]  # of its line; None: too few requests
    alpha: Mapped[float | None]  # of rows from before lines: what it spent of an allowance
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Deployment(Base):
    """One promote or rollback, never changed (triggers refuse it)."""

    __tablename__ = "deployment"
    __table_args__ = (
        UniqueConstraint("group_id", "generation"),
        CheckConstraint("action IN ('promote', 'rollback')", name="action"),
        CheckConstraint("reason <> ''", name="reason"),
        CheckConstraint("actor <> ''", name="actor"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    generation: Mapped[int]
    action: Mapped[str]
    version_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    previous_version_id: Mapped[int | None] = mapped_column(ForeignKey("drafter_version.id"))
    actor: Mapped[str]
    reason: Mapped[str]
    evaluation_id: Mapped[int | None] = mapped_column(ForeignKey("evaluation.id"))
    created_at: Mapped[datetime]
    before: Mapped[dict[str, Any]] = mapped_column(default=dict)
    after: Mapped[dict[str, Any]] = mapped_column(default=dict)
    evidence: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Trial(Base):
    """A switchback trial: two versions take turns on the same servers. Not a deployment."""

    __tablename__ = "trial"
    __table_args__ = (
        CheckConstraint("status IN ('running', 'finished', 'stopped')", name="status"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    group_id: Mapped[int] = mapped_column(ForeignKey("deployment_group.id"))
    baseline_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    candidate_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    status: Mapped[str] = mapped_column(default="running")
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    seed: Mapped[int] = mapped_column(default=0)
    verdict: Mapped[str] = mapped_column(default="")
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)


class TrialWindow(Base):
    """One turn of one version in a trial."""

    __tablename__ = "trial_window"

    trial_id: Mapped[int] = mapped_column(
        ForeignKey("trial.id"), primary_key=True, autoincrement=False
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version_id: Mapped[int] = mapped_column(ForeignKey("drafter_version.id"))
    started_at: Mapped[datetime]
    ends_at: Mapped[datetime | None]  # servers go back to the live version by then at the latest
    finished_at: Mapped[datetime | None]
    requests: Mapped[int] = mapped_column(default=0)
    verify_steps: Mapped[int] = mapped_column(default=0)
    accepted: Mapped[int] = mapped_column(default=0)
    completion_tokens: Mapped[int] = mapped_column(default=0)
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
