"""What operators see and do: progress of a run, notes and tags, stages, freezes, saved views."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)
Json = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column(
        "training_run", sa.Column("progress", Json, nullable=False, server_default=sa.text("'{}'"))
    )
    op.create_table(
        "version_note",
        sa.Column("id", Int, nullable=False),
        sa.Column("version_id", Int, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("text", sa.String, nullable=False),
        sa.CheckConstraint("kind IN ('note', 'tag', 'untag')", name="ck_version_note_kind"),
        sa.CheckConstraint("text <> ''", name="ck_version_note_text"),
        sa.CheckConstraint("actor <> ''", name="ck_version_note_actor"),
        sa.ForeignKeyConstraint(
            ["version_id"], ["drafter_version.id"], name="fk_version_note_version_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_version_note"),
    )
    op.create_index("ix_version_note_version_id", "version_note", ["version_id"])
    op.create_table(
        "rollout_stage",
        sa.Column("id", Int, nullable=False),
        sa.Column("group_id", Int, nullable=False),
        sa.Column("version_id", Int, nullable=False),
        sa.Column("baseline_id", Int, nullable=False),
        sa.Column("generation", Int, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("servers", Json, nullable=False),
        sa.Column("goes_on", sa.Boolean, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("started_at", Time, nullable=False),
        sa.Column("finished_at", Time, nullable=True),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("settings", Json, nullable=False),
        sa.Column("windows", Json, nullable=False),
        sa.CheckConstraint(
            "status IN ('running', 'passed', 'continued', 'aborted', 'failed')",
            name="ck_rollout_stage_status",
        ),
        sa.CheckConstraint("reason <> ''", name="ck_rollout_stage_reason"),
        sa.CheckConstraint("actor <> ''", name="ck_rollout_stage_actor"),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_rollout_stage_group_id"
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["drafter_version.id"], name="fk_rollout_stage_version_id"
        ),
        sa.ForeignKeyConstraint(
            ["baseline_id"], ["drafter_version.id"], name="fk_rollout_stage_baseline_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_rollout_stage"),
    )
    op.create_index("ix_rollout_stage_group_id", "rollout_stage", ["group_id"])
    op.create_table(
        "freeze_window",
        sa.Column("id", Int, nullable=False),
        sa.Column("group_id", Int, nullable=False),
        sa.Column("starts_at", Time, nullable=False),
        sa.Column("ends_at", Time, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("lifted_at", Time, nullable=True),
        sa.Column("lifted_by", sa.String, nullable=False),
        sa.CheckConstraint("reason <> ''", name="ck_freeze_window_reason"),
        sa.CheckConstraint("actor <> ''", name="ck_freeze_window_actor"),
        sa.CheckConstraint("ends_at > starts_at", name="ck_freeze_window_ends_at"),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_freeze_window_group_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_freeze_window"),
    )
    op.create_index("ix_freeze_window_group_id_ends_at", "freeze_window", ["group_id", "ends_at"])
    op.create_table(
        "saved_view",
        sa.Column("id", Int, nullable=False),
        sa.Column("group_id", Int, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("page", sa.String, nullable=False),
        sa.Column("query", sa.String, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_saved_view_group_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_saved_view"),
    )
    op.create_index("ix_saved_view_group_id", "saved_view", ["group_id"])
    if op.get_bind().dialect.name == "sqlite":
        for action in ("UPDATE", "DELETE"):
            op.execute(f"""
                CREATE TRIGGER version_note_no_{action.lower()} BEFORE {action} ON version_note
                BEGIN SELECT RAISE(ABORT, 'version_note is append-only'); END""")
    else:
        op.execute("""
            CREATE TRIGGER version_note_append_only
            BEFORE UPDATE OR DELETE OR TRUNCATE ON version_note
            FOR EACH STATEMENT EXECUTE FUNCTION aurora_refuse('version_note is append-only')""")


def downgrade() -> None:
    for table in ("saved_view", "freeze_window", "rollout_stage", "version_note"):
        op.drop_table(table)
    op.drop_column("training_run", "progress")
