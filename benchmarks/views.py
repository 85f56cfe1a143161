"""How long do the public views take at millions of events, in SQLite and in PostgreSQL?

Makes a store of months (see ``dashboard_data``), copies it into PostgreSQL, and times what people
ask of the views: the median of three runs after a first one. PostgreSQL is ``--postgres URL`` (an
empty database, as a superuser), or one that the package pgserver starts for the run. Goal: 200 ms
for the views over roll-ups.

    python -m benchmarks.views [--events 10000000] [--times 10] [--days 30] [--postgres URL]
        [--json]
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import tempfile
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import Boolean, Engine, Table, create_engine, text

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.console import print_cells
from aurora_sgl.store.models import Base
from aurora_sgl.store.partitions import ensure_partitions
from benchmarks import dashboard_data
from benchmarks.ingest import postgres
from dashboard.screens.sql import TOKEN_EXAMPLES

GOAL_MS = 200
RUNS = 3
HOUR = {"sqlite": "datetime('now', '-1 hour')", "postgresql": "now() - interval '1 hour'"}
DAY = {"sqlite": "datetime('now', '-1 day')", "postgresql": "now() - interval '1 day'"}
#: (what is asked, statement); those with a goal read roll-ups.
OVER_ROLL_UPS = [
    ("accept length by version", "SELECT * FROM v_accept_length_by_version"),
    ("by domain and hour, all", "SELECT * FROM v_accept_length_by_domain_hour"),
    ("by domain and hour, last day",
     "SELECT * FROM v_accept_length_by_domain_hour WHERE hour >= {day}"),
    ("deployments", "SELECT * FROM v_deployment_history"),
]  # fmt: skip
OVER_EVENTS = [
    ("ten events", "SELECT * FROM v_acceptance_event LIMIT 10"),
    ("ten rejected tokens", "SELECT * FROM v_rejected_tokens LIMIT 10"),
    ("rejected, last hour", "SELECT count(*) FROM v_rejected_tokens WHERE at >= {hour}"),
    ("the page's example", next(iter(TOKEN_EXAMPLES.values()))),
]


def copy(path: Path, engine: Engine, days: int) -> None:
    """All tables of a SQLite store into an empty one in PostgreSQL."""
    store.upgrade(engine)
    ensure_partitions(engine, [utc_now() - timedelta(days=ago) for ago in range(days + 1)])
    with closing(sqlite3.connect(path)) as source, engine.begin() as connection:
        # Versions and runs name each other; a superuser may leave that unchecked.
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        cursor = connection.connection.cursor()
        for table in Base.metadata.sorted_tables:
            _copy_table(source, cursor, table)
            _go_on_counting(cursor, table)
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")


def _copy_table(source: sqlite3.Connection, cursor: Any, table: Table) -> None:
    names = ", ".join(f'"{column.name}"' for column in table.columns)
    flags = [i for i, c in enumerate(table.columns) if isinstance(c.type, Boolean)]
    with cursor.copy(f'COPY "{table.name}" ({names}) FROM STDIN') as rows:
        for row in source.execute(f'SELECT {names} FROM "{table.name}"'):
            values = list(row)
            for i in flags:
                values[i] = None if values[i] is None else bool(values[i])
            rows.write_row(values)


def _go_on_counting(cursor: Any, table: Table) -> None:
    """New rows get numbers beyond those that were copied."""
    column = table.autoincrement_column
    if column is not None:
        cursor.execute(
            f"SELECT setval(pg_get_serial_sequence('{table.name}', '{column.name}'), "
            f"(SELECT max({column.name}) FROM {table.name}))"
        )


def grow(engine: Engine, times: int) -> None:
    """So many times the traffic, and what the planner knows of it."""
    if times == 1:
        return
    patient = create_engine(engine.url)
    dashboard_data.multiply(patient, times)
    with patient.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    patient.dispose()


def measure(engine: Engine) -> dict[str, float]:
    """Milliseconds, by what is asked."""
    names = {"hour": HOUR[engine.dialect.name], "day": DAY[engine.dialect.name]}
    return {
        asked: _milliseconds(engine, statement.format(**names))
        for asked, statement in [*OVER_ROLL_UPS, *OVER_EVENTS]
    }


def _milliseconds(engine: Engine, statement: str) -> float:
    times = []
    with store.reading(engine) as connection:
        for _ in range(RUNS + 1):
            begun = time.perf_counter()
            connection.execute(text(statement)).all()
            times.append(1000 * (time.perf_counter() - begun))
    return round(median(times[1:]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument(
        "--times", type=int, default=1, help="the same on so many times as many servers"
    )
    parser.add_argument("--versions", type=int, default=200)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--postgres", help="URL of an empty database")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    events = given.events * given.times
    with tempfile.TemporaryDirectory(prefix="aurora-views-") as folder:
        path = Path(folder) / "aurora.db"
        dashboard_data.build(path, given.events, given.versions, given.days)
        engines = [store.connect(f"sqlite:///{path}")]
        with postgres(given.postgres) as url:
            if url:
                engines.append(store.connect(url))
                copy(path, engines[-1], given.days)
            for engine in engines:
                grow(engine, given.times)
                results[engine.dialect.name] = measure(engine)
                engine.dispose()
                path.unlink(missing_ok=True)  # at 100 million events there is no room for both
    if given.json:
        print(json.dumps({"events": events, "goal_ms": GOAL_MS, "milliseconds": results}))
        return
    goals = {asked for asked, _ in OVER_ROLL_UPS}
    cells = [
        [asked, *(f"{times[asked]:,.1f}" for times in results.values()),
         f"{GOAL_MS}" if asked in goals else ""]
        for asked in next(iter(results.values()))
    ]  # fmt: skip
    title = f"Public views at {events:,} events, in milliseconds"
    print_cells(title, ["asked", *results, "goal"], cells, [False, *([True] * (len(results) + 1))])


if __name__ == "__main__":
    main()
