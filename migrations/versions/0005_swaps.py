"""One row for every swap that a server made or refused."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "swap",
        sa.Column("server_id", Int, nullable=False, autoincrement=False),
        sa.Column("at", Time, nullable=False),
        sa.Column("version_id", Int, nullable=False),
        sa.Column("ok", sa.Boolean, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("live_sha256", sa.String, nullable=False),
        sa.Column("staged_ms", sa.Double, nullable=False),
        sa.Column("apply_ms", sa.Double, nullable=False),
        sa.Column("longest_stall_ms", sa.Double, nullable=True),
        sa.ForeignKeyConstraint(["server_id"], ["server.id"], name="fk_swap_server_id"),
        sa.PrimaryKeyConstraint("server_id", "at", name="pk_swap"),
    )


def downgrade() -> None:
    op.drop_table("swap")
