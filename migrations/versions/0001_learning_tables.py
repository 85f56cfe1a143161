"""Groups, versions, training runs, evaluations, deployments, trials."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)
Json = sa.JSON().with_variant(JSONB(), "postgresql")

TABLES = [
    "deployment_group",
    "drafter_version",
    "training_run",
    "alias",
    "evaluation",
    "deployment",
    "trial",
    "trial_window",
]


def required(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, autoincrement=name == "id")


def optional(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=True)


def on_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


LATE_KEY = "fk_drafter_version_training_run_id"


def late_key() -> list[sa.ForeignKeyConstraint]:
    """Versions name their run and runs their base version. SQLite takes a key to a table that
    does not exist yet, and can't add one later; PostgreSQL the other way round."""
    if not on_sqlite():
        return []
    return [sa.ForeignKeyConstraint(["training_run_id"], ["training_run.id"], name=LATE_KEY)]


def upgrade() -> None:
    op.create_table(
        "deployment_group",
        required("id", Int),
        required("name", sa.String),
        required("target_model", sa.String),
        required("target_revision", sa.String),
        required("draft_architecture", sa.String),
        required("generation", Int),
        required("created_at", Time),
        sa.PrimaryKeyConstraint("id", name="pk_deployment_group"),
        sa.UniqueConstraint("name", name="uq_deployment_group_name"),
    )
    op.create_table(
        "drafter_version",
        required("id", Int),
        required("group_id", Int),
        optional("parent_id", Int),
        required("created_at", Time),
        required("architecture", sa.String),
        required("weights_uri", sa.String),
        required("weights_sha256", sa.String),
        required("vocab_sha256", sa.String),
        required("draft_vocab_size", Int),
        required("target_model", sa.String),
        required("target_revision", sa.String),
        optional("training_run_id", Int),
        required("source", sa.String),
        required("note", sa.String),
        required("config", Json),
        required("metrics", Json),
        required("pinned", sa.Boolean),
        optional("pruned_at", Time),
        sa.CheckConstraint(
            "source IN ('scratch', 'train', 'import')", name="ck_drafter_version_source"
        ),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_drafter_version_group_id"
        ),
        sa.ForeignKeyConstraint(
            ["parent_id"], ["drafter_version.id"], name="fk_drafter_version_parent_id"
        ),
        *late_key(),
        sa.PrimaryKeyConstraint("id", name="pk_drafter_version"),
        sa.UniqueConstraint(
            "group_id", "weights_sha256", name="uq_drafter_version_group_id_weights_sha256"
        ),
    )
    op.create_table(
        "training_run",
        required("id", Int),
        required("group_id", Int),
        required("trigger", sa.String),
        required("status", sa.String),
        required("started_at", Time),
        optional("finished_at", Time),
        optional("base_version_id", Int),
        optional("window_start", Time),
        optional("window_end", Time),
        required("requests", Int),
        required("tokens", Int),
        required("objective", sa.String),
        required("config", Json),
        required("metrics", Json),
        required("error", sa.String),
        sa.CheckConstraint(
            "status IN ('running', 'succeeded', 'failed', 'skipped')", name="ck_training_run_status"
        ),
        sa.ForeignKeyConstraint(
            ["base_version_id"], ["drafter_version.id"], name="fk_training_run_base_version_id"
        ),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_training_run_group_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_training_run"),
    )
    op.create_index(
        "ix_training_run_group_id_started_at", "training_run", ["group_id", "started_at"]
    )
    op.create_table(
        "alias",
        required("group_id", Int),
        required("name", sa.String),
        required("version_id", Int),
        required("updated_at", Time),
        sa.CheckConstraint("name IN ('live', 'candidate', 'previous')", name="ck_alias_name"),
        sa.ForeignKeyConstraint(["group_id"], ["deployment_group.id"], name="fk_alias_group_id"),
        sa.ForeignKeyConstraint(["version_id"], ["drafter_version.id"], name="fk_alias_version_id"),
        sa.PrimaryKeyConstraint("group_id", "name", name="pk_alias"),
    )
    op.create_table(
        "evaluation",
        required("id", Int),
        required("candidate_id", Int),
        optional("baseline_id", Int),
        required("created_at", Time),
        required("kind", sa.String),
        required("domain", sa.String),
        optional("depth", Int),
        optional("topk", Int),
        optional("nodes", Int),
        required("requests", Int),
        optional("candidate_accept_length", sa.Double),
        optional("baseline_accept_length", sa.Double),
        optional("difference", sa.Double),
        optional("ci_low", sa.Double),
        optional("ci_high", sa.Double),
        required("verdict", sa.String),
        required("details", Json),
        sa.CheckConstraint(
            "verdict IN ('pass', 'fail', 'inconclusive')", name="ck_evaluation_verdict"
        ),
        sa.ForeignKeyConstraint(
            ["baseline_id"], ["drafter_version.id"], name="fk_evaluation_baseline_id"
        ),
        sa.ForeignKeyConstraint(
            ["candidate_id"], ["drafter_version.id"], name="fk_evaluation_candidate_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_evaluation"),
    )
    op.create_index("ix_evaluation_candidate_id", "evaluation", ["candidate_id"])
    op.create_table(
        "deployment",
        required("id", Int),
        required("group_id", Int),
        required("generation", Int),
        required("action", sa.String),
        required("version_id", Int),
        optional("previous_version_id", Int),
        required("actor", sa.String),
        required("reason", sa.String),
        optional("evaluation_id", Int),
        required("created_at", Time),
        required("before", Json),
        required("after", Json),
        required("evidence", Json),
        sa.CheckConstraint("action IN ('promote', 'rollback')", name="ck_deployment_action"),
        sa.CheckConstraint("actor <> ''", name="ck_deployment_actor"),
        sa.CheckConstraint("reason <> ''", name="ck_deployment_reason"),
        sa.ForeignKeyConstraint(
            ["evaluation_id"], ["evaluation.id"], name="fk_deployment_evaluation_id"
        ),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_deployment_group_id"
        ),
        sa.ForeignKeyConstraint(
            ["previous_version_id"],
            ["drafter_version.id"],
            name="fk_deployment_previous_version_id",
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["drafter_version.id"], name="fk_deployment_version_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_deployment"),
        sa.UniqueConstraint("group_id", "generation", name="uq_deployment_group_id_generation"),
    )
    op.create_table(
        "trial",
        required("id", Int),
        required("group_id", Int),
        required("baseline_id", Int),
        required("candidate_id", Int),
        required("status", sa.String),
        required("started_at", Time),
        optional("finished_at", Time),
        required("seed", Int),
        required("verdict", sa.String),
        required("details", Json),
        sa.CheckConstraint("status IN ('running', 'finished', 'stopped')", name="ck_trial_status"),
        sa.ForeignKeyConstraint(
            ["baseline_id"], ["drafter_version.id"], name="fk_trial_baseline_id"
        ),
        sa.ForeignKeyConstraint(
            ["candidate_id"], ["drafter_version.id"], name="fk_trial_candidate_id"
        ),
        sa.ForeignKeyConstraint(["group_id"], ["deployment_group.id"], name="fk_trial_group_id"),
        sa.PrimaryKeyConstraint("id", name="pk_trial"),
    )
    op.create_table(
        "trial_window",
        required("trial_id", Int),
        required("number", Int),
        required("version_id", Int),
        required("started_at", Time),
        optional("finished_at", Time),
        required("requests", Int),
        required("verify_steps", Int),
        required("accepted", Int),
        required("completion_tokens", Int),
        required("metrics", Json),
        sa.ForeignKeyConstraint(["trial_id"], ["trial.id"], name="fk_trial_window_trial_id"),
        sa.ForeignKeyConstraint(
            ["version_id"], ["drafter_version.id"], name="fk_trial_window_version_id"
        ),
        sa.PrimaryKeyConstraint("trial_id", "number", name="pk_trial_window"),
    )
    if not on_sqlite():
        op.create_foreign_key(
            LATE_KEY, "drafter_version", "training_run", ["training_run_id"], ["id"]
        )


def downgrade() -> None:
    if not on_sqlite():
        op.drop_constraint(LATE_KEY, "drafter_version")
    for table in reversed(TABLES):
        op.drop_table(table)
