"""What a trace needs of others: the hash of a prefix that came from the cache, and the request
whose trace holds it. And why a trace is pinned.

Old rows with such a prefix keep an empty hash: their donors are looked for when they are read.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TEXTS = ("prefix_sha256", "pin_reason")


def upgrade() -> None:
    for name in TEXTS:
        op.add_column("trace", sa.Column(name, sa.String, nullable=False, server_default=""))
    op.add_column("trace", sa.Column("donor_id", Int, nullable=True))
    op.create_index("ix_trace_donor_id", "trace", ["donor_id"])
    op.create_index("ix_trace_prefix_sha256", "trace", ["prefix_sha256"])


def downgrade() -> None:
    op.drop_index("ix_trace_prefix_sha256", "trace")
    op.drop_index("ix_trace_donor_id", "trace")
    for name in ("donor_id", *TEXTS):
        op.drop_column("trace", name)
