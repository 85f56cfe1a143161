"""A request counts once, whatever draft shapes its steps had; a key for hashes.

``acceptance_minute`` has its number of requests and its sums over requests three times now: by
draft shape as before, and over all draft shapes, once for steps that agree in ``mixed``
(``version_...``) and once for all (``any_...``). Old rows take the sums by shape. Where a request
had several shapes these are too many requests with too small squares: what they lack is read from
its events, and stays as it was where those are pruned.

``v_accept_length_by_domain_hour`` reads the new sums. ``v_rejected_tokens`` counts a token's rank
among its earlier siblings, instead of numbering the rows of all events first: the same rows, and a
condition on time or requests reads only those.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

TABLE = "acceptance_minute"
SUMS = ("requests", "sum_steps_squared", "sum_accepted_squared", "sum_steps_accepted")
WIDER = ("version_", "any_")
KEY = (
    "bucket_start", "server_id", "drafter_version_id", "domain", "depth", "topk", "nodes",
    "accept_rule", "batch_bucket", "mixed",
)  # fmt: skip
LARGEST_BATCH = 1 << 24

#: As in 0003, which has them without a prefix; rounding may not make a variance negative.
BY_DOMAIN_HOUR = """
SELECT s.group_id, m.domain, {hour} AS hour, m.drafter_version_id,
    CAST(sum(m.verify_steps) AS bigint) AS verify_steps,
    CAST(sum(m.{p}requests) AS bigint) AS requests,
    CAST(sum(m.proposed) AS bigint) AS proposed,
    CAST(sum(m.accepted) AS bigint) AS accepted,
    1 + CAST(sum(m.accepted) AS double precision) / sum(m.verify_steps) AS accept_length,
    CAST(sum(m.accepted) AS double precision) / nullif(sum(m.proposed), 0) AS acceptance_rate,
    CASE WHEN sum(m.{p}requests) > 1 THEN {larger}(CAST(0 AS double precision),
        (CAST(sum(m.{p}sum_accepted_squared) AS double precision)
         - 2.0 * sum(m.accepted) / sum(m.verify_steps) * sum(m.{p}sum_steps_accepted)
         + 1.0 * sum(m.accepted) / sum(m.verify_steps) * sum(m.accepted) / sum(m.verify_steps)
           * sum(m.{p}sum_steps_squared))
        / sum(m.verify_steps) / sum(m.verify_steps)
        * sum(m.{p}requests) / (sum(m.{p}requests) - 1))
    END AS accept_length_variance,
    CAST(sum(m.completion_tokens) AS bigint) AS completion_tokens
FROM acceptance_minute m JOIN server s ON s.id = m.server_id
WHERE m.depth > 0
GROUP BY s.group_id, m.domain, {hour}, m.drafter_version_id
"""
HOUR = {
    "sqlite": "strftime('%Y-%m-%d %H:00:00.000000', m.bucket_start)",
    "postgresql": "date_trunc('hour', m.bucket_start, 'UTC')",
}
MINUTE = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:00.000000', e.at)",
    "postgresql": "date_trunc('minute', e.at, 'UTC')",
}


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    op.create_table(
        "store_key",
        sa.Column("name", sa.String, nullable=False),
        sa.Column("value", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_store_key"),
    )
    for wide in WIDER:
        for name in SUMS:
            op.add_column(TABLE, sa.Column(wide + name, Int, nullable=False, server_default="0"))
    equal = ", ".join(f"{wide}{name} = {name}" for wide in WIDER for name in SUMS)
    op.execute(f"UPDATE {TABLE} SET {equal} WHERE depth > 0")
    op.get_bind().exec_driver_sql(several_shapes(dialect))
    replace_view("v_accept_length_by_domain_hour", by_domain_hour(dialect, "any_"))
    replace_view("v_rejected_tokens", rejected_tokens(dialect))
    if dialect == "postgresql":
        hide_hashes()


def hide_hashes() -> None:
    """From the SQL page's roles for viewers, as ``dashboard sql-role`` makes them now."""
    run = op.get_bind().exec_driver_sql
    roles = run(
        "SELECT rolname FROM pg_roles WHERE starts_with(rolname, 'aurora_sql_viewer_') "
        "AND has_table_privilege(rolname, 'request', 'SELECT')"
    ).scalars()
    columns = [column["name"] for column in sa.inspect(op.get_bind()).get_columns("request")]
    shown = ", ".join(f'"{name}"' for name in columns if name != "conversation_hash")
    for role in roles.all():
        run(f'REVOKE SELECT ON request FROM "{role}"')
        run(f'GRANT SELECT ({shown}) ON request TO "{role}"')


def several_shapes(dialect: str) -> str:
    """Adds what the sums by shape lack, for requests with more than one of them.

    Steps of a request that fall into one row go together, in the order of their first one: n steps
    after N others let the sum of squares grow by (N + n)^2 - N^2 = n (2 N + n)."""
    sizes = [1 << power for power in range(LARGEST_BATCH.bit_length())]
    batch_bucket = " ".join(f"WHEN e.batch_size <= {size} THEN {size}" for size in sizes)
    windows = {
        "shape_": "request_id, drafter_version_id, mixed, depth, topk, nodes",
        "version_": "request_id, drafter_version_id, mixed",
        "any_": "request_id, drafter_version_id",
    }
    before = ", ".join(
        f"sum(n) OVER {w}w - n AS {w}n, sum(y) OVER {w}w - y AS {w}y" for w in windows
    )
    named = ", ".join(
        f"{w}w AS (PARTITION BY {keys} ORDER BY first ROWS UNBOUNDED PRECEDING)"
        for w, keys in windows.items()
    )
    growth = {
        "requests": "CASE WHEN {w}n = 0 THEN 1 ELSE 0 END",
        "sum_steps_squared": "n * (2 * {w}n + n)",
        "sum_accepted_squared": "y * (2 * {w}y + y)",
        "sum_steps_accepted": "{w}n * y + n * {w}y + n * y",
    }
    lacks = ", ".join(
        f"CAST(sum({rule.format(w=w)} - ({rule.format(w='shape_')})) AS bigint) AS {w}{name}"
        for w in WIDER
        for name, rule in growth.items()
    )
    keys = ", ".join(KEY)
    adds = ", ".join(f"{w}{name} = {TABLE}.{w}{name} + d.{w}{name}" for w in WIDER for name in SUMS)
    same = " AND ".join(f"{TABLE}.{name} = d.{name}" for name in KEY)
    return f"""
WITH several AS (
    SELECT request_id, drafter_version_id FROM request_tally WHERE depth > 0
    GROUP BY request_id, drafter_version_id HAVING count(*) > 1
), part AS (
    SELECT e.request_id, {MINUTE[dialect]} AS bucket_start, r.server_id, e.drafter_version_id,
        r.domain, e.depth, e.topk, e.nodes, e.accept_rule,
        CASE {batch_bucket} END AS batch_bucket, e.mixed,
        min(e.step) AS first, CAST(count(*) AS bigint) AS n, CAST(sum(e.accepted) AS bigint) AS y
    FROM several CROSS JOIN acceptance_event e JOIN request r ON r.id = e.request_id
    WHERE e.request_id = several.request_id AND e.depth > 0
        AND e.drafter_version_id = several.drafter_version_id
    GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
), grown AS (
    SELECT {keys}, n, y, {before} FROM part WINDOW {named}
)
UPDATE {TABLE} SET {adds}
FROM (SELECT {keys}, {lacks} FROM grown GROUP BY {keys}) d
WHERE {same}
"""


def by_domain_hour(dialect: str, prefix: str) -> str:
    larger = {"sqlite": "max", "postgresql": "greatest"}[dialect]
    return BY_DOMAIN_HOUR.format(hour=HOUR[dialect], larger=larger, p=prefix)


def rejected_tokens(dialect: str) -> str:
    """As in 0003; parents are compared as they are packed, four bytes each."""
    is_sqlite = dialect == "sqlite"
    int32 = sqlite_int32 if is_sqlite else postgresql_int32
    root = "x'00000000'" if is_sqlite else r"'\x00000000'::bytea"
    last = f"CASE WHEN e.accepted = 0 THEN 0 ELSE {int32('e.accepted_nodes', 'e.accepted - 1')} END"
    after = f"CASE WHEN e.accept_rule = 'greedy' THEN {last} ELSE e.accepted END"
    count = "length(e.draft_parents) / 4"
    if is_sqlite:  # a list of as many zeros as there are nodes; its keys count from 0
        numbers = "json_each('[' || substr(replace(hex(zeroblob(e.nodes)), '00', ',0'), 2) || ']')"
        rows, earlier = f"{numbers} AS n", f"{numbers} AS m"
    else:
        rows = f"LATERAL generate_series(0, {count} - 1) AS n(key)"
        earlier = "generate_series(0, n.key) AS m(key)"

    def is_child(number: str) -> str:
        return f"substr(e.draft_parents, 4 * {number} + 1, 4) = e.last_node"

    return f"""
SELECT e.request_id, e.step, e.at, r.domain, e.drafter_version_id, e.depth, e.topk,
    e.accept_rule, e.first_rejected_at,
    (SELECT count(*) FROM {earlier} WHERE m.key <= n.key AND {is_child("m.key")}) AS rank,
    {int32("e.draft_tokens", "n.key")} AS draft_token,
    {int32("e.target_tokens", after)} AS target_token
FROM (SELECT e.*, CASE WHEN e.accepted = 0 THEN {root}
        ELSE substr(e.accepted_nodes, 4 * e.accepted - 3, 4) END AS last_node
      FROM acceptance_event e WHERE e.first_rejected_at > 0) e
JOIN request r ON r.id = e.request_id
CROSS JOIN {rows}
WHERE n.key < {count} AND {is_child("n.key")}
"""


def sqlite_int32(blob: str, index: str) -> str:
    """The int32 at ``index`` of a little-endian blob, NULL beyond its end. SQLite has no function
    from blob to integer, so hexadecimal digits are looked up; ``instr`` gives 0 for the digit 0."""
    digits = f"hex(substr({blob}, 4 * ({index}) + 1, 4))"
    d = [f"instr('123456789ABCDEF', substr({digits}, {place}, 1))" for place in range(1, 9)]
    total = " + ".join(f"(16 * {d[2 * i]} + {d[2 * i + 1]}) * {256**i}" for i in range(4))
    return guarded(f"(({total} + 2147483648) % 4294967296 - 2147483648)", blob, index)


def postgresql_int32(blob: str, index: str) -> str:
    """The same: a shift into the sign bit wraps, as it should."""
    shifts = (f"(get_byte({blob}, 4 * ({index}) + {i}) << {8 * i})" for i in range(4))
    return guarded(f"({' | '.join(shifts)})", blob, index)


def guarded(value: str, blob: str, index: str) -> str:
    return f"CASE WHEN length({blob}) >= 4 * ({index}) + 4 THEN {value} END"


def replace_view(name: str, query: str) -> None:
    """PostgreSQL keeps the rights that were granted on a view, if its columns stay."""
    run = op.get_bind().exec_driver_sql
    if op.get_bind().dialect.name == "sqlite":
        run(f"DROP VIEW {name}")
        run(f"CREATE VIEW {name} AS {query}")
    else:
        run(f"CREATE OR REPLACE VIEW {name} AS {query}")


def downgrade() -> None:
    """``v_rejected_tokens`` stays: it has the rows and columns that it had."""
    dialect = op.get_bind().dialect.name
    replace_view("v_accept_length_by_domain_hour", by_domain_hour(dialect, ""))
    for wide in WIDER:
        for name in SUMS:
            op.drop_column(TABLE, wide + name)
    op.drop_table("store_key")
