"""Roll-ups by the hour, kept by triggers of ``acceptance_minute``.

The two views over roll-ups read them: some hundred rows a day where there were as many thousands.
Whatever adds to minutes, sums them up or deletes them changes ``acceptance_hour`` in the same
statement, so that it is always their sum. ``v_rejected_tokens`` begins with the events.
"""

from __future__ import annotations

import re

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)

SAME = (
    "server_id", "drafter_version_id", "domain", "depth", "topk", "nodes", "accept_rule", "mixed",
)  # fmt: skip
KINDS = {"domain": sa.String, "accept_rule": sa.String, "mixed": sa.Boolean}
OVER_REQUESTS = ("requests", "sum_steps_squared", "sum_accepted_squared", "sum_steps_accepted")
SUMS = (
    "verify_steps", "proposed", "accepted", "completion_tokens",
    *(prefix + name for prefix in ("", "version_", "any_") for name in OVER_REQUESTS),
)  # fmt: skip
HOUR = {
    "sqlite": "(substr({0}, 1, 13) || ':00:00.000000')",
    "postgresql": "date_trunc('hour', {0}, 'UTC')",
}
FUNCTION = "aurora_add_to_hour"
#: As in 0010; rounding may not make a variance negative. ``p``: which sums over requests.
ACCEPT_LENGTH = """
    CAST(sum({t}.verify_steps) AS bigint) AS verify_steps,
    CAST(sum({t}.{p}requests) AS bigint) AS requests,
    CAST(sum({t}.proposed) AS bigint) AS proposed,
    CAST(sum({t}.accepted) AS bigint) AS accepted,
    1 + CAST(sum({t}.accepted) AS double precision) / sum({t}.verify_steps) AS accept_length,
    CAST(sum({t}.accepted) AS double precision) / nullif(sum({t}.proposed), 0) AS acceptance_rate,
    CASE WHEN sum({t}.{p}requests) > 1 THEN {larger}(CAST(0 AS double precision),
        (CAST(sum({t}.{p}sum_accepted_squared) AS double precision)
         - 2.0 * sum({t}.accepted) / sum({t}.verify_steps) * sum({t}.{p}sum_steps_accepted)
         + 1.0 * sum({t}.accepted) / sum({t}.verify_steps)
           * sum({t}.accepted) / sum({t}.verify_steps) * sum({t}.{p}sum_steps_squared))
        / sum({t}.verify_steps) / sum({t}.verify_steps)
        * sum({t}.{p}requests) / (sum({t}.{p}requests) - 1))
    END AS accept_length_variance"""
BY_VERSION = """
SELECT s.group_id, {t}.drafter_version_id, {t}.mixed, {t}.depth, {t}.topk, {t}.accept_rule,
    {numbers},
    min({first}) AS first_minute, max({last}) AS last_minute, {t}.nodes
FROM {table} {t} JOIN server s ON s.id = {t}.server_id
WHERE {t}.depth > 0
GROUP BY s.group_id, {t}.drafter_version_id, {t}.mixed, {t}.depth, {t}.topk, {t}.accept_rule,
    {t}.nodes
"""
BY_DOMAIN_HOUR = """
SELECT s.group_id, {t}.domain, {hour} AS hour, {t}.drafter_version_id,
    {numbers},
    CAST(sum({t}.completion_tokens) AS bigint) AS completion_tokens
FROM {table} {t} JOIN server s ON s.id = {t}.server_id
WHERE {t}.depth > 0
GROUP BY s.group_id, {t}.domain, {hour}, {t}.drafter_version_id
"""
#: Of the views before this migration.
STRFTIME = "strftime('%Y-%m-%d %H:00:00.000000', m.bucket_start)"


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    key = ("hour", *SAME)
    op.create_table(
        "acceptance_hour",
        sa.Column("hour", Time, nullable=False),
        *(
            sa.Column(name, KINDS.get(name, Int), nullable=False, autoincrement=False)
            for name in SAME
        ),
        sa.Column("minutes", Int, nullable=False),
        sa.Column("first_minute", Time, nullable=False),
        sa.Column("last_minute", Time, nullable=False),
        *(sa.Column(name, Int, nullable=False) for name in SUMS),
        sa.PrimaryKeyConstraint(*key, name="pk_acceptance_hour"),
        sqlite_with_rowid=False,
    )
    run = op.get_bind().exec_driver_sql
    hour = HOUR[dialect].format("bucket_start")
    run(
        f"INSERT INTO acceptance_hour ({', '.join(key)}, minutes, first_minute, last_minute, "
        f"{', '.join(SUMS)}) SELECT {hour}, {', '.join(SAME)}, count(*), min(bucket_start), "
        f"max(bucket_start), {', '.join(f'sum({name})' for name in SUMS)} "
        f"FROM acceptance_minute GROUP BY {hour}, {', '.join(SAME)}"
    )
    if dialect == "sqlite":
        sqlite_triggers()
    else:
        postgresql_triggers()
    replace_view(
        "v_accept_length_by_version",
        BY_VERSION.format(
            numbers=numbers("h", ""), table="acceptance_hour", t="h",
            first="h.first_minute", last="h.last_minute",
        ),
    )  # fmt: skip
    replace_view(
        "v_accept_length_by_domain_hour",
        BY_DOMAIN_HOUR.format(
            numbers=numbers("h", "any_"), table="acceptance_hour", t="h", hour="h.hour"
        ),
    )
    events_first()


def events_first(left: str = "LEFT ") -> None:
    """Both databases took requests first in ``v_rejected_tokens`` and read all events of each, also
    where a condition on ``at`` leaves few. With an outer join they begin with the events, and read
    no request where its domain is not asked for. Each event has its request: the rows are the same.
    """
    run = op.get_bind().exec_driver_sql
    if op.get_bind().dialect.name == "sqlite":
        (view,) = run("SELECT sql FROM sqlite_master WHERE name = 'v_rejected_tokens'").one()
        query = view.split(" AS ", 1)[1]
    else:
        query = run("SELECT pg_get_viewdef('v_rejected_tokens'::regclass)").scalar_one()
    query, count = re.subn(r"(LEFT )?(JOIN (\w+\.)?request r ON)", rf"{left}\2", query)
    assert count == 1
    replace_view("v_rejected_tokens", query)


def numbers(table: str, prefix: str) -> str:
    larger = {"sqlite": "max", "postgresql": "greatest"}[op.get_bind().dialect.name]
    return ACCEPT_LENGTH.format(t=table, p=prefix, larger=larger).strip()


def same_hour(row: str, dialect: str) -> str:
    """The hour's row that a minute (``NEW``, ``OLD``) belongs to."""
    hour = HOUR[dialect].format(f"{row}.bucket_start")
    return " AND ".join([f"hour = {hour}", *(f"{name} = {row}.{name}" for name in SAME)])


def make_row(dialect: str) -> str:
    """The hour's row of a new minute, of zeros, where there is none."""
    columns = ("hour", *SAME, "minutes", "first_minute", "last_minute", *SUMS)
    values = [
        HOUR[dialect].format("NEW.bucket_start"),
        *(f"NEW.{name}" for name in SAME),
        "0", "NEW.bucket_start", "NEW.bucket_start", *("0" for _ in SUMS),
    ]  # fmt: skip
    insert = f"INSERT INTO acceptance_hour ({', '.join(columns)})"
    if dialect == "postgresql":
        return f"{insert} VALUES ({', '.join(values)}) ON CONFLICT DO NOTHING"
    # In a trigger the conflict clause of the statement that fired it would count.
    return (
        f"{insert} SELECT {', '.join(values)} WHERE NOT EXISTS "
        f"(SELECT 1 FROM acceptance_hour WHERE {same_hour('NEW', dialect)})"
    )


def add(dialect: str) -> str:
    less, more = ("min", "max") if dialect == "sqlite" else ("least", "greatest")
    sums = ", ".join(f"{name} = {name} + NEW.{name}" for name in SUMS)
    return (
        f"UPDATE acceptance_hour SET minutes = minutes + 1, {sums}, "
        f"first_minute = {less}(first_minute, NEW.bucket_start), "
        f"last_minute = {more}(last_minute, NEW.bucket_start) WHERE {same_hour('NEW', dialect)}"
    )


def take(dialect: str) -> str:
    sums = ", ".join(f"{name} = {name} - OLD.{name}" for name in SUMS)
    return (
        f"UPDATE acceptance_hour SET minutes = minutes - 1, {sums} "
        f"WHERE {same_hour('OLD', dialect)}"
    )


def drop_row(dialect: str) -> str:
    return f"DELETE FROM acceptance_hour WHERE {same_hour('OLD', dialect)} AND minutes = 0"


def change(dialect: str) -> str:
    sums = ", ".join(f"{name} = {name} + NEW.{name} - OLD.{name}" for name in SUMS)
    return f"UPDATE acceptance_hour SET {sums} WHERE {same_hour('NEW', dialect)}"


def is_moved() -> str:
    return " OR ".join(f"OLD.{name} <> NEW.{name}" for name in ("bucket_start", *SAME))


def sqlite_triggers() -> None:
    into, out = (make_row("sqlite"), add("sqlite")), (take("sqlite"), drop_row("sqlite"))
    for name, event, when, statements in (
        ("insert", "INSERT", "", into),
        ("delete", "DELETE", "", out),
        ("update", "UPDATE", f"WHEN NOT ({is_moved()})", (change("sqlite"),)),
        ("move", "UPDATE", f"WHEN {is_moved()}", (*out, *into)),
    ):
        body = "; ".join(statements)
        op.get_bind().exec_driver_sql(
            f"CREATE TRIGGER acceptance_minute_{name} AFTER {event} ON acceptance_minute "
            f"FOR EACH ROW {when} BEGIN {body}; END"
        )


def postgresql_triggers() -> None:
    """The function runs as its owner, and names its schema: who may write minutes need not have a
    right on hours, and no other table can be in their place."""
    run = op.get_bind().exec_driver_sql
    schema = op.get_bind().dialect.identifier_preparer.quote(
        run("SELECT current_schema()").scalar_one()
    )

    def of_schema(statement: str) -> str:
        return statement.replace(" acceptance_hour", f" {schema}.acceptance_hour", 1)

    p = "postgresql"
    changed, taken, dropped, made, added = (
        of_schema(one) for one in (change(p), take(p), drop_row(p), make_row(p), add(p))
    )
    run(f"""
        CREATE FUNCTION {FUNCTION}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp AS $$ BEGIN
            IF TG_OP = 'UPDATE' THEN
                IF NOT ({is_moved()}) THEN
                    {changed};
                    RETURN NULL;
                END IF;
            END IF;
            IF TG_OP <> 'INSERT' THEN
                {taken};
                {dropped};
            END IF;
            IF TG_OP <> 'DELETE' THEN
                {made};
                {added};
            END IF;
            RETURN NULL;
        END $$""")
    run(f"REVOKE ALL ON FUNCTION {FUNCTION}() FROM PUBLIC")
    run(f"""
        CREATE TRIGGER acceptance_minute_to_hour AFTER INSERT OR UPDATE OR DELETE
        ON acceptance_minute FOR EACH ROW EXECUTE FUNCTION {FUNCTION}()""")


def replace_view(name: str, query: str) -> None:
    """PostgreSQL keeps the rights that were granted on a view, if its columns stay."""
    run = op.get_bind().exec_driver_sql
    if op.get_bind().dialect.name == "sqlite":
        run(f"DROP VIEW {name}")
        run(f"CREATE VIEW {name} AS {query}")
    else:
        run(f"CREATE OR REPLACE VIEW {name} AS {query}")


def downgrade() -> None:
    dialect = op.get_bind().dialect.name
    hour = {"sqlite": STRFTIME, "postgresql": HOUR["postgresql"].format("m.bucket_start")}
    replace_view(
        "v_accept_length_by_version",
        BY_VERSION.format(
            numbers=numbers("m", ""), table="acceptance_minute", t="m",
            first="m.bucket_start", last="m.bucket_start",
        ),
    )  # fmt: skip
    replace_view(
        "v_accept_length_by_domain_hour",
        BY_DOMAIN_HOUR.format(
            numbers=numbers("m", "any_"), table="acceptance_minute", t="m", hour=hour[dialect]
        ),
    )
    events_first("")
    if dialect == "sqlite":
        for name in ("insert", "delete", "update", "move"):
            op.execute(f"DROP TRIGGER acceptance_minute_{name}")
    else:
        op.execute(f"DROP FUNCTION {FUNCTION}() CASCADE")
    op.drop_table("acceptance_hour")
