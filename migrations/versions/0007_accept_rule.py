"""The accept rule of a request beside it, so that whether it can be judged is known without its
verify steps. Requests whose trace is still there get it from the first of theirs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("request", sa.Column("accept_rule", sa.String, nullable=False, server_default=""))
    op.execute(
        """
        UPDATE request SET accept_rule = coalesce(
            (SELECT e.accept_rule FROM acceptance_event e
             WHERE e.request_id = request.id AND e.step = 0), '')
        WHERE traced
        """
    )


def downgrade() -> None:
    op.drop_column("request", "accept_rule")
