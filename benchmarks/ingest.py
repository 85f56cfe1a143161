"""How many verify steps a second does the store take, in SQLite and in PostgreSQL?

Batches of whole envelopes as the sidecar sends them (8 running requests, trees of 8 nodes),
through ``store.ingest``: look-up of duplicates, events, roll-ups, tallies and request counters,
one transaction a batch. PostgreSQL is ``--postgres URL`` (an empty database), or one that the
package pgserver starts for the run. Goal: 20,000 rows/s in SQLite.

    python benchmarks/ingest.py [--events 60000] [--batches 500,2000,5000] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import Engine, func, select

from aurora_sgl import store, wire
from aurora_sgl.console import print_cells
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import Batch, ingest
from aurora_sgl.store.models import AcceptanceEvent

BOOT = 1
RUNNING = 8
STEPS = 60
NODES = 8
GOAL_SQLITE = 20_000


def envelopes(events: int, start_us: int) -> list[tuple[int, list[wire.Record]]]:
    """Requests of 60 steps, eight at a time, a step of the batch every 20 ms."""
    rng = random.Random(0)
    made: list[tuple[int, list[wire.Record]]] = []
    for number in range(-(-events // (RUNNING * STEPS))):
        made += envelopes_of_eight(number, start_us + number * STEPS * 20_000, rng)
    return made


def envelopes_of_eight(
    number: int, at_us: int, rng: random.Random, boot_id: int = BOOT
) -> list[tuple[int, list[wire.Record]]]:
    """The ``number``-th eight requests, from admission to end."""
    ids = [wire.request_id(boot_id, number * RUNNING + i + 1) for i in range(RUNNING)]
    made: list[list[wire.Record]] = [[_started(i, at_us) for i in ids]]
    for step in range(STEPS):
        made.append([_step(i, step, at_us + step * 20_000, rng) for i in ids])
    made.append([_finished(i, at_us + STEPS * 20_000) for i in ids])
    first = number * (STEPS + 2) + 1
    return list(enumerate(made, first))


def _started(request_id: int, at_us: int) -> wire.RequestStarted:
    sampling = {"temperature": 0.0, "max_new_tokens": 128}
    return wire.RequestStarted(
        request_id, at_us, f"rid-{request_id}", 0, "chat", "", 40, 0, sampling, True, True, True
    )


def _step(request_id: int, step: int, at_us: int, rng: random.Random) -> wire.VerifyStep:
    accepted = rng.choice((0, 0, 1, 2, 3))
    tokens = [rng.randrange(49_152) for _ in range(NODES - 1)]
    return wire.VerifyStep(
        request_id, step, at_us, 0, step, False, 40 + step, 3, 4, NODES, "greedy", RUNNING,
        NODES - 1, accepted, accepted + 1, 0 if accepted == 3 else accepted + 1, tokens,
        [0, 0, 1, 1, 2, 3, 4], [1, 3, 6][:accepted], [*tokens, 7],
    )  # fmt: skip


def _finished(request_id: int, at_us: int) -> wire.RequestFinished:
    return wire.RequestFinished(request_id, at_us, "finished", "stop", 128, 0, STEPS, 420, 60, 0)


def batches(made: Batch, size: int) -> Iterator[Batch]:
    """Envelopes grouped into batches of about ``size`` verify steps."""
    part: list[tuple[int, list[wire.Record]]] = []
    count = 0
    for seq, records in made:
        part.append((seq, list(records)))
        count += sum(isinstance(record, wire.VerifyStep) for record in records)
        if count >= size:
            yield part
            part, count = [], 0
    if part:
        yield part


def registered(engine: Engine, boot_id: int = BOOT) -> int:
    """The number of a server that ingest is for."""
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "bench", "target", "", "LlamaForCausalLMEagle3")
        hello = wire.Hello(boot_id, 1, {"name": "bench"}, 0, 0, 0, {})
        return queries.servers.register_server(s, group.id, hello).id


def measure(url: str, made: Batch, size: int) -> dict[str, float | int | str]:
    engine = store.connect(url)
    store.upgrade(engine)
    server_id = registered(engine)
    parts = list(batches(made, size))
    slowest = 0.0
    began = time.perf_counter()
    for part in parts:
        before = time.perf_counter()
        ingest(engine, server_id, BOOT, part)
        slowest = max(slowest, time.perf_counter() - before)
    seconds = time.perf_counter() - began
    again = time.perf_counter()
    repeated = sum(ingest(engine, server_id, BOOT, part).inserted_events for part in parts)
    retry = time.perf_counter() - again
    with store.reading(engine) as connection:
        rows = connection.scalar(select(func.count()).select_from(AcceptanceEvent)) or 0
    engine.dispose()
    assert repeated == 0
    return {
        "database": engine.dialect.name,
        "batch": size,
        "events": rows,
        "rows_per_second": round(rows / seconds),
        "slowest_batch_ms": round(slowest * 1000, 1),
        "retry_rows_per_second": round(rows / retry),
    }


@contextmanager
def postgres(url: str | None) -> Iterator[str | None]:
    """A URL, or ``None`` when there is neither one given nor the package pgserver."""
    if url:
        yield url
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pgserver
    except ImportError:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="aurora-pg-") as folder:
        server = pgserver.get_server(f"{folder}/data", cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=60_000)
    parser.add_argument("--batches", default="500,2000,5000")
    parser.add_argument("--postgres", help="URL of an empty database, one batch size only")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    sizes = [int(size) for size in given.batches.split(",")]
    made = envelopes(given.events, wire.now_us())
    results = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aurora-bench-")))
        for size in sizes:
            results.append(measure(f"sqlite:///{folder / f'{size}.db'}", made, size))
        url = stack.enter_context(postgres(given.postgres))
        for size in sizes if url else []:
            if not given.postgres:
                admin = store.connect(url).execution_options(isolation_level="AUTOCOMMIT")
                with admin.connect() as connection:
                    connection.exec_driver_sql(f"CREATE DATABASE bench_{size}")
                admin.dispose()
                results.append(measure(url.replace("/postgres?", f"/bench_{size}?"), made, size))
            else:
                results.append(measure(url, made, size))
                break
    if given.json:
        print(json.dumps({"goal_sqlite_rows_per_second": GOAL_SQLITE, "results": results}))
        return
    title = f"Ingest of verify steps (goal: {GOAL_SQLITE:,} rows/s in SQLite)"
    headings = [name.replace("_", " ") for name in results[0]]
    cells = [[f"{v:,}" if isinstance(v, int | float) else v for v in r.values()] for r in results]
    print_cells(title, headings, cells, [name != "database" for name in results[0]])


if __name__ == "__main__":
    main()
