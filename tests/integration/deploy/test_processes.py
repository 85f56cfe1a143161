"""Scheduler, dashboard and sidecar as systemd, Docker and Kubernetes see them: where they listen,
what they write, what their probes say, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from aurora_sgl.processes.server import free_port
from aurora_sgl.store.liveness import STALE_SECONDS
from dashboard.server import GRACE_SECONDS
from tests.support.sidecar_engine import Engine, wait_until

CLI = ("-m", "aurora_sgl.cli")
#: Seconds in which each ends on a machine that does nothing else, and one that does.
SOON = 60.0
PASSWORD = "of-the-store"
#: Nobody listens there.
AWAY = f"postgresql+psycopg://aurora:{PASSWORD}@127.0.0.1:1/aurora"


class Running:
    """A process of ours, its output in files."""

    def __init__(self, home: Path, name: str, *command: str, port: int = 0, host: str = "127.0.0.1",
                 **settings: object) -> None:  # fmt: skip
        home.mkdir(exist_ok=True)
        self.port, self.host = port, host
        self.stdout, self.stderr = home / f"{name}.out", home / f"{name}.err"
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("AURORA_")},
                    "AURORA_HOME": str(home),
                    **{f"AURORA_{key.upper()}": str(value) for key, value in settings.items()},
                },
                stdout=out, stderr=err, cwd=home,
            )  # fmt: skip

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; 0 where nobody answers."""
        try:
            answer = httpx.get(f"http://{self.host}:{self.port}{path}", timeout=10)
        except httpx.HTTPError:
            return 0, ""
        return answer.status_code, answer.text

    def probes(self) -> tuple[int, int, str]:
        """Of ``/readyz`` and ``/livez``, and why it is not ready."""
        ready, body = self.get("/readyz")
        return ready, self.get("/livez")[0], json.loads(body)["reason"] if body else "silent"

    def listens(self) -> set[tuple[str, int]]:
        connections = psutil.Process(self.process.pid).net_connections(kind="inet")
        return {(one.laddr.ip, one.laddr.port) for one in connections if one.status == "LISTEN"}

    def lines(self) -> list[str]:
        return self.stderr.read_text().splitlines()

    def end(self, number: signal.Signals) -> tuple[int, float]:
        """Its exit code, and how many seconds it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(SOON), time.monotonic() - began


def scheduler(home: Path, name: str, **settings: object) -> Running:
    port, host = free_port(), str(settings.pop("host", "127.0.0.1"))
    given = {"scheduler_port": port, "scheduler_host": host, **settings}
    return Running(home, name, *CLI, "scheduler", port=port, host=host, **given)


def sidecar(home: Path, name: str, **settings: object) -> Running:
    port, host = free_port(), str(settings.pop("host", "127.0.0.1"))
    given = {"health_port": port, "health_host": host, **settings}
    command = ("-m", "aurora_sgl.sidecar", "--endpoint", str(home / f"e-{name}"))
    return Running(home, name, *command, port=port, host=host, **given)


def dashboard(home: Path, name: str, **settings: object) -> Running:
    port, host = int(str(settings.pop("port", free_port()))), str(settings.pop("host", "127.0.0.1"))
    command = (*CLI, "dashboard", "--host", host, "--port", str(port))
    return Running(home, name, *command, port=port, host=host, **settings)


@dataclass
class Course:
    """What became of them."""

    #: By name of a process: those that log for machines, and work.
    well: dict[str, Running]
    #: Those that log for people on an address that was chosen, and whose store is of no use.
    away: dict[str, Running]
    #: Those that can't start.
    refused: dict[str, Running]
    listened: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    at_first: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    locked: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    locked_seconds: dict[str, float] = field(default_factory=dict)
    while_away: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    ended: dict[str, tuple[int, float]] = field(default_factory=dict)
    hung_seconds: float = 0.0


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory, upgraded_sqlite: Path) -> Iterator[Course]:
    """All at once, since each start takes seconds of a processor, and some waits do too."""
    home, other = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("other")
    shutil.copy(upgraded_sqlite, home / "aurora.db")
    machines = {"log_format": "json"}
    with ExitStack() as stack:
        well = {
            "scheduler": scheduler(home, "scheduler", **machines),
            "sidecar": sidecar(home, "sidecar", **machines),
            "dashboard": dashboard(home, "dashboard", **machines),
        }
        one = Course(well, {}, {})
        stack.callback(lambda: [_kill(each) for each in _all(one)])
        engine = Engine(home / "e-sidecar", 77)
        stack.callback(engine.close)
        engine.run()
        for name, process in well.items():
            path = "/_stcore/health" if name == "dashboard" else "/readyz"
            wait_until(lambda: process.get(path)[0] == 200, SOON, f"a ready {name}")  # noqa: B023
            one.listened[name] = process.listens()
        one.at_first = {name: well[name].probes() for name in ("scheduler", "sidecar")}
        with closing(sqlite3.connect(home / "aurora.db", isolation_level=None)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            _while_locked(one, other, time.monotonic())
            holder.execute("ROLLBACK")
        for name in ("scheduler", "sidecar"):
            wait_until(lambda: well[name].probes()[0] == 200, SOON, f"{name}, ready again")  # noqa: B023
            one.ended[name] = well[name].end(signal.SIGTERM)
        _while_away(one)
        for process in one.refused.values():
            process.process.wait(SOON)
        yield one


def _while_locked(one: Course, other: Path, began: float) -> None:
    """Meanwhile a client of the dashboard sends half a request, and the others start."""
    page = one.well["dashboard"]
    with socket.create_connection(("127.0.0.1", page.port)) as client:
        client.sendall(
            b"POST /session HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Aurora-Dashboard: 1\r\n"
            b"Content-Length: 10\r\n\r\nhalf"
        )
        time.sleep(0.5)
        asked = time.monotonic()
        page.process.terminate()
        one.away, one.refused = _others(other, one.well["scheduler"].port)
        while len(one.locked) < 2 and time.monotonic() - began < SOON:
            for name in ("scheduler", "sidecar"):
                probes = one.well[name].probes()
                if probes[0] == 503 and name not in one.locked:
                    one.locked[name] = probes
                    one.locked_seconds[name] = time.monotonic() - began
            time.sleep(0.2)
        code = page.process.wait(SOON)
        one.hung_seconds = time.monotonic() - asked
        one.ended["dashboard"] = code, one.hung_seconds


def _others(home: Path, taken: int) -> tuple[dict[str, Running], dict[str, Running]]:
    newer = home / "newer.db"
    with closing(sqlite3.connect(newer)) as db:
        db.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        db.execute("INSERT INTO alembic_version VALUES ('9999')")
        db.commit()
    chosen = {"host": "127.0.0.2", "database_url": AWAY}
    away = {
        "scheduler": scheduler(
            home / "a", "scheduler", host="127.0.0.2", database_url=f"sqlite:///{newer}"
        ),
        "sidecar": sidecar(home / "b", "sidecar", **chosen),
        "dashboard": dashboard(home / "b", "dashboard", **chosen),
    }
    machines = {"log_format": "json"}
    refused = {
        "scheduler": scheduler(home / "c", "scheduler", **machines, scheduler_port="lots"),
        "sidecar": sidecar(home / "d", "sidecar", **machines, spool_bytes="lots"),
        "dashboard": dashboard(home / "d", "dashboard", **machines, port=taken),
    }
    return away, refused


def _while_away(one: Course) -> None:
    for name, process in one.away.items():
        path, wanted = ("/_stcore/health", 200) if name == "dashboard" else ("/readyz", 503)
        wait_until(lambda: process.get(path)[0] == wanted, SOON, f"an answer of {name}")  # noqa: B023
        one.listened[f"away {name}"] = process.listens()
        if name != "dashboard":
            words = ("store", "database")
            wait_until(lambda: any(w in process.probes()[2] for w in words), SOON, "a reason")  # noqa: B023
            one.while_away[name] = process.probes()
    for name, process in one.away.items():
        one.ended[f"away {name}"] = process.end(signal.SIGINT)


def _all(one: Course) -> list[Running]:
    return [*one.well.values(), *one.away.values(), *one.refused.values()]


def _kill(one: Running) -> None:
    one.process.kill()
    one.process.wait()


# -- where they listen -------------------------------------------------------------------------


def test_each_listens_where_it_was_told_and_nowhere_else(course: Course) -> None:
    for name in ("scheduler", "sidecar", "dashboard"):
        assert course.listened[name] == {("127.0.0.1", course.well[name].port)}
        assert course.listened[f"away {name}"] == {("127.0.0.2", course.away[name].port)}


# -- what they write ---------------------------------------------------------------------------


def test_for_machines_each_line_is_an_object_and_nothing_else_is_written(course: Course) -> None:
    for process in (*course.well.values(), *course.refused.values()):
        records = [json.loads(line) for line in process.lines()]
        assert records and all(record["message"] and record["level"] for record in records)
        assert process.stdout.read_text() == ""
    said = [json.loads(line)["message"] for line in course.well["dashboard"].lines()]
    assert f"dashboard: http://127.0.0.1:{course.well['dashboard'].port}" in said
    assert not any("setup=" in line for line in said)  # a link that makes an operator


def test_for_people_each_fact_is_a_line(course: Course) -> None:
    for name, process in course.away.items():
        assert "Traceback" not in process.stderr.read_text(), name
        assert PASSWORD not in process.stderr.read_text(), name
    (line,) = [one for one in course.away["scheduler"].lines() if "the store is away" in one]
    assert line.endswith("use the release that made it, or a newer one")


# -- what their probes say ---------------------------------------------------------------------


def test_while_somebody_locks_the_store_they_are_not_ready_and_alive(course: Course) -> None:
    assert course.at_first == {"scheduler": (200, 200, ""), "sidecar": (200, 200, "")}
    assert set(course.locked) == {"scheduler", "sidecar"}
    for name, (ready, live, reason) in course.locked.items():
        assert (ready, live) == (503, 200) and reason, name
        # Within its limit, and a round and a look of ours on a busy machine.
        assert course.locked_seconds[name] < STALE_SECONDS + 15


def test_a_store_that_is_away_or_of_a_newer_release_is_waited_for(course: Course) -> None:
    assert course.while_away["scheduler"][:2] == (503, 200)
    assert "has schema 9999" in course.while_away["scheduler"][2]
    assert course.while_away["sidecar"][:2] == (503, 200)


# -- how they end ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "away "], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", ["scheduler", "sidecar", "dashboard"])
def test_it_ends_when_it_is_asked_to_with_exit_code_0(course: Course, name: str, how: str) -> None:
    code, seconds = course.ended[f"{how}{name}"]
    assert code == 0
    assert seconds < 40  # 20 of the scheduler, on a busy machine


def test_a_request_that_never_ends_holds_the_dashboard_up_for_a_while_only(course: Course) -> None:
    assert GRACE_SECONDS - 1 < course.hung_seconds < GRACE_SECONDS + 30
    (line,) = [one for one in course.well["dashboard"].lines() if "cut off" in one]
    assert json.loads(line)["level"] == "warning"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scheduler", "AURORA_SCHEDULER_PORT"),
        ("sidecar", "AURORA_SPOOL_BYTES"),
        ("dashboard", "--port"),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line_and_an_exit_code(
    course: Course, name: str, words: str
) -> None:
    process = course.refused[name]
    assert process.process.returncode == 1
    (line,) = process.lines()
    assert words in json.loads(line)["message"]
