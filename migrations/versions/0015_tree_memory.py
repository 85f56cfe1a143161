"""What servers learnt of their trees, by name, so that a restart goes on from it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)
Json = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "tree_memory",
        sa.Column("group_id", Int, nullable=False, autoincrement=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("version_id", Int, nullable=True),
        sa.Column("state", Json, nullable=False),
        sa.Column("updated_at", Time, nullable=False),
        sa.PrimaryKeyConstraint("group_id", "name", name="pk_tree_memory"),
        sa.ForeignKeyConstraint(
            ["group_id"], ["deployment_group.id"], name="fk_tree_memory_group_id"
        ),
    )


def downgrade() -> None:
    op.drop_table("tree_memory")
