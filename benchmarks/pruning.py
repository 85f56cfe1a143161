"""Does ingest go on while millions of rows are pruned, and how long does a commit wait?

A store whose traffic ended a month ago (see ``dashboard_data``) gets new verify steps at a steady
rate, a commit every 0.24 s, as a sidecar sends them. After a while without, a process of its own
prunes by the default limits. In PostgreSQL old events go by the day's table; with ``--apart`` the
group of the new ones keeps them for longer, so that every old row is deleted by itself. Aim: ingest
never stops, 99 of 100 commits under a second. PostgreSQL is one that the package pgserver starts.

    python -m benchmarks.pruning [--events 10000000] [--rate 2000] [--database sqlite]
        [--apart] [--made FILE] [--keep] [--json]
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from aurora_sgl.store.retention import prune
from benchmarks import dashboard_data
from benchmarks.ingest import RUNNING, STEPS, envelopes_of_eight, postgres, registered
from benchmarks.servers import report
from benchmarks.views import copy

#: The old traffic: so many days of it, which ended so many days ago. Events are kept for 30.
DAYS, ENDED = 20, 32
VERSIONS = 50
BOOT = 9  # the old servers have 1 and 2
QUIET_SECONDS = 30.0  # before the pruning begins
LONG_MS = 1000.0


class SteadyIngest:
    """Commits of eight requests each, so many verify steps a second; one that comes late is
    followed by the next at once."""

    def __init__(self, engine: Engine, server_id: int, rate: float) -> None:
        self._engine, self._server_id = engine, server_id
        self._every = RUNNING * STEPS / rate
        self._rng = random.Random(0)
        self._commits = 0
        self._begun = time.monotonic()

    def go_on(self, more: Callable[[], bool]) -> dict[str, Any]:
        """While ``more()``: what the commits of that time took."""
        begun, first = time.monotonic(), self._commits
        took: list[float] = []
        while more():
            due = self._begun + self._commits * self._every
            time.sleep(max(0.0, due - time.monotonic()))
            batch = envelopes_of_eight(self._commits, wire.now_us(), self._rng, BOOT)
            self._commits += 1
            before = time.monotonic()
            counted = ingest(self._engine, self._server_id, BOOT, batch)
            took.append(1000 * (time.monotonic() - before))
            assert counted.inserted_events == RUNNING * STEPS
        seconds = time.monotonic() - begun
        late = time.monotonic() - (self._begun + self._commits * self._every)
        return {
            "seconds": round(seconds),
            "rows/s": round((self._commits - first) * RUNNING * STEPS / seconds),
            "commits": len(took),
            "median ms": round(float(np.median(took))),
            "p99 ms": round(float(np.percentile(took, 99))),
            "longest ms": round(max(took)),
            "over a second": sum(one > LONG_MS for one in took),
            "late at the end, s": round(max(0.0, late), 1),
        }


def prune_all(url: str, artifacts: str, group_id: int) -> None:
    """Of a process of its own, as retention is."""
    engine = store.connect(url)
    done = prune(engine, ArtifactRoot(artifacts), group_id, with_weights=False)
    print(f"pruned {done.sentence}", file=sys.stderr, flush=True)
    engine.dispose()


def measure(url: str, given: argparse.Namespace, artifacts: str) -> list[dict[str, Any]]:
    engine = store.connect(url)
    server_id = registered(engine, BOOT)
    with store.session(engine) as s:
        old = queries.groups.group_by_name(s, "default").id
        if given.apart:
            new = queries.groups.group_by_name(s, "bench").id
            longer = {"event_days": 365, "request_days": 365}
            queries.limits.set_limits(s, new, longer, "benchmark")
    steady = SteadyIngest(engine, server_id, given.rate)
    until = time.monotonic() + QUIET_SECONDS
    before = steady.go_on(lambda: time.monotonic() < until)
    process = multiprocessing.get_context("spawn").Process(
        target=prune_all, args=(url, artifacts, old)
    )
    process.start()
    meanwhile = steady.go_on(process.is_alive)
    assert process.exitcode == 0
    database = engine.dialect.name + (", by rows" if given.apart else "")
    engine.dispose()
    return [
        {"database": database, "pruning": "no", **before},
        {"database": database, "pruning": "yes", **meanwhile},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--rate", type=float, default=2000.0, help="verify steps a second")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--made", type=Path, metavar="FILE",
                        help="a store that was made so before; a copy of it is used")  # fmt: skip
    parser.add_argument("--apart", action="store_true", help="old rows go one by one")
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aurora-pruning-")))
        path = folder / "aurora.db"
        if given.made is None:
            dashboard_data.build(path, given.events, VERSIONS, DAYS, ended=ENDED)
        else:
            shutil.copyfile(given.made, path)
        url: str | None = f"sqlite:///{path}"
        if given.database == "postgresql":
            url = stack.enter_context(postgres(None))
            if url is None:
                raise SystemExit("pruning: PostgreSQL needs the package pgserver")
            engine = store.connect(url)
            copy(path, engine, DAYS + ENDED)
            engine.dispose()
            path.unlink()
        rows = measure(url, given, str(folder / "artifacts"))
    title = f"Ingest while {given.events:,} events are pruned (aim: p99 under 1,000 ms)"
    report(title, rows, as_json=given.json, keep="pruning" if given.keep else "")


if __name__ == "__main__":
    main()
