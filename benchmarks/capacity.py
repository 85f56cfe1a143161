"""What does a fleet of servers ask of the store, its disk, the network and a trainer?

Bytes of a verify step, a request, and a row of the roll-ups are measured in SQLite and PostgreSQL:
the growth between two sizes of the same traffic, indexes with it, after the database has settled.
With them, and the rows a second that one store took (``benchmarks.ingest``), the load of a number
of servers is computed: tokens/s of a server over its accept length are its verify steps a second.

    python -m benchmarks.capacity [--servers 1,10,100,1000,10000] [--tokens 2000] [--length 2.5]
        [--answer 500] [--domains 8] [--rows 25700] [--events 200000] [--json]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text

from aurora_sgl import store, wire
from aurora_sgl.store.ingest import Batch, ingest
from benchmarks.ingest import (
    BOOT,
    RUNNING,
    STEPS,
    batches,
    envelopes_of_eight,
    postgres,
    registered,
)
from benchmarks.servers import report

DAY = 86_400
#: Days that the limits keep by default: events, requests, minutes.
EVENT_DAYS, REQUEST_DAYS, MINUTE_DAYS = 30, 180, 30
#: A server's rows of one minute and domain: batch sizes by powers of two that one minute sees.
BATCHES_A_MINUTE = 3
TABLES = ("acceptance_event", "request", "acceptance_minute")


def table_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of each table with its indexes and, in PostgreSQL, its partitions."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if engine.dialect.name == "sqlite":
            query = (
                "SELECT coalesce(m.tbl_name, d.name), sum(d.pgsize) FROM dbstat d "
                "LEFT JOIN sqlite_master m ON m.name = d.name GROUP BY 1"
            )
        else:
            query = (
                "SELECT coalesce(p.relname, c.relname), sum(pg_total_relation_size(c.oid)) "
                "FROM pg_class c LEFT JOIN pg_inherits i ON i.inhrelid = c.oid "
                "LEFT JOIN pg_class p ON p.oid = i.inhparent "
                "WHERE c.relkind IN ('r', 'p') GROUP BY 1"
            )
        rows = {name: int(size) for name, size in connection.execute(text(query))}
    return {name: rows.get(name, 0) for name in TABLES}


def spread(events: int) -> Batch:
    """Eight requests a minute, so that roll-ups grow with them; all of one day."""
    eights = events // (RUNNING * STEPS)
    begin = wire.now_us() // (DAY * 1_000_000) * DAY * 1_000_000
    every, rng = DAY * 1_000_000 // (eights + 1), random.Random(0)
    made: list[tuple[int, list[wire.Record]]] = []
    for number in range(eights):
        made += envelopes_of_eight(number, begin + number * every, rng)
    return made


def measure(url: str, events: int) -> dict[str, float]:
    """Bytes of one more row of each table."""
    engine = store.connect(url)
    store.upgrade(engine)
    server_id = registered(engine)
    made = spread(2 * events)
    sizes, counts = [], []
    middle = len(made) // 2
    for part in (made[:middle], made[middle:]):
        for batch in batches(part, 5000):
            ingest(engine, server_id, BOOT, batch)
        sizes.append(table_bytes(engine))
        with engine.connect() as connection:
            counts.append(
                {t: connection.execute(text(f"SELECT count(*) FROM {t}")).scalar_one()
                 for t in TABLES}
            )  # fmt: skip
    engine.dispose()
    return {
        name: (sizes[1][name] - sizes[0][name]) / max(1, counts[1][name] - counts[0][name])
        for name in TABLES
    }


def fleet(
    servers: int, given: argparse.Namespace, bytes_: dict[str, float]
) -> dict[str, float | int]:
    """What this many servers ask for. ``bytes_``: of a row, by table."""
    steps = servers * given.tokens / given.length
    requests = servers * given.tokens / given.answer
    minutes = servers * given.domains * BATCHES_A_MINUTE / 60
    day = {
        "acceptance_event": steps * bytes_["acceptance_event"] * DAY,
        "request": requests * bytes_["request"] * DAY,
        "acceptance_minute": minutes * bytes_["acceptance_minute"] * DAY,
    }
    kept = (
        day["acceptance_event"] * EVENT_DAYS
        + day["request"] * REQUEST_DAYS
        + day["acceptance_minute"] * MINUTE_DAYS
    )
    return {
        "servers": servers,
        "verify steps/s": round(steps),
        "stores of this size": round(steps / given.rows, 2),
        "MB/s to the store": round(sum(day.values()) / DAY / 1e6, 2),
        "GB a day, all recorded": round(sum(day.values()) / 1e9, 1),
        "TB kept, all recorded": round(kept / 1e12, 2),
        "TB kept, 5% of the steps": round(
            (kept - 0.95 * day["acceptance_event"] * EVENT_DAYS) / 1e12, 2
        ),
    }


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """A new SQLite file and a new PostgreSQL, where the package pgserver is there."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aurora-bench-")))
        urls = {"sqlite": f"sqlite:///{folder / 'capacity.db'}"}
        if url := stack.enter_context(postgres(None)):
            urls["postgresql"] = url
        yield urls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--servers", default="1,10,100,1000,10000")
    parser.add_argument("--tokens", type=float, default=2000.0, help="tokens/s of a server")
    parser.add_argument("--length", type=float, default=2.5, help="its accept length")
    parser.add_argument("--answer", type=float, default=500.0, help="tokens of an answer")
    parser.add_argument("--domains", type=int, default=8)
    parser.add_argument("--rows", type=float, default=25_700.0, help="rows/s that one store takes")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.keep = False
    with databases() as urls:
        sizes = {name: measure(url, given.events) for name, url in urls.items()}
    rows: list[dict[str, Any]] = [
        {"database": name, **{f"bytes of a row: {t}": round(size) for t, size in one.items()}}
        for name, one in sizes.items()
    ]
    report("bytes of a row with its indexes", rows, as_json=given.json)
    chosen = sizes.get("postgresql", sizes["sqlite"])
    counts = [int(count) for count in given.servers.split(",")]
    report(
        f"a fleet of servers with {given.tokens:g} tokens/s each, requests of {STEPS} steps",
        [fleet(count, given, chosen) for count in counts],
        as_json=given.json,
    )


if __name__ == "__main__":
    main()
