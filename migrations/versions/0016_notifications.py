"""What people must know: alerts with their history, and what was sent of them and to whom."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)
Json = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "alert",
        sa.Column("id", Int, nullable=False),
        sa.Column("group_id", Int, nullable=False),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("severity", sa.String, nullable=False),
        sa.Column("text", sa.String, nullable=False),
        sa.Column("began_at", Time, nullable=False),
        sa.Column("seen_at", Time, nullable=False),
        sa.Column("ended_at", Time, nullable=True),
        sa.Column("acknowledged_at", Time, nullable=True),
        sa.Column("acknowledged_by", sa.String, nullable=False),
        sa.Column("acknowledgement", sa.String, nullable=False),
        sa.CheckConstraint("severity IN ('critical', 'warning')", name="ck_alert_severity"),
        sa.ForeignKeyConstraint(["group_id"], ["deployment_group.id"], name="fk_alert_group_id"),
        sa.PrimaryKeyConstraint("id", name="pk_alert"),
    )
    op.create_index("ix_alert_group_id_began_at", "alert", ["group_id", "began_at"])
    op.create_index(
        "ux_alert_open",
        "alert",
        ["group_id", "key"],
        unique=True,
        sqlite_where=sa.text("ended_at IS NULL"),
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.create_table(
        "notification",
        sa.Column("id", Int, nullable=False),
        sa.Column("group_id", Int, nullable=False),
        sa.Column("event_key", sa.String, nullable=False),
        sa.Column("uid", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("severity", sa.String, nullable=False),
        sa.Column("title", sa.String, nullable=False),
        sa.Column("text", sa.String, nullable=False),
        sa.Column("happened_at", Time, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("details", Json, nullable=False),
        sa.CheckConstraint(
            "severity IN ('critical', 'warning', 'info')", name="ck_notification_severity"
        ),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_notification_group_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_notification"),
        sa.UniqueConstraint("group_id", "event_key", name="uq_notification_group_id_event_key"),
    )
    op.create_index(
        "ix_notification_group_id_created_at", "notification", ["group_id", "created_at"]
    )
    op.create_table(
        "delivery",
        sa.Column("notification_id", Int, nullable=False, autoincrement=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("attempts", Int, nullable=False),
        sa.Column("next_try_at", Time, nullable=False),
        sa.Column("delivered_at", Time, nullable=True),
        sa.Column("error", sa.String, nullable=False),
        sa.CheckConstraint(
            "state IN ('waiting', 'delivered', 'given_up')", name="ck_delivery_state"
        ),
        sa.ForeignKeyConstraint(
            ["notification_id"],
            ["notification.id"],
            name="fk_delivery_notification_id",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("notification_id", "target", name="pk_delivery"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_delivery_state_next_try_at", "delivery", ["state", "next_try_at"])
    op.create_table(
        "notification_start",
        sa.Column("group_id", Int, nullable=False, autoincrement=False),
        sa.Column("since", Time, nullable=False),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_notification_start_group_id"
        ),
        sa.PrimaryKeyConstraint("group_id", name="pk_notification_start"),
    )


def downgrade() -> None:
    for table in ("notification_start", "delivery", "notification", "alert"):
        op.drop_table(table)
