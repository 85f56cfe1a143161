"""Servers, requests, verify steps, roll-ups, traces, and what runs them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)
Json = sa.JSON().with_variant(JSONB(), "postgresql")

TABLES = [
    "server",
    "request",
    "acceptance_event",
    "acceptance_minute",
    "request_tally",
    "trace",
    "switch",
    "lease",
    "spool_watermark",
    "drop_count",
]


def required(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, autoincrement=name == "id")


def optional(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=True)


def on_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def upgrade() -> None:
    op.create_table(
        "server",
        required("id", Int),
        required("group_id", Int),
        required("name", sa.String),
        required("boot_id", Int),
        required("sglang_version", sa.String),
        optional("boot_version_id", Int),
        optional("live_version_id", Int),
        required("live_sha256", sa.String),
        required("state", sa.String),
        required("dtype", sa.String),
        required("phase", sa.String),
        required("phase_reason", sa.String),
        optional("speculation_share", sa.Double),
        required("counters", Json),
        required("last_error", sa.String),
        required("started_at", Time),
        required("last_seen_at", Time),
        sa.CheckConstraint("state IN ('running', 'stopped', 'gone')", name="ck_server_state"),
        sa.ForeignKeyConstraint(
            ["boot_version_id"], ["drafter_version.id"], name="fk_server_boot_version_id"
        ),
        sa.ForeignKeyConstraint(["group_id"], ["deployment_group.id"], name="fk_server_group_id"),
        sa.ForeignKeyConstraint(
            ["live_version_id"], ["drafter_version.id"], name="fk_server_live_version_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_server"),
        sa.UniqueConstraint("boot_id", name="uq_server_boot_id"),
    )
    op.create_index("ix_server_group_id_state", "server", ["group_id", "state"])
    op.create_table(
        "request",
        sa.Column("id", Int, nullable=False, autoincrement=False),  # the engine numbers it
        required("rid", sa.String),
        required("server_id", Int),
        required("dp_rank", Int),
        required("admitted_at", Time),
        optional("finished_at", Time),
        required("status", sa.String),
        required("domain", sa.String),
        required("conversation_hash", sa.String),
        required("prompt_tokens", Int),
        required("cached_tokens", Int),
        required("completion_tokens", Int),
        required("verify_steps", Int),
        required("proposed", Int),
        required("accepted", Int),
        optional("reported_verify_steps", Int),
        optional("reported_proposed", Int),
        optional("reported_accepted", Int),
        required("retractions", Int),
        required("sampling", Json),
        required("finish_reason", sa.String),
        required("may_train", sa.Boolean),
        required("traced", sa.Boolean),
        required("speculates", sa.Boolean),
        sa.CheckConstraint(
            "status IN ('running', 'finished', 'aborted', 'lost')", name="ck_request_status"
        ),
        sa.ForeignKeyConstraint(["server_id"], ["server.id"], name="fk_request_server_id"),
        sa.PrimaryKeyConstraint("id", name="pk_request"),
    )
    op.create_index("ix_request_finished_at", "request", ["finished_at"])
    op.create_index("ix_request_server_id_status", "request", ["server_id", "status"])
    # PostgreSQL wants the column that partitions in the key.
    key = ("request_id", "step") if on_sqlite() else ("request_id", "step", "at")
    op.create_table(
        "acceptance_event",
        required("request_id", Int),
        required("step", sa.Integer),
        required("at", Time),
        required("drafter_version_id", Int),
        required("swap_age", sa.Integer),
        required("mixed", sa.Boolean),
        required("position", sa.Integer),
        required("depth", sa.Integer),
        required("topk", sa.Integer),
        required("nodes", sa.Integer),
        required("accept_rule", sa.String),
        required("batch_size", sa.Integer),
        required("proposed", sa.Integer),
        required("accepted", sa.Integer),
        required("kept", sa.Integer),
        required("first_rejected_at", sa.Integer),
        required("draft_tokens", sa.LargeBinary),
        required("draft_parents", sa.LargeBinary),
        required("accepted_nodes", sa.LargeBinary),
        required("target_tokens", sa.LargeBinary),
        optional("draft_logprobs", sa.LargeBinary),
        sa.PrimaryKeyConstraint(*key, name="pk_acceptance_event"),
        postgresql_partition_by="RANGE (at)",
        sqlite_with_rowid=False,
    )
    if on_sqlite():
        op.create_index("ix_acceptance_event_at", "acceptance_event", ["at"])
    else:
        op.create_index(
            "ix_acceptance_event_at_brin", "acceptance_event", ["at"], postgresql_using="brin"
        )
        op.execute("CREATE TABLE acceptance_event_default PARTITION OF acceptance_event DEFAULT")
    op.create_table(
        "acceptance_minute",
        required("bucket_start", Time),
        required("server_id", Int),
        required("drafter_version_id", Int),
        required("domain", sa.String),
        required("depth", Int),
        required("topk", Int),
        required("accept_rule", sa.String),
        required("batch_bucket", Int),
        required("mixed", sa.Boolean),
        required("verify_steps", Int),
        required("proposed", Int),
        required("accepted", Int),
        required("requests", Int),
        required("completion_tokens", Int),
        required("sum_steps_squared", Int),
        required("sum_accepted_squared", Int),
        required("sum_steps_accepted", Int),
        required("histogram", Json),
        required("per_position", Json),
        sa.PrimaryKeyConstraint(
            "bucket_start",
            "server_id",
            "drafter_version_id",
            "domain",
            "depth",
            "topk",
            "accept_rule",
            "batch_bucket",
            "mixed",
            name="pk_acceptance_minute",
        ),
    )
    op.create_index(
        "ix_acceptance_minute_drafter_version_id_bucket_start",
        "acceptance_minute",
        ["drafter_version_id", "bucket_start"],
    )
    op.create_table(
        "request_tally",
        required("request_id", Int),
        required("drafter_version_id", Int),
        required("depth", Int),
        required("topk", Int),
        required("mixed", sa.Boolean),
        required("verify_steps", Int),
        required("accepted", Int),
        sa.PrimaryKeyConstraint(
            "request_id", "drafter_version_id", "depth", "topk", "mixed", name="pk_request_tally"
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "trace",
        required("request_id", Int),
        required("uri", sa.String),
        required("bytes", Int),
        required("sha256", sa.String),
        required("created_at", Time),
        required("start", Int),
        required("end", Int),
        required("output_start", Int),
        required("prompt_sha256", sa.String),
        required("head_sha256", sa.String),
        required("greedy", sa.Boolean),
        required("aux_width", Int),
        required("last_width", Int),
        required("dtype", sa.String),
        required("pinned", sa.Boolean),
        sa.ForeignKeyConstraint(["request_id"], ["request.id"], name="fk_trace_request_id"),
        sa.PrimaryKeyConstraint("request_id", name="pk_trace"),
        sa.UniqueConstraint("uri", name="uq_trace_uri"),
    )
    op.create_index("ix_trace_created_at", "trace", ["created_at"])
    op.create_table(
        "switch",
        required("group_id", Int),
        required("name", sa.String),
        required("enabled", sa.Boolean),
        required("actor", sa.String),
        required("reason", sa.String),
        required("updated_at", Time),
        sa.ForeignKeyConstraint(["group_id"], ["deployment_group.id"], name="fk_switch_group_id"),
        sa.PrimaryKeyConstraint("group_id", "name", name="pk_switch"),
    )
    op.create_table(
        "lease",
        required("name", sa.String),
        required("holder", sa.String),
        required("token", Int),
        required("acquired_at", Time),
        required("expires_at", Time),
        sa.PrimaryKeyConstraint("name", name="pk_lease"),
    )
    op.create_table(
        "spool_watermark",
        required("server_id", Int),
        required("boot_id", Int),
        required("last_seq", Int),
        required("updated_at", Time),
        sa.ForeignKeyConstraint(["server_id"], ["server.id"], name="fk_spool_watermark_server_id"),
        sa.PrimaryKeyConstraint("server_id", "boot_id", name="pk_spool_watermark"),
    )
    op.create_table(
        "drop_count",
        required("server_id", Int),
        required("place", sa.String),
        required("count", Int),
        required("updated_at", Time),
        sa.ForeignKeyConstraint(["server_id"], ["server.id"], name="fk_drop_count_server_id"),
        sa.PrimaryKeyConstraint("server_id", "place", name="pk_drop_count"),
    )


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)
