"""How much each group keeps, and what was done about it. A group that is there already gets its
limits from the settings of the next server that joins."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)
Json = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "retention_limit",
        sa.Column("group_id", Int, nullable=False, autoincrement=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("value", Int, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("updated_at", Time, nullable=False),
        sa.PrimaryKeyConstraint("group_id", "name", name="pk_retention_limit"),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_retention_limit_group_id"
        ),
    )
    op.create_table(
        "prune_run",
        sa.Column("id", Int, nullable=False, autoincrement=True),
        sa.Column("group_id", Int, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("started_at", Time, nullable=False),
        sa.Column("finished_at", Time, nullable=True),
        sa.Column("report", Json, nullable=False),
        sa.Column("error", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_prune_run"),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_prune_run_group_id"
        ),
    )
    op.create_index("ix_prune_run_group_id_started_at", "prune_run", ["group_id", "started_at"])


def downgrade() -> None:
    op.drop_table("prune_run")
    op.drop_table("retention_limit")
