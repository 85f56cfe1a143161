"""Views for people who write SQL, and triggers that keep history as it was."""

from __future__ import annotations

from collections.abc import Callable

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

#: What a version is. ``pinned``, ``note``, ``metrics`` and ``pruned_at`` may change.
IMMUTABLE = (
    "group_id, parent_id, created_at, architecture, weights_uri, weights_sha256, vocab_sha256, "
    "draft_vocab_size, target_model, target_revision, training_run_id, source, config"
)

#: Steps with proposals only. The variance is the delta method's for a ratio of sums over
#: requests, sum((y - R n)^2) / (sum n)^2 * m / (m - 1) with R = sum y / sum n over m requests;
#: a 95% interval is accept_length +- 1.96 * sqrt(accept_length_variance).
ACCEPT_LENGTH = """
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
    END AS accept_length_variance
"""

#: Steps of requests with draft KV of one version only, under one draft shape: what may be
#: compared. Without a row in ``drafter_version`` (id 0) the drafter is not in the store.
BY_VERSION = f"""
CREATE VIEW v_accept_length_by_version AS
SELECT s.group_id, m.drafter_version_id, m.mixed, m.depth, m.topk, m.accept_rule,
    {ACCEPT_LENGTH},
    min(m.bucket_start) AS first_minute,
    max(m.bucket_start) AS last_minute
FROM acceptance_minute m JOIN server s ON s.id = m.server_id
WHERE m.depth > 0
GROUP BY s.group_id, m.drafter_version_id, m.mixed, m.depth, m.topk, m.accept_rule
"""

BY_DOMAIN_HOUR = f"""
CREATE VIEW v_accept_length_by_domain_hour AS
SELECT s.group_id, m.domain, {{hour}} AS hour, m.drafter_version_id,
    {ACCEPT_LENGTH},
    CAST(sum(m.completion_tokens) AS bigint) AS completion_tokens
FROM acceptance_minute m JOIN server s ON s.id = m.server_id
WHERE m.depth > 0
GROUP BY s.group_id, m.domain, {{hour}}, m.drafter_version_id
"""
HOUR = {
    "sqlite": "strftime('%Y-%m-%d %H:00:00.000000', m.bucket_start)",
    "postgresql": "date_trunc('hour', m.bucket_start, 'UTC')",
}

DEPLOYMENTS = """
CREATE VIEW v_deployment_history AS
SELECT g.name AS group_name, d.generation, d.created_at, d.action,
    d.version_id, v.weights_sha256, v.source AS version_source, v.note AS version_note,
    d.previous_version_id, d.actor, d.reason,
    d.evaluation_id, e.verdict, e.difference, e.ci_low, e.ci_high,
    d.before, d.after, d.evidence
FROM deployment d
JOIN deployment_group g ON g.id = d.group_id
JOIN drafter_version v ON v.id = d.version_id
LEFT JOIN evaluation e ON e.id = d.evaluation_id
"""


def hex_digit(blob: str, start: str, size: int, place: int) -> str:
    """SQLite has no function from blob to integer, so hexadecimal digits are looked up; ``instr``
    gives 0 for the digit 0."""
    return f"instr('123456789ABCDEF', substr(hex(substr({blob}, {start}, {size})), {place}, 1))"


def sqlite_int32(blob: str, index: str) -> str:
    """The int32 at ``index`` of a little-endian blob."""
    d = [hex_digit(blob, f"4 * ({index}) + 1", 4, place) for place in range(1, 9)]
    total = " + ".join(f"(16 * {d[2 * i]} + {d[2 * i + 1]}) * {256**i}" for i in range(4))
    return f"(({total} + 2147483648) % 4294967296 - 2147483648)"


def postgresql_int32(blob: str, index: str) -> str:
    """The same: a shift into the sign bit wraps, as it should."""
    shifts = (f"(get_byte({blob}, 4 * ({index}) + {i}) << {8 * i})" for i in range(4))
    return f"({' | '.join(shifts)})"


def guarded(int32: Callable[[str, str], str], blob: str, index: str) -> str:
    return f"CASE WHEN length({blob}) >= 4 * ({index}) + 4 THEN {int32(blob, index)} END"


def sqlite_float16(blob: str, index: str) -> str:
    """The IEEE half at ``index`` of a little-endian blob."""
    d = [hex_digit(blob, f"2 * ({index}) + 1", 2, place) for place in range(1, 5)]
    return half(f"({d[2]} * 4096 + {d[3]} * 256 + {d[0]} * 16 + {d[1]})")


def postgresql_float16(blob: str, index: str) -> str:
    return half(f"(get_byte({blob}, 2 * ({index}) + 1) * 256 + get_byte({blob}, 2 * ({index})))")


def half(bits: str) -> str:
    """(1024 + mantissa) * 2^(exponent - 25), or mantissa * 2^-24 for exponent 0."""
    exponent, mantissa = f"(({bits} >> 10) & 31)", f"({bits} & 1023)"
    number = (
        f"CASE WHEN {exponent} = 0 THEN {mantissa} / 16777216.0 "
        f"WHEN {exponent} = 31 THEN NULL "
        f"ELSE (1024.0 + {mantissa}) * (1 << {exponent}) / 33554432.0 END"
    )
    return f"(CASE WHEN {bits} >= 32768 THEN -1.0 ELSE 1.0 END * ({number}))"


def json_list(dialect: str, blob: str, width: int, item: str) -> str:
    if dialect == "sqlite":
        return f"""CASE WHEN {blob} IS NOT NULL THEN (
        WITH RECURSIVE n(i) AS (SELECT 0 WHERE length({blob}) > 0
            UNION ALL SELECT i + 1 FROM n WHERE {width} * (i + 1) < length({blob}))
        SELECT json_group_array({item}) FROM n) END"""
    return f"""CASE WHEN {blob} IS NOT NULL THEN (
        SELECT coalesce(json_agg({item} ORDER BY i), '[]'::json)
        FROM generate_series(0, length({blob}) / {width} - 1) AS n(i)) END"""


def events_as_json(dialect: str) -> str:
    int32 = sqlite_int32 if dialect == "sqlite" else postgresql_int32
    float16 = sqlite_float16 if dialect == "sqlite" else postgresql_float16
    columns = [
        f"{json_list(dialect, f'e.{name}', 4, int32(f'e.{name}', 'i'))} AS {name}"
        for name in ("draft_tokens", "draft_parents", "accepted_nodes", "target_tokens")
    ]
    columns.append(
        f"{json_list(dialect, 'e.draft_logprobs', 2, float16('e.draft_logprobs', 'i'))}"
        " AS draft_logprobs"
    )
    return f"""
CREATE VIEW v_acceptance_event AS
SELECT e.request_id, e.step, e.at, e.drafter_version_id, e.swap_age, e.mixed, e.position,
    e.depth, e.topk, e.nodes, e.accept_rule, e.batch_size, e.proposed, e.accepted, e.kept,
    e.first_rejected_at, 1 + e.accepted AS accept_length,
    {", ".join(columns)}
FROM acceptance_event e
"""


def rejected_tokens(dialect: str) -> str:
    """One row for every proposal that was rejected at the first rejection of its step: the
    children of the last accepted node, ``rank`` 1 the drafter's first choice. The target's token
    there stands after that node: at its number for greedy steps, at the end for sampled ones."""
    int32 = sqlite_int32 if dialect == "sqlite" else postgresql_int32
    last = guarded(int32, "e.accepted_nodes", "e.accepted - 1")
    after = "CASE WHEN e.accept_rule = 'greedy' THEN e.last_node ELSE e.accepted END"
    count = "length(e.draft_parents) / 4"
    if dialect == "sqlite":  # a list of as many zeros as there are nodes; its keys count from 0
        numbers = "json_each('[' || substr(replace(hex(zeroblob(e.nodes)), '00', ',0'), 2) || ']')"
        numbers += " AS n"
    else:
        numbers = f"LATERAL generate_series(0, {count} - 1) AS n(key)"
    return f"""
CREATE VIEW v_rejected_tokens AS
SELECT e.request_id, e.step, e.at, r.domain, e.drafter_version_id, e.depth, e.topk,
    e.accept_rule, e.first_rejected_at,
    row_number() OVER (PARTITION BY e.request_id, e.step ORDER BY n.key) AS rank,
    {int32("e.draft_tokens", "n.key")} AS draft_token,
    {guarded(int32, "e.target_tokens", after)} AS target_token
FROM (SELECT e.*, CASE WHEN e.accepted = 0 THEN 0 ELSE {last} END AS last_node
      FROM acceptance_event e WHERE e.first_rejected_at > 0) e
JOIN request r ON r.id = e.request_id
CROSS JOIN {numbers}
WHERE n.key < {count} AND {int32("e.draft_parents", "n.key")} = e.last_node
"""


VIEWS = (
    "v_accept_length_by_version",
    "v_accept_length_by_domain_hour",
    "v_deployment_history",
    "v_acceptance_event",
    "v_rejected_tokens",
)


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    for view in (
        BY_VERSION,
        BY_DOMAIN_HOUR.format(hour=HOUR[dialect]),
        DEPLOYMENTS,
        events_as_json(dialect),
        rejected_tokens(dialect),
    ):
        op.get_bind().exec_driver_sql(view)
    if dialect == "sqlite":
        sqlite_triggers()
    else:
        postgresql_triggers()


def sqlite_triggers() -> None:
    for action in ("UPDATE", "DELETE"):
        op.execute(f"""
            CREATE TRIGGER deployment_no_{action.lower()} BEFORE {action} ON deployment
            BEGIN SELECT RAISE(ABORT, 'deployment is append-only'); END""")
    op.execute(f"""
        CREATE TRIGGER drafter_version_immutable BEFORE UPDATE OF {IMMUTABLE} ON drafter_version
        BEGIN SELECT RAISE(ABORT, 'a drafter version does not change'); END""")
    op.execute("""
        CREATE TRIGGER drafter_version_no_delete BEFORE DELETE ON drafter_version
        BEGIN SELECT RAISE(ABORT, 'a drafter version is not deleted, only its weights'); END""")


def postgresql_triggers() -> None:
    op.execute("""
        CREATE FUNCTION aurora_refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION USING MESSAGE = TG_ARGV[0]; END $$""")
    op.execute("""
        CREATE TRIGGER deployment_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON deployment
        FOR EACH STATEMENT EXECUTE FUNCTION aurora_refuse('deployment is append-only')""")
    op.execute(f"""
        CREATE TRIGGER drafter_version_immutable BEFORE UPDATE OF {IMMUTABLE} ON drafter_version
        FOR EACH STATEMENT EXECUTE FUNCTION aurora_refuse('a drafter version does not change')""")
    op.execute("""
        CREATE TRIGGER drafter_version_no_delete BEFORE DELETE OR TRUNCATE ON drafter_version
        FOR EACH STATEMENT EXECUTE FUNCTION
            aurora_refuse('a drafter version is not deleted, only its weights')""")


def downgrade() -> None:
    for view in reversed(VIEWS):
        op.execute(f"DROP VIEW {view}")
    if op.get_bind().dialect.name == "sqlite":
        for trigger in (
            "deployment_no_update",
            "deployment_no_delete",
            "drafter_version_immutable",
            "drafter_version_no_delete",
        ):
            op.execute(f"DROP TRIGGER {trigger}")
    else:
        op.execute("DROP FUNCTION aurora_refuse() CASCADE")
