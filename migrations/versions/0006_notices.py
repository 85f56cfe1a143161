"""What a server says is wrong or switched off in it: a sentence by code."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

Json = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("server", sa.Column("notices", Json, nullable=False, server_default="{}"))


def downgrade() -> None:
    op.drop_column("server", "notices")
