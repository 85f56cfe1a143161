"""Nodes in the keys of the roll-ups, so that depth, top-k and nodes name a draft shape.

Until now a server had one number of nodes for each depth and top-k, so old rows can be told:

- ``acceptance_minute``: every step proposes its nodes but the root, so nodes are
  1 + proposed / verify_steps;
- ``request_tally``: depth + 1 for chains and for steps without drafts; for trees what the minutes
  of the request's server say of that version, depth and top-k.

0 where that gives no whole number, or more than one: not known.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)
Json = sa.JSON()  # SQLite only, as all tables that are made here

MINUTE_KEY = (
    "bucket_start", "server_id", "drafter_version_id", "domain", "depth", "topk", "nodes",
    "accept_rule", "batch_bucket", "mixed",
)  # fmt: skip
SUMS = (
    "verify_steps", "proposed", "accepted", "requests", "completion_tokens", "sum_steps_squared",
    "sum_accepted_squared", "sum_steps_accepted",
)  # fmt: skip
TALLY_KEY = ("request_id", "drafter_version_id", "depth", "topk", "nodes", "mixed")
KINDS: dict[str, Any] = {
    "bucket_start": Time, "domain": sa.String, "accept_rule": sa.String, "mixed": sa.Boolean,
    "histogram": Json, "per_position": Json,
}  # fmt: skip

NODES_OF_MINUTE = """
    CASE WHEN verify_steps = 0 THEN 0
        WHEN proposed % verify_steps = 0 THEN 1 + proposed / verify_steps ELSE 0 END
"""
#: Trees of each server as its minutes have them, ``m`` being ``acceptance_minute`` with nodes.
TREES = """
    SELECT server_id, drafter_version_id, depth, topk,
        CASE WHEN min(nodes) = max(nodes) THEN min(nodes) ELSE 0 END AS nodes
    FROM acceptance_minute WHERE depth > 0 AND topk > 1
    GROUP BY server_id, drafter_version_id, depth, topk
"""
IS_TREE = "t.depth > 0 AND t.topk > 1"

#: As in 0003, with nodes in the key. They are the last column: PostgreSQL replaces a view, with the
#: rights that were granted on it, only if the columns that it had stay where they were.
BY_VERSION = """
SELECT s.group_id, m.drafter_version_id, m.mixed, m.depth, m.topk, m.accept_rule,
    CAST(sum(m.verify_steps) AS bigint) AS verify_steps,
    CAST(sum(m.requests) AS bigint) AS requests,
    CAST(sum(m.proposed) AS bigint) AS proposed,
    CAST(sum(m.accepted) AS bigint) AS accepted,
    1 + CAST(sum(m.accepted) AS double precision) / sum(m.verify_steps) AS accept_length,
    CAST(sum(m.accepted) AS double precision) / nullif(sum(m.proposed), 0) AS acceptance_rate,
    CASE WHEN sum(m.requests) > 1 THEN
        (CAST(sum(m.sum_accepted_squared) AS double precision)
         - 2.0 * sum(m.accepted) / sum(m.verify_steps) * sum(m.sum_steps_accepted)
         + 1.0 * sum(m.accepted) / sum(m.verify_steps) * sum(m.accepted) / sum(m.verify_steps)
           * sum(m.sum_steps_squared))
        / sum(m.verify_steps) / sum(m.verify_steps)
        * sum(m.requests) / (sum(m.requests) - 1)
    END AS accept_length_variance,
    min(m.bucket_start) AS first_minute,
    max(m.bucket_start) AS last_minute{nodes}
FROM acceptance_minute m JOIN server s ON s.id = m.server_id
WHERE m.depth > 0
GROUP BY s.group_id, m.drafter_version_id, m.mixed, m.depth, m.topk, m.accept_rule{nodes}
"""
WITH_NODES, WITHOUT = (BY_VERSION.format(nodes=nodes) for nodes in (", m.nodes", ""))


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _rebuild(
            minute_columns=(*MINUTE_KEY, *SUMS, "histogram", "per_position"),
            minute_key=MINUTE_KEY,
            minutes=f"SELECT *, {NODES_OF_MINUTE} AS nodes FROM acceptance_minute_old",
            tally_key=TALLY_KEY,
            tallies=f"""
                SELECT t.*, CASE WHEN {IS_TREE} THEN coalesce(tree.nodes, 0) ELSE t.depth + 1 END
                    AS nodes
                FROM request_tally_old t LEFT JOIN request r ON r.id = t.request_id
                LEFT JOIN ({TREES}) tree ON tree.server_id = r.server_id
                    AND tree.drafter_version_id = t.drafter_version_id
                    AND tree.depth = t.depth AND tree.topk = t.topk""",
            view=WITH_NODES,
        )
        return
    for table in ("acceptance_minute", "request_tally"):
        op.add_column(table, sa.Column("nodes", sa.BigInteger, nullable=True))
    op.execute(f"UPDATE acceptance_minute SET nodes = {NODES_OF_MINUTE}")
    op.execute(
        f"UPDATE request_tally t SET nodes = CASE WHEN {IS_TREE} THEN 0 ELSE t.depth + 1 END"
    )
    op.execute(f"""
        UPDATE request_tally t SET nodes = tree.nodes FROM request r, ({TREES}) tree
        WHERE {IS_TREE} AND r.id = t.request_id AND tree.server_id = r.server_id
            AND tree.drafter_version_id = t.drafter_version_id
            AND tree.depth = t.depth AND tree.topk = t.topk""")
    for table, key in (("acceptance_minute", MINUTE_KEY), ("request_tally", TALLY_KEY)):
        op.alter_column(table, "nodes", nullable=False)
        op.drop_constraint(f"pk_{table}", table)
        op.create_primary_key(f"pk_{table}", table, list(key))
    op.execute(f"CREATE OR REPLACE VIEW v_accept_length_by_version AS {WITH_NODES}")


def _rebuild(
    *,
    minute_columns: tuple[str, ...],
    minute_key: tuple[str, ...],
    minutes: str,
    tally_key: tuple[str, ...],
    tallies: str,
    view: str,
) -> None:
    """SQLite changes no key: new tables are made and filled from the old ones. It renames none that
    a view reads, so the views go first."""
    run = op.get_bind().exec_driver_sql
    (by_hour,) = run(
        "SELECT sql FROM sqlite_master WHERE name = 'v_accept_length_by_domain_hour'"
    ).one()
    run("DROP VIEW v_accept_length_by_version")
    run("DROP VIEW v_accept_length_by_domain_hour")
    run("DROP INDEX ix_acceptance_minute_drafter_version_id_bucket_start")
    for table, columns, key, rows, has_rowid in (
        ("acceptance_minute", minute_columns, minute_key, minutes, True),
        ("request_tally", (*tally_key, "verify_steps", "accepted"), tally_key, tallies, False),
    ):
        run(f"ALTER TABLE {table} RENAME TO {table}_old")
        op.create_table(
            table,
            *(sa.Column(name, KINDS.get(name, Int), nullable=False) for name in columns),
            sa.PrimaryKeyConstraint(*key, name=f"pk_{table}"),
            sqlite_with_rowid=has_rowid,
        )
        names = ", ".join(columns)
        run(f"INSERT INTO {table} ({names}) SELECT {names} FROM ({rows})")
        run(f"DROP TABLE {table}_old")
    op.create_index(
        "ix_acceptance_minute_drafter_version_id_bucket_start",
        "acceptance_minute",
        ["drafter_version_id", "bucket_start"],
    )
    run(f"CREATE VIEW v_accept_length_by_version AS {view}")
    run(by_hour)


def downgrade() -> None:
    """Refused by the old key where two shapes of one depth and top-k were served."""
    minute_key = tuple(name for name in MINUTE_KEY if name != "nodes")
    tally_key = tuple(name for name in TALLY_KEY if name != "nodes")
    if op.get_bind().dialect.name == "sqlite":
        _rebuild(
            minute_columns=(*minute_key, *SUMS, "histogram", "per_position"),
            minute_key=minute_key,
            minutes="SELECT * FROM acceptance_minute_old",
            tally_key=tally_key,
            tallies="SELECT * FROM request_tally_old",
            view=WITHOUT,
        )
        return
    op.execute("DROP VIEW v_accept_length_by_version")  # a replaced view can't lose a column
    for table, key in (("acceptance_minute", minute_key), ("request_tally", tally_key)):
        op.drop_constraint(f"pk_{table}", table)
        op.drop_column(table, "nodes")
        op.create_primary_key(f"pk_{table}", table, list(key))
    op.execute(f"CREATE VIEW v_accept_length_by_version AS {WITHOUT}")
