"""By what a later turn of a conversation is known, beside the trace of the one before it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    for name in ("prompt_key", "answer_key"):
        op.add_column("trace", sa.Column(name, sa.String, nullable=False, server_default=""))
    op.add_column("trace", sa.Column("answer_tokens", Int, nullable=False, server_default="0"))


def downgrade() -> None:
    for name in ("prompt_key", "answer_key", "answer_tokens"):
        op.drop_column("trace", name)
