"""A sidecar and a scheduler as processes, with something of everything that their metrics tell.

Every text that may not be in the metrics has ``MARK`` in it; tokens are numbers of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgspec
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from aurora_sgl import rollout, store, wire
from aurora_sgl.clock import utc_now
from aurora_sgl.store import queries
from tests.support import store_samples as samples
from tests.support.sidecar_engine import Engine, Sidecar, wait_until

BOOT = 77
DOMAIN, CODE = "a domain of the client's", "failed: capture"
MARK, TOKEN = "kept from readers", 48_611_077
#: What an engine says of itself, see ``engine.agent``; ``capture_share`` as the sidecar wants it.
HEARTBEAT = {
    "running_requests": 3.0, "queue": 2.0, "step_ms": 21.5, "failures": 1.0, "parts_down": 0.0,
    "dropped_odd": 0.0, "unstamped": 1.0, "unreadable_consent": 0.0, "capture_share": 1.0,
    "traces_admitted": 9.0, "traces_refused": 2.0, "dropped_traces": 1.0,
    "trace_bytes_reserved": 4096.0, "trace_bytes_held": 1024.0, "capture_scale": 0.5,
    "plain_steps": 10.0, "speculative_steps": 90.0,
    "step_ms_plain": 20.0, "step_ms_spec": 26.0, "gain": 1.6, "gain_1": 1.6, "gain_4": 1.2,
    "break_even_1": 1.3, "break_even_4": 1.5,
    "tree_share_1_3_8": 0.75, "tree_length_1_3_8": 1.9, "tree_explored_1": 5.0,
}  # fmt: skip


class MetricsHouse:
    """``sidecar_url`` and ``scheduler_url`` answer ``/metrics``. Close it."""

    def __init__(self, home: Path, endpoint: Path) -> None:
        """``home`` has a store at the newest schema."""
        self._stack, self._number, self._live = ExitStack(), 0, 0
        try:
            self._open(home, endpoint)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._stack.close()

    def _open(self, home: Path, endpoint: Path) -> None:
        sidecar = Sidecar(home, endpoint, health_port=0)
        self._stack.callback(sidecar.stop)
        self.engine = Engine(endpoint, BOOT, name=f"server {MARK}", target_model=f"target {MARK}")
        self._stack.callback(self.engine.close)
        self.engine.notices = {CODE: f"a line, {MARK}"}
        self.engine.counters |= HEARTBEAT
        self.serve()
        self.engine.run()
        sidecar.wait_ready()
        self.sidecar_url = wait_until(lambda: address_in(sidecar.log), 30, "the sidecar's address")
        for what in (f'domain="{DOMAIN}"', "sidecar_notice{"):
            wait_until(lambda: what in metrics(self.sidecar_url), 60, what)  # noqa: B023
        self._url = f"sqlite:///{home / 'aurora.db'}"
        self._fill()
        log = home / "scheduler.log"
        scheduler = subprocess.Popen(
            [sys.executable, "-m", "aurora_sgl.cli", "scheduler"],
            env={**{k: v for k, v in os.environ.items() if not k.startswith("AURORA_")},
                 "AURORA_HOME": str(home), "AURORA_SCHEDULER_PORT": "0"},
            stdout=log.open("wb"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._stack.callback(scheduler.wait, 30)
        self._stack.callback(scheduler.terminate)
        self.scheduler_url = wait_until(lambda: address_in(log), 60, "the scheduler's address")
        wait_until(self._tells_of_the_group, 60, "the group's metrics")

    def _tells_of_the_group(self) -> bool:
        text = metrics(self.scheduler_url)
        return f'domain="{DOMAIN}"' in text and f"aurora_live_version {self._live}.0" in text

    def keep_serving(self, pause: float = 0.5) -> None:
        """Until it is closed."""
        ending = threading.Event()

        def serve() -> None:
            while not ending.wait(pause):
                self.serve()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self._stack.callback(thread.join, 10)
        self._stack.callback(ending.set)

    def serve(self, requests: int = 3) -> None:
        """Requests of a client, whose every text has the mark, with a swap between two steps."""
        self.engine.counters["plain_steps"] += 1.0
        self.engine.counters["speculative_steps"] += 9.0
        for _ in range(requests):
            self._number += 1
            number, now, tokens = self._number, wire.now_us(), [TOKEN, TOKEN + 1, TOKEN + 2]
            start = samples.started(number, domain=DOMAIN, at_us=now, boot_id=BOOT)
            steps = [
                samples.chain_step(number, step, 1 + step, at_us=now + 1000 * (1 + step),
                                   swap_age=age, version_id=self._live, boot_id=BOOT)
                for step, age in enumerate((90, 0))
            ]  # fmt: skip
            texts = {"draft_tokens": tokens, "target_tokens": [*tokens, TOKEN]}
            self.engine.send(
                msgspec.structs.replace(start, rid=f"rid {MARK}", conversation_hash=f"c {MARK}",
                                        sampling={"stop": MARK}),
                *(msgspec.structs.replace(step, **texts) for step in steps),
                samples.finished(number, steps, at_us=now + 3000, boot_id=BOOT),
            )  # fmt: skip
        self.engine.send(wire.SwapDone(BOOT, wire.now_us(), self._live, True, "", "", 500.0, 2.0))

    def lose(self, records: int) -> None:
        """At the engine's full buffer, as it says."""
        self.engine.dropped += records

    def promote(self, letter: str, *, replayed: float = 2.5) -> int:
        """A new version that passed the gate; its id."""
        engine = store.connect(self._url)
        try:
            with store.session(engine) as s:
                (group,) = queries.groups.groups(s)
                version = samples.add_version(s, group.id, letter, note=MARK,
                                              target_model=group.target_model)  # fmt: skip
                queries.evaluations.add_evaluation(
                    s, candidate_id=version, baseline_id=None, kind="replay", requests=50,
                    verdict="pass", candidate_accept_length=replayed, details={"reason": MARK},
                )  # fmt: skip
            rollout.promote(
                engine, version, actor=f"ada {MARK}", reason=f"because {MARK}", force=True
            )
        finally:
            engine.dispose()
        self._live = version
        return version

    def _fill(self) -> None:
        """What operators and runs write has the mark too, once the store has the requests."""
        engine = store.connect(self._url)
        try:
            wait_until(lambda: _stored(engine) == 3, 30, "the requests in the store")
            with store.session(engine) as s:
                (group,) = queries.groups.groups(s)
                for status in ("succeeded", "failed", "failed"):
                    run = queries.runs.start_run(s, group.id, trigger="drift")
                    error = f"no {MARK}" if status == "failed" else ""
                    queries.runs.finish_run(s, run.id, status, error=error)
                (server,) = queries.servers.servers(s, group.id)
                queries.servers.touch_server(s, server.id, last_error=f"error {MARK}")
                queries.drops.add_drops(s, server.id, "engine", 2)
                self._notify(s, group.id)
        finally:
            engine.dispose()
        self.promote("a")

    @staticmethod
    def _notify(s: Session, group_id: int) -> None:
        """A receiver did not take what it was sent."""
        queries.notifications.add_notification(
            s, group_id, event_key="x", kind="promotion", severity="info", title=MARK, text=MARK,
            happened_at=utc_now(), details={}, targets=["webhook"],
        )  # fmt: skip
        ((row, _),) = queries.notifications.notifications(s, group_id)
        queries.notifications.end_attempt(
            s, row.id, "webhook", state="waiting", next_try_at=utc_now(), error=f"no {MARK}"
        )


def metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics", timeout=5).text


def address_in(log: Path) -> str:
    """Of a process's endpoint, from its log; "" before it is there."""
    lines = [line for line in log.read_text().splitlines() if "health and metrics at" in line]
    return lines[0].split()[-1] if lines else ""


def _stored(engine: Store) -> int:
    with store.reading(engine) as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM request").scalar_one())
