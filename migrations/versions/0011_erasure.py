"""What was purged, as numbers and hashes, so that it does not come back; and which requests a
training run learnt from, so that a purge can name the versions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)
Json = sa.JSON().with_variant(sa.dialects.postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "erasure",
        sa.Column("id", Int, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("salt", sa.String, nullable=False),
        sa.Column("key_hash", sa.String, nullable=False),
        sa.Column("until", Time, nullable=False),
        sa.Column("started_at", Time, nullable=False),
        sa.Column("rows_at", Time, nullable=True),
        sa.Column("finished_at", Time, nullable=True),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("details", Json, nullable=False),
        sa.CheckConstraint(
            "kind IN ('request', 'rid', 'conversation', 'domain', 'before')",
            name="ck_erasure_kind",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_erasure"),
    )
    op.create_table(
        "erased_request",
        sa.Column("request_id", Int, nullable=False, autoincrement=False),
        sa.Column("erasure_id", Int, nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_erased_request"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "training_request",
        sa.Column("run_id", Int, nullable=False, autoincrement=False),
        sa.Column("request_id", Int, nullable=False, autoincrement=False),
        sa.PrimaryKeyConstraint("run_id", "request_id", name="pk_training_request"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_training_request_request_id", "training_request", ["request_id"])


def downgrade() -> None:
    for table in ("training_request", "erased_request", "erasure"):
        op.drop_table(table)
