"""The store goes away for two minutes in the middle of everything: what is lost?

A real server with a drafter, PostgreSQL (from the package pgserver), traffic, and a scheduler that
trains and promotes by itself. While a training run is going on PostgreSQL is stopped as by a power
cut, and started again later. Every answer is held against its rows: as many verify steps as SGLang
itself counted. Aim: 0 failed requests, every step stored or counted as dropped, and after the
outage a run succeeds and a version goes live by itself.

    python benchmarks/outage.py [--seconds 120] [--patience 900] [--no-training] [--json]
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.store import queries
from benchmarks.servers import arguments, report, server, target

STREAMS, TOKENS = 2, 64
#: The scheduler's rules: small runs, close together.
RULES = {
    "AURORA_SCHEDULER_REQUESTS": "24",
    "AURORA_SCHEDULER_MINUTES": "0",
    "AURORA_SCHEDULER_COOLDOWN_MINUTES": "0.1",
    "AURORA_SCHEDULER_WAIT_FOR_WATCH": "false",
    "AURORA_SCHEDULER_RECIPE": '{"passes": 1, "window": 60, "gate_share": 0.25}',
}
#: Seconds that a run has been going on when the store goes away: past reading its requests.
INTO_THE_RUN = 8.0
#: Seconds that the sidecar has to bring the last records after the traffic.
DRAIN_SECONDS = 120.0


class Postgres:
    """A server of our own that can be cut off and brought back."""

    def __init__(self, folder: Path) -> None:
        import pgserver

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pgserver's platformdirs warns about XDG_RUNTIME_DIR
            self._server = pgserver.get_server(folder, cleanup_mode="stop")
        self.folder = folder
        self.url = self._server.get_uri().replace("postgresql://", "postgresql+psycopg://")

    def stop(self) -> None:
        from pgserver._commands import pg_ctl

        pg_ctl(["-w", "-m", "immediate", "stop"], pgdata=self.folder,
               user=self.folder.owner(), timeout=60)  # fmt: skip

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def close(self) -> None:
        self._server.cleanup()


@contextmanager
def postgres() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="aurora-bench-pg-") as folder:
        os.chmod(folder, 0o755)  # run as root, PostgreSQL is another user
        found = Postgres(Path(folder) / "data")
        try:
            yield found
        finally:
            found.close()


#: Verify steps of a request in SGLang's answer; not there when prefill alone made the answer.
STEPS = "spec_verify_ct"


@dataclass
class Answer:
    rid: str
    at: float  # time.monotonic() when it had come
    verify_steps: int  # as SGLang counts them
    asked: float  # time.monotonic() too


@dataclass
class Traffic:
    """Streams that ask without a pause."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    failures: list[tuple[float, float]] = field(default_factory=list)  # asked, failed
    _ending: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        prompts = [prompt for prompt in sample_prompts() if not prompt.held_out]
        for number in range(STREAMS):
            mine = itertools.cycle(prompts[number::STREAMS])
            thread = threading.Thread(target=self._ask, args=(mine,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    @property
    def failed(self) -> int:
        return len(self.failures)

    def _ask(self, prompts: Iterator[Any]) -> None:
        while not self._ending.is_set():
            prompt, rid, asked = next(prompts), uuid.uuid4().hex, time.monotonic()
            body = {
                "text": prompt.prompt,
                "rid": rid,
                "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS},
            }
            headers = {"x-aurora-domain": prompt.domain}
            try:
                answer = httpx.post(f"{self.url}/generate", json=body, headers=headers, timeout=120)
                answer.raise_for_status()
                info = answer.json()["meta_info"]
            except httpx.HTTPError:
                self.failures.append((asked, time.monotonic()))
                self._ending.wait(0.5)
                continue
            self.answers.append(Answer(rid, time.monotonic(), info.get(STEPS, 0), asked))

    def between(self, begun: float, ended: float) -> int:
        return sum(begun <= answer.at < ended for answer in self.answers)


@contextmanager
def scheduler(home: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """``aurora-sgl scheduler`` beside the server."""
    environment = {**os.environ, **RULES, "AURORA_HOME": str(home), "AURORA_DATABASE_URL": url}
    with (home / "logs" / "scheduler.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "aurora_sgl.cli", "scheduler"],
            env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def wait(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.5)
    raise SystemExit(f"{what} did not happen within {seconds:.0f} s")


def stored(engine: Engine, answer: Answer) -> int | None:
    """Rows of an answer's verify steps; ``None``: the store does not have its end yet."""
    with store.session(engine, write=False) as s:
        rows = queries.requests.requests_by_rid(s, answer.rid)
        if not rows or rows[0].status == "running":
            return None
        assert rows[0].verify_steps == answer.verify_steps, (rows[0].id, answer)
        return len(queries.events.events(s, rows[0].id))


def wait_for_rows(engine: Engine, answers: list[Answer]) -> float:
    """Seconds until the last of them was there, ``DRAIN_SECONDS`` at most."""
    begun, left = time.monotonic(), list(answers)
    while left and time.monotonic() - begun < DRAIN_SECONDS:
        left = [answer for answer in left if stored(engine, answer) is None]
        time.sleep(0.2)
    return time.monotonic() - begun


def run_that_goes_on(engine: Engine, group_id: int) -> int | None:
    with store.session(engine, write=False) as s:
        last = queries.runs.runs(s, group_id, limit=1)
    if not last or last[0].status != "running":
        return None
    age = (utc_now() - last[0].started_at).total_seconds()
    return last[0].id if age > INTO_THE_RUN else None


def went_on(engine: Engine, group_id: int, since: datetime) -> tuple[int, int] | None:
    """(runs that succeeded, promotions by the scheduler) since then, once there are both."""
    with store.session(engine, write=False) as s:
        runs = [
            run for run in queries.runs.runs(s, group_id, limit=50)
            if run.status == "succeeded" and run.finished_at and run.finished_at > since
        ]  # fmt: skip
        live = [
            row for row in queries.deployments.deployments(s, group_id, limit=50)
            if row.actor == "scheduler" and row.action == "promote" and row.created_at > since
        ]  # fmt: skip
    return (len(runs), len(live)) if runs and live else None


def outage(url: str, database: Postgres, given: Any, home: Path) -> dict[str, Any]:
    """Traffic, the outage, what came after it, and the count."""
    engine = store.connect(database.url)
    group_id = wait(lambda: _group(engine), 60, "the server in the store")
    traffic = Traffic(url)
    traffic.start()
    run_id = None
    if given.training:
        run_id = wait(lambda: run_that_goes_on(engine, group_id), given.patience, "a training run")
        print(f"run {run_id} is going on; the store goes away", file=sys.stderr)
    else:
        wait(lambda: len(traffic.answers) >= 2 * STREAMS, 300, "answers")
    begun = time.monotonic()
    database.stop()
    time.sleep(given.seconds)
    healthy = httpx.get(f"{url}/health", timeout=60).status_code == 200
    spooled = sum(file.stat().st_size for file in home.rglob("*.spool"))
    since = utc_now()
    database.start()
    ended = time.monotonic()
    meanwhile = [answer for answer in traffic.answers if begun <= answer.at < ended]
    print(f"the store is back, {len(meanwhile)} answers were given meanwhile", file=sys.stderr)
    caught_up = wait_for_rows(engine, meanwhile)
    runs = promotions = 0
    if given.training:
        runs, promotions = wait(
            lambda: went_on(engine, group_id, since), given.patience, "a promotion by itself"
        )
    traffic.stop()
    wait_for_rows(engine, traffic.answers)
    counts = [stored(engine, answer) or 0 for answer in traffic.answers]
    made = sum(answer.verify_steps for answer in traffic.answers)
    with store.session(engine, write=False) as s:
        drops = queries.drops.drops(s, group_id)
        interrupted = next(
            (r for r in queries.runs.runs(s, group_id, limit=50) if r.id == run_id), None
        )
    engine.dispose()
    dropped = sum(count for place, count in drops.items() if place != "trace")
    row = {
        "seconds away": ended - begun,
        "answers": len(traffic.answers),
        "meanwhile": len(meanwhile),
        "failed": traffic.failed + (not healthy),
        "verify steps made": made,
        "stored": sum(counts),
        "counted drops": dropped,
        "unexplained": made - sum(counts) - dropped,
        "spooled KiB": spooled // 1024,
        "caught up s": caught_up,
    }
    if given.training:
        row |= {
            "run in the middle": interrupted.status if interrupted else "gone",
            "runs after": runs,
            "promotions after": promotions,
        }
    return row


def _group(engine: Engine) -> int | None:
    with store.session(engine, write=False) as s:
        for group in queries.groups.groups(s):
            if any(row.live_version_id for row in queries.servers.servers(s, group.id)):
                return int(group.id)
    return None


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    parser.add_argument("--seconds", type=float, default=120.0, help="that the store is away")
    parser.add_argument("--patience", type=float, default=900.0, help="for what has to come")
    parser.add_argument("--no-training", dest="training", action="store_false")
    given = parser.parse_args()
    model = target(given)
    with (
        postgres() as database,
        server(
            model, given.drafter, environment={"AURORA_SPECULATION": "on"},
            database_url=database.url,
        ) as (process, home),
    ):  # fmt: skip
        if given.training:
            with scheduler(home, database.url):
                row = outage(process.url, database, given, home)
        else:
            row = outage(process.url, database, given, home)
    title = "the store is away (aim: 0 failed, 0 unexplained, the loop goes on)"
    report(title, [row], as_json=given.json, keep="outage" if given.keep else "")
    return 0 if not row["failed"] and not row["unexplained"] else 1


if __name__ == "__main__":
    sys.exit(main())
