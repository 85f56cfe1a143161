"""The watch, the scheduler's state, drift, the audit of what is no deployment."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)
Json = sa.JSON().with_variant(JSONB(), "postgresql")

TABLES = ["watch", "watch_window", "scheduler_state", "drift", "audit"]
#: Columns that tables of earlier revisions get.
NEW_COLUMNS = {
    "evaluation": [("attempt", Int), ("alpha", sa.Double)],
    "trial_window": [("ends_at", Time)],
}


def required(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, autoincrement=name == "id")


def optional(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=True)


def group_key(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["group_id"], ["deployment_group.id"], name=f"fk_{table}_group_id"
    )


def version_key(table: str, column: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], ["drafter_version.id"], name=f"fk_{table}_{column}")


def upgrade() -> None:
    for table, columns in NEW_COLUMNS.items():
        for name, kind in columns:
            op.add_column(table, optional(name, kind))
    op.create_table(
        "watch",
        required("id", Int),
        required("group_id", Int),
        required("generation", Int),
        required("version_id", Int),
        optional("baseline_id", Int),
        required("status", sa.String),
        required("reason", sa.String),
        required("started_at", Time),
        optional("finished_at", Time),
        required("baseline", Json),
        required("settings", Json),
        sa.CheckConstraint(
            "status IN ('running', 'passed', 'failed', 'ended')", name="ck_watch_status"
        ),
        group_key("watch"),
        version_key("watch", "version_id"),
        version_key("watch", "baseline_id"),
        sa.PrimaryKeyConstraint("id", name="pk_watch"),
        sa.UniqueConstraint("group_id", "generation", name="uq_watch_group_id_generation"),
    )
    op.create_table(
        "watch_window",
        required("watch_id", Int),
        required("number", Int),
        required("started_at", Time),
        required("finished_at", Time),
        required("requests", Int),
        required("verify_steps", Int),
        required("accepted", Int),
        optional("accept_length", sa.Double),
        optional("expected_accept_length", sa.Double),
        optional("tokens_per_second", sa.Double),
        optional("expected_tokens_per_second", sa.Double),
        required("verdict", sa.String),
        required("reason", sa.String),
        required("metrics", Json),
        sa.CheckConstraint(
            "verdict IN ('pass', 'bad', 'fail', 'empty')", name="ck_watch_window_verdict"
        ),
        sa.ForeignKeyConstraint(["watch_id"], ["watch.id"], name="fk_watch_window_watch_id"),
        sa.PrimaryKeyConstraint("watch_id", "number", name="pk_watch_window"),
    )
    op.create_table(
        "scheduler_state",
        required("group_id", Int),
        required("holder", sa.String),
        required("state", sa.String),
        required("reason", sa.String),
        required("next_action", sa.String),
        optional("next_at", Time),
        required("details", Json),
        required("updated_at", Time),
        group_key("scheduler_state"),
        sa.PrimaryKeyConstraint("group_id", name="pk_scheduler_state"),
    )
    op.create_table(
        "drift",
        required("id", Int),
        required("group_id", Int),
        required("version_id", Int),
        required("domain", sa.String),
        required("detected_at", Time),
        required("last_request_id", Int),
        required("accept_length_before", sa.Double),
        required("accept_length_after", sa.Double),
        required("requests_before", Int),
        required("requests_after", Int),
        required("details", Json),
        group_key("drift"),
        version_key("drift", "version_id"),
        sa.PrimaryKeyConstraint("id", name="pk_drift"),
    )
    op.create_index("ix_drift_group_id_detected_at", "drift", ["group_id", "detected_at"])
    op.create_table(
        "audit",
        required("id", Int),
        required("group_id", Int),
        required("created_at", Time),
        required("actor", sa.String),
        required("action", sa.String),
        required("subject", sa.String),
        required("reason", sa.String),
        required("before", Json),
        required("after", Json),
        sa.CheckConstraint("reason <> ''", name="ck_audit_reason"),
        sa.CheckConstraint("actor <> ''", name="ck_audit_actor"),
        group_key("audit"),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_group_id_created_at", "audit", ["group_id", "created_at"])
    if op.get_bind().dialect.name == "sqlite":
        for action in ("UPDATE", "DELETE"):
            op.execute(f"""
                CREATE TRIGGER audit_no_{action.lower()} BEFORE {action} ON audit
                BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END""")
    else:
        op.execute("""
            CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
            FOR EACH STATEMENT EXECUTE FUNCTION aurora_refuse('audit is append-only')""")


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)
    for table, columns in NEW_COLUMNS.items():
        for name, _ in reversed(columns):
            op.drop_column(table, name)
