"""A store of months: made-up traffic in bulk, with roll-ups that agree with its events.

Versions go live one after the other and slowly get better, one in ten a little worse (and is
rolled back); requests of five domains with a daily rhythm on two servers. Rows are written below
SQLAlchemy, in the order of their keys: about 50,000 events a second.

    python -m benchmarks.dashboard_data /tmp/months/aurora.db --events 10000000 --versions 200
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine

from aurora_sgl import store, wire
from aurora_sgl.clock import utc_now
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.models import (
    AcceptanceEvent,
    AcceptanceMinute,
    Request,
    RequestTally,
    Server,
)
from aurora_sgl.store.packing import pack_ints
from aurora_sgl.store.rollup import CLUSTER_SUMS, CLUSTERS

DOMAINS = ("chat", "code", "extraction", "sql", "translation")
GAINS = np.array([0.0, 0.06, 0.12, 0.04, -0.05])  # of the chance of acceptance, by domain
SHARES = np.array([0.4, 0.3, 0.12, 0.1, 0.08])
SERVERS, DEPTH, TOPK, NODES = 2, 3, 4, 8
STEPS, STEP_MS = 50, 80
MEAN_STEPS = 49  # a little less than what requests have, so that there are events enough
DAYS = 30
PARENTS = pack_ints([0, 0, 0, 0, 1, 5, 6])
PATHS = [pack_ints(path) for path in ([], [1], [1, 5], [1, 5, 6])]
FORMAT = "%Y-%m-%d %H:%M:%S.%f"


def build(
    path: Path, events: int, versions: int, days: int = DAYS, seed: int = 0, ended: int = 0
) -> None:
    """Make a new SQLite store at ``path``; what lies there is replaced. Its traffic ended so many
    days ago."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    engine = store.connect(f"sqlite:///{path}")
    store.upgrade(engine)
    engine.dispose()
    db = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=OFF", "cache_size=-262144"):
        db.execute(f"PRAGMA {pragma}")
    now = utc_now().replace(second=0, microsecond=0) - timedelta(days=ended)
    begin = now - timedelta(days=days)
    history = History(begin, now, versions, np.random.default_rng(seed))
    db.execute("BEGIN")
    history.write(db)
    db.execute("COMMIT")
    requests = max(1, -(-events // MEAN_STEPS))
    done = 0
    for numbers in np.array_split(np.arange(1, requests + 1), max(1, requests // 4000)):
        db.execute("BEGIN")
        done += write_requests(db, history, numbers, requests)
        db.execute("COMMIT")
    print(f"{done:,} events, {requests:,} requests, {versions} versions in {path}", file=sys.stderr)
    db.execute("ANALYZE")
    db.close()


def multiply(engine: Engine, times: int) -> None:
    """The same traffic on so many times as many servers, in either database."""
    shift = {"server_id": SERVERS, "request_id": SERVERS << wire.REQUEST_COUNTER_BITS}
    shifts = {
        Server: {"id": shift["server_id"], "boot_id": shift["server_id"]},
        Request: {"id": shift["request_id"], "server_id": shift["server_id"]},
        RequestTally: {"request_id": shift["request_id"]},
        AcceptanceEvent: {"request_id": shift["request_id"]},
        AcceptanceMinute: {"server_id": shift["server_id"]},
    }
    first = {
        Server: f"id <= {SERVERS}",
        Request: f"server_id <= {SERVERS}",
        AcceptanceMinute: f"server_id <= {SERVERS}",
        RequestTally: f"request_id < {wire.request_id(SERVERS + 1, 1)}",
        AcceptanceEvent: f"request_id < {wire.request_id(SERVERS + 1, 1)}",
    }
    by_time = [index for index in AcceptanceEvent.__table__.indexes if is_sqlite(engine)]
    for index in by_time:  # written anew at the end: each copy would touch every page of it
        index.drop(engine, checkfirst=True)
    for number in range(1, times):
        for table, columns in shifts.items():
            names = [column.name for column in table.__table__.columns]
            values = [f"{n} + {number * columns[n]}" if n in columns else n for n in names]
            with engine.begin() as connection:
                connection.exec_driver_sql(
                    f"INSERT INTO {table.__tablename__} ({', '.join(names)}) "
                    f"SELECT {', '.join(values)} FROM {table.__tablename__} WHERE {first[table]}"
                )
        print(f"{number + 1} of {times} times the traffic", file=sys.stderr, flush=True)
    for index in by_time:
        index.create(engine, checkfirst=True)


class History:
    """Which version was live when, and how good it was."""

    def __init__(
        self, begin: datetime, end: datetime, versions: int, rng: np.random.Generator
    ) -> None:
        self.begin, self.end, self.rng = begin, end, rng
        self.count = versions
        self.every = (end - begin) / versions
        ids = np.arange(versions)
        self.quality = 0.25 + 0.35 * (1 - np.exp(-ids / (0.4 * versions)))
        self.bad = (ids % 10 == 9) & (ids > 0)
        self.quality[self.bad] -= 0.08

    def live_at(self, moment: datetime) -> int:
        """Version id; a bad one is live for the first third of its time."""
        at = (moment - self.begin) / self.every
        index = min(self.count - 1, max(0, int(at)))
        if self.bad[index] and at - index > 1 / 3:
            index -= 1
        return index + 1

    def write(self, db: sqlite3.Connection) -> None:
        insert(db, "deployment_group", [dict(
            id=1, name="default", target_model="models/target", target_revision="",
            draft_architecture="LlamaForCausalLMEagle3", generation=0,
            created_at=text(self.begin))])  # fmt: skip
        rows: list[dict[str, Any]] = []
        runs, evaluations, deployments = [], [], []
        live = previous = None
        for index in range(self.count):
            version, at = index + 1, self.begin + index * self.every
            better = float(self.quality[index])
            before = float(self.quality[index - 1]) if index else 0.0
            rows.append(dict(
                id=version, group_id=1, parent_id=live, created_at=text(at),
                architecture="LlamaForCausalLMEagle3", weights_uri=f"versions/{version:016x}/",
                weights_sha256=f"{version:064x}", vocab_sha256="0" * 64, draft_vocab_size=8192,
                target_model="models/target", target_revision="", source="train",
                training_run_id=version if index else None,
                note="forward_kl on 200 requests", config="{}", metrics="{}",
                pinned=int(index % 25 == 0)))  # fmt: skip
            if index:
                runs.append(run(version, live, at))
                evaluations.append(evaluation(version, live, at, before, better))
            deployments.append(deployment(
                len(deployments) + 1, "promote", version, live, at,
                "replay on held-out requests", version - 1 if index else None))  # fmt: skip
            previous, live = live, version
            if self.bad[index]:
                deployments.append(deployment(
                    len(deployments) + 1, "rollback", previous, live, at + self.every / 3,
                    "watch: accept length below the margin", None))  # fmt: skip
                live = previous
        insert(db, "drafter_version", rows)
        insert(db, "training_run", runs)
        insert(db, "evaluation", evaluations)
        insert(db, "deployment", deployments)
        db.execute("UPDATE deployment_group SET generation = ?", [len(deployments)])
        insert(db, "alias", [
            dict(group_id=1, name=name, version_id=version, updated_at=text(self.end))
            for name, version in (("live", live), ("previous", previous)) if version])  # fmt: skip
        counters = {"step_ms_plain": 20.0, "step_ms_spec": 26.0}
        counters |= {f"step_ms_{group}_0_1": 20.0 for group in (1, 2, 4)}
        counters |= {f"step_ms_{group}_{DEPTH}_{NODES}": 26.0 for group in (1, 2, 4)}
        insert(db, "server", [dict(
            id=n, group_id=1, name=f"gpu-{n}:30000", boot_id=n, sglang_version="0.5.21",
            boot_version_id=1, live_version_id=live, live_sha256=f"{live:064x}", state="running",
            dtype="bfloat16", phase="speculating", phase_reason="it is faster", speculation_share=1,
            counters=json.dumps(counters), last_error="",
            started_at=text(self.begin), last_seen_at=text(self.end))
            for n in range(1, SERVERS + 1)])  # fmt: skip


def run(version: int, base: int | None, at: datetime) -> dict[str, Any]:
    curve = [{"tokens": 2000 * i, "loss": 9 - 0.3 * i, "accept_length": 1 + 0.07 * i,
              "reward": 0.05 * i} for i in range(12)]  # fmt: skip
    return dict(
        id=version, group_id=1, trigger="requests", status="succeeded",
        started_at=text(at - timedelta(minutes=4)), finished_at=text(at), base_version_id=base,
        window_start=text(at - timedelta(hours=4)), window_end=text(at), requests=200,
        tokens=24000, objective="forward_kl", config="{}", metrics=json.dumps({"curve": curve}),
        error="")  # fmt: skip


def evaluation(
    version: int, base: int | None, at: datetime, before: float, better: float
) -> dict[str, Any]:
    a, b = 1 + 3 * before * 0.6, 1 + 3 * better * 0.6
    return dict(
        id=version - 1, candidate_id=version, baseline_id=base, created_at=text(at), kind="replay",
        domain="", depth=DEPTH, topk=TOPK, nodes=NODES, requests=120, candidate_accept_length=b,
        baseline_accept_length=a, difference=b - a, ci_low=b - a - 0.04, ci_high=b - a + 0.04,
        verdict="pass", details="{}")  # fmt: skip


def deployment(
    generation: int, action: str, version: int | None, before: int | None, at: datetime,
    reason: str, evaluation_id: int | None,
) -> dict[str, Any]:  # fmt: skip
    return dict(
        id=generation, group_id=1, generation=generation, action=action, version_id=version,
        previous_version_id=before, actor="scheduler", reason=reason, evaluation_id=evaluation_id,
        created_at=text(at), before=json.dumps({"live": before}),
        after=json.dumps({"live": version}), evidence="{}")  # fmt: skip


def write_requests(
    db: sqlite3.Connection, history: History, numbers: Sequence[int], total: int
) -> int:
    rng, span = history.rng, (history.end - history.begin).total_seconds()
    requests, tallies, minutes, events = [], [], {}, []
    for number in (int(n) for n in numbers):
        at = history.begin + timedelta(seconds=span * (number - 1) / total)
        server = 1 + number % SERVERS
        domain = int(rng.choice(len(DOMAINS), p=SHARES))
        version = history.live_at(at)
        chance = float(np.clip(history.quality[version - 1] + GAINS[domain], 0.02, 0.95))
        steps = int(rng.integers(STEPS // 2, STEPS * 3 // 2))
        accepted = np.minimum(rng.geometric(1 - chance, steps) - 1, DEPTH)
        request_id = wire.request_id(server, number)
        busy = 1 + number % 4
        for minute, row in rolled(at, accepted):
            key = (minute, server, version, DOMAINS[domain], 1 << (busy - 1).bit_length())
            add(minutes, key, row)
        drawn = rng.integers(0, 49_152, (steps, NODES * 2 - 1), dtype=np.int32)
        events += event_rows(request_id, at, version, busy, accepted, drawn)
        total_accepted = int(accepted.sum())
        tallies.append((request_id, version, DEPTH, TOPK, NODES, 0, steps, total_accepted))
        end = at + timedelta(milliseconds=STEP_MS * steps)
        requests.append(dict(
            id=request_id, rid=f"r{number}", server_id=server, dp_rank=0, admitted_at=text(at),
            finished_at=text(end), status="finished", domain=DOMAINS[domain],
            conversation_hash="", prompt_tokens=60, cached_tokens=0,
            completion_tokens=1 + steps + total_accepted, verify_steps=steps,
            proposed=steps * (NODES - 1), accepted=total_accepted, retractions=0, sampling="{}",
            finish_reason="stop", may_train=1, traced=0, speculates=1))  # fmt: skip
    insert(db, "request", requests)
    # Two servers count their requests alike, so their keys are written one server after another.
    events.sort(key=lambda row: (row["request_id"], row["step"]))
    insert(db, "acceptance_event", events)
    db.executemany(
        "INSERT INTO request_tally (request_id, drafter_version_id, depth, topk, nodes, mixed, "
        "verify_steps, accepted) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        tallies,
    )
    write_minutes(db, minutes)
    return len(events)


def event_rows(
    request_id: int, at: datetime, version: int, busy: int, accepted: Any, drawn: Any
) -> list[dict[str, Any]]:
    rows, position = [], 61
    for step, count in enumerate(accepted.tolist()):
        moment = text(at + timedelta(milliseconds=STEP_MS * step))
        rows.append(dict(
            request_id=request_id, step=step, at=moment, drafter_version_id=version,
            swap_age=100 + step, mixed=0, position=position, depth=DEPTH, topk=TOPK, nodes=NODES,
            accept_rule="greedy", batch_size=busy, proposed=NODES - 1, accepted=count,
            kept=count + 1, first_rejected_at=0 if count == DEPTH else count + 1,
            draft_tokens=drawn[step, : NODES - 1].tobytes(), draft_parents=PARENTS,
            accepted_nodes=PATHS[count], target_tokens=drawn[step, NODES - 1 :].tobytes(),
        ))  # fmt: skip
        position += count + 1
    return rows


def rolled(at: datetime, accepted: Any) -> Iterator[tuple[str, list[Any]]]:
    """What one request adds to its minutes: (minute, sums in the order of ``SUMS``, histogram)."""
    first = at.replace(second=0, microsecond=0)
    offset = (at - first).total_seconds()
    index = ((offset + np.arange(len(accepted)) * STEP_MS / 1000) // 60).astype(int)
    n = y = 0
    for minute in np.unique(index):
        part = accepted[index == minute]
        n1, y1 = n + len(part), y + int(part.sum())
        yield text(first + timedelta(minutes=int(minute))), [
            len(part), len(part) * (NODES - 1), y1 - y, int(n == 0), len(part) + y1 - y,
            n1 * n1 - n * n, y1 * y1 - y * y, n1 * y1 - n * y,
            np.bincount(part, minlength=DEPTH + 1),
        ]  # fmt: skip
        n, y = n1, y1


SUMS = (
    "verify_steps", "proposed", "accepted", "requests", "completion_tokens", "sum_steps_squared",
    "sum_accepted_squared", "sum_steps_accepted",
)  # fmt: skip
#: Over all draft shapes, and with mixed steps: of one draft shape and without those the same.
WIDER = [prefix + name for prefix in CLUSTERS[1:] for name in CLUSTER_SUMS]


def add(minutes: dict[Any, list[Any]], key: Any, row: list[Any]) -> None:
    old = minutes.get(key)
    minutes[key] = row if old is None else [a + b for a, b in zip(old, row, strict=True)]


def write_minutes(db: sqlite3.Connection, minutes: dict[Any, list[Any]]) -> None:
    rows = []
    for key in sorted(minutes):
        minute, server, version, domain, bucket = key
        *sums, histogram = minutes[key]
        reached = histogram[::-1].cumsum()[::-1][1:]
        rows.append((
            minute, server, version, domain, DEPTH, TOPK, NODES, "greedy", bucket, 0, *sums,
            *[sums[SUMS.index(name)] for _ in CLUSTERS[1:] for name in CLUSTER_SUMS],
            json.dumps(histogram.tolist()), json.dumps(reached.tolist()),
        ))  # fmt: skip
    columns = (*SUMS, *WIDER)
    grow = ", ".join(f"{name} = {name} + excluded.{name}" for name in columns)
    # A minute that two transactions share keeps the histogram of the first: a few in a million.
    db.executemany(
        "INSERT INTO acceptance_minute (bucket_start, server_id, drafter_version_id, domain, "
        f"depth, topk, nodes, accept_rule, batch_bucket, mixed, {', '.join(columns)}, histogram, "
        f"per_position) VALUES ({', '.join('?' * 28)}) ON CONFLICT DO UPDATE SET {grow}",
        rows,
    )


def insert(db: sqlite3.Connection, table: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        names = list(rows[0])
        db.executemany(
            f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
            [tuple(row[name] for name in names) for row in rows],
        )


def text(moment: datetime) -> str:
    """As ``UtcDateTime`` writes it."""
    return moment.strftime(FORMAT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--versions", type=int, default=200)
    parser.add_argument("--days", type=int, default=DAYS)
    given = parser.parse_args()
    begun = time.monotonic()
    build(given.path, given.events, given.versions, given.days)
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
