"""A real sidecar process between the engine's sockets and a real store."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from aurora_sgl import wire
from aurora_sgl.errors import AuroraError
from aurora_sgl.sidecar.endpoint import address
from tests.support import store_samples as samples
from tests.support.sidecar_engine import Engine, Sidecar, end_all, wait_until

BOOT = 4242


@pytest.fixture
def started(home: Path) -> Iterator[list[Sidecar | Engine]]:
    """What a test starts; stopped after it."""
    running: list[Sidecar | Engine] = []
    yield running
    end_all(running)


def url_of(home: Path) -> str:
    return f"sqlite:///{home / 'aurora.db'}"


def count(url: str, table: str, where: str = "true") -> int:
    """-1 while the store has no such table yet."""
    rows = ask(url, f"SELECT count(*) FROM {table} WHERE {where}")
    return int(rows[0][0]) if rows else -1


def ask(url: str, query: str) -> list[tuple[Any, ...]]:
    """[] while the store can't say. A plain connection: an engine of ours for each of many looks
    costs more than what is looked at."""
    path = url.removeprefix("sqlite:///")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return connection.execute(query).fetchall()
    except sqlite3.Error:
        return []


def drops(url: str) -> dict[str, int]:
    """Counts by place; {} while the store has no such table yet."""
    return dict(ask(url, "SELECT place, count FROM drop_count"))


def serve(engine: Engine, number: int, steps: int = 3) -> None:
    """One request: its start, its steps one envelope each, its end."""
    engine.send(samples.started(number, boot_id=BOOT))
    made = [samples.chain_step(number, i, i % 4, boot_id=BOOT) for i in range(steps)]
    for step in made:
        engine.send(step)
    engine.send(samples.finished(number, made, boot_id=BOOT))


def test_records_reach_the_store_and_the_health_endpoint_says_so(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    (home / "aurora.db").unlink()  # on a new machine, where the sidecar makes the tables
    sidecar = Sidecar(home, endpoint)
    engine = Engine(endpoint, BOOT)
    started += [sidecar, engine]
    engine.run()
    for number in range(1, 21):
        serve(engine, number)
    url = url_of(home)
    wait_until(lambda: count(url, "request", "status = 'finished'") == 20)
    assert count(url, "acceptance_event") == 60
    wait_until(lambda: sidecar.get("/healthz")[0] == 200)
    metrics = sidecar.get("/metrics")[1]
    assert "aurora_sidecar_verify_steps_total 60.0" in metrics
    assert "aurora_sidecar_ready 1.0" in metrics
    assert re.search(r"health and metrics at http://127\.0\.0\.1:\d+", sidecar.text())
    wait_until(lambda: any(isinstance(c, wire.SetPhase) for c in engine.heard))
    wait_until(lambda: count(url, "server", "phase = 'exploring' AND state = 'running'") == 1)
    assert sidecar.stop() == 0
    assert count(url, "server", "state = 'stopped'") == 1
    assert drops(url) == {}


def test_a_killed_sidecar_loses_nothing_that_it_took_and_counts_what_was_under_way(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    sidecar = Sidecar(home, endpoint)
    engine = Engine(endpoint, BOOT)
    started += [sidecar, engine]
    url = url_of(home)
    engine.hello()
    engine.send(samples.started(1, boot_id=BOOT))
    wait_until(lambda: count(url, "request") == 1)
    sent = 0
    for _ in range(3):
        for _ in range(2000):
            engine.send(samples.chain_step(1, sent, 1, boot_id=BOOT))
            sent += 1
        sidecar.kill()
        sidecar.start()
    engine.send(samples.chain_step(1, sent, 1, boot_id=BOOT))
    sent += 1

    def settled() -> bool:
        events = count(url, "acceptance_event")
        return events + drops(url).get("transport", 0) == sent

    wait_until(settled, 30, "all steps in the store or counted")
    assert count(url, "acceptance_event", f"step = {sent - 1}") == 1
    assert count(url, "spool_watermark", f"last_seq = {engine.seq}") == 1
    steps, summed = 0, 0
    connection = sqlite3.connect(home / "aurora.db")
    (steps,) = connection.execute("SELECT verify_steps FROM request").fetchone()
    (summed,) = connection.execute("SELECT sum(verify_steps) FROM acceptance_minute").fetchone()
    assert steps == summed == count(url, "acceptance_event")


def test_a_spool_outlives_a_kill_while_the_store_is_locked(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    sidecar = Sidecar(home, endpoint)
    engine = Engine(endpoint, BOOT)
    started += [sidecar, engine]
    url = url_of(home)
    engine.hello()
    serve(engine, 1)
    wait_until(lambda: count(url, "acceptance_event") == 3)
    locker = sqlite3.connect(home / "aurora.db", isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    for number in range(2, 102):
        serve(engine, number)
    spool = home / "spool" / "0"
    size = wait_until(lambda: _settled_size(spool), 20, "a spool that holds it all")
    sidecar.kill()
    sidecar.start()
    sidecar.wait_ready()
    begun = time.monotonic()
    assert sidecar.stop() == 0
    assert time.monotonic() - begun < 12
    sidecar.start()
    sidecar.wait_ready()
    assert sum(path.stat().st_size for path in spool.glob("*.spool")) == size
    assert count(url, "acceptance_event") == 3
    locker.execute("ROLLBACK")
    wait_until(lambda: count(url, "acceptance_event") == 303, 45)
    assert count(url, "request", "status = 'finished'") == 101
    assert drops(url) == {}


def _settled_size(folder: Path) -> int:
    before = sum(path.stat().st_size for path in folder.glob("*.spool"))
    time.sleep(0.5)
    after = sum(path.stat().st_size for path in folder.glob("*.spool"))
    return after if before == after and after > 1000 else 0


def test_a_full_spool_drops_the_newest_and_the_store_learns_how_many(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    sidecar = Sidecar(home, endpoint, spool_bytes=1 << 16)
    engine = Engine(endpoint, BOOT)
    started += [sidecar, engine]
    url = url_of(home)
    engine.hello()
    engine.send(samples.started(1, boot_id=BOOT))
    wait_until(lambda: count(url, "request") == 1)
    locker = sqlite3.connect(home / "aurora.db", isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    for step in range(2000):
        engine.send(samples.chain_step(1, step, 1, boot_id=BOOT))
    wait_until(lambda: lost_at_spool(sidecar) > 0, 20, "a loss that is told while it happens")
    assert json.loads(sidecar.get("/health")[1])["lost"]["spool"] > 0
    wait_until(lambda: settled(sidecar), 20)
    locker.execute("ROLLBACK")
    wait_until(lambda: 0 < count(url, "acceptance_event") < 2000, 45)
    time.sleep(1.0)
    engine.send(samples.chain_step(1, 2000, 1, boot_id=BOOT))
    wait_until(lambda: count(url, "acceptance_event") + drops(url).get("spool", 0) == 2001)
    assert set(drops(url)) == {"spool"}
    assert lost_at_spool(sidecar) == drops(url)["spool"]
    assert "the spool is full" in sidecar.text()


def lost_at_spool(sidecar: Sidecar) -> int:
    found = re.search(r'lost_total{place="spool"} (\d+)', sidecar.get("/metrics")[1])
    return int(found[1]) if found else 0


def settled(sidecar: Sidecar) -> bool:
    """Whether the sidecar has taken all that was sent."""
    before = lost_at_spool(sidecar)
    time.sleep(0.5)
    return lost_at_spool(sidecar) == before


def test_what_the_engine_dropped_is_in_the_store_once(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    sidecar = Sidecar(home, endpoint)
    engine = Engine(endpoint, BOOT)
    started += [sidecar, engine]
    engine.dropped = 17
    for _ in range(3):
        engine.hello()
    url = url_of(home)
    wait_until(lambda: count(url, "server") == 1)
    wait_until(lambda: drops(url) == {"engine": 17})


def test_an_endpoint_or_a_spool_is_never_shared(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    sidecar = Sidecar(home, endpoint, "--spool", str(tmp_path / "s"))
    started.append(sidecar)
    sidecar.wait_ready()
    same_endpoint = Sidecar(tmp_path / "other", endpoint)
    same_spool = Sidecar(tmp_path / "third", tmp_path / "e3", "--spool", str(tmp_path / "s"))
    started += [same_endpoint, same_spool]
    assert same_endpoint.process.wait(30) == 1
    assert same_spool.process.wait(30) == 1
    pid = sidecar.process.pid
    assert f"another sidecar (process {pid}) uses the endpoint" in same_endpoint.text()
    assert f"another sidecar (process {pid}) uses the spool" in same_spool.text()
    assert sidecar.process.poll() is None


def test_a_socket_path_that_is_too_long_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="longer than 107 bytes"):
        address(tmp_path / ("x" * 100), "records")


def test_a_sidecar_ends_with_its_server_and_drains_first(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    home, endpoint = tmp_path / "home", tmp_path / "e"
    sidecar = Sidecar(home, endpoint, "--parent-pid", str(parent.pid))
    engine = Engine(endpoint, BOOT)
    started += [sidecar, engine]
    engine.hello()
    url = url_of(home)
    wait_until(lambda: count(url, "server") == 1)
    serve(engine, 1)
    engine.send(samples.started(2, boot_id=BOOT))
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    assert sidecar.process.wait(15) == 0
    assert count(url, "acceptance_event") == 3
    assert count(url, "request", "status = 'lost'") == 1
    assert count(url, "server", "state = 'stopped'") == 1


def test_a_server_of_another_target_is_not_recorded_in_the_group_and_its_row_says_why(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home = tmp_path / "home"
    url = url_of(home)
    first = Sidecar(home, tmp_path / "e1")
    one = Engine(tmp_path / "e1", BOOT)
    started += [first, one]
    one.hello()
    wait_until(lambda: count(url, "server") == 1)
    second = Sidecar(home, tmp_path / "e2")
    two = Engine(tmp_path / "e2", BOOT + 1, target_model="another", name="other:1")
    started += [second, two]
    two.hello()
    two.send(samples.started(1, boot_id=BOOT + 1))
    wait_until(lambda: count(url, "server", "last_error LIKE '%another%'") == 1)
    wait_until(lambda: drops(url).get("rejected", 0) >= 1)
    assert count(url, "server", "name = 'other:1' AND state = 'running'") == 0
    assert count(url, "request") == 0


def test_requests_of_a_dead_boot_are_lost_once_a_new_boot_is_there(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    url = url_of(home)
    sidecar = Sidecar(home, endpoint)
    old = Engine(endpoint, BOOT)
    started += [sidecar, old]
    old.hello()
    old.send(samples.started(1, boot_id=BOOT))
    wait_until(lambda: count(url, "request", "status = 'running'") == 1)
    wait_until(lambda: count(url, "server", "phase = 'exploring'") == 1)
    with sqlite3.connect(home / "aurora.db") as connection:
        connection.execute("UPDATE server SET last_seen_at = '2026-01-01 00:00:00.000000'")
    new = Engine(endpoint, BOOT + 1)
    started.append(new)
    new.run()
    wait_until(lambda: count(url, "request", "status = 'lost'") == 1)
    assert count(url, "server", f"state = 'gone' AND boot_id = {BOOT}") == 1


def test_traces_become_files_and_rows_within_their_budget(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    sidecar = Sidecar(home, endpoint, capture_bytes=12_000)
    engine = Engine(endpoint, BOOT)
    started += [sidecar, engine]
    engine.run()
    url = url_of(home)
    for number in range(1, 21):
        serve(engine, number)
        request_id = wire.request_id(BOOT, number)
        engine.trace(request_id, 0, list(range(4)), 0)
        engine.trace(request_id, 2, list(range(2, 12)), 10)
        engine.trace(request_id, 12, [12, 13], 1, final=True, step_starts=[4, 8])
    wait_until(lambda: count(url, "request", "traced") > 0)
    wait_until(lambda: "traces_written_total 20.0" in sidecar.get("/metrics")[1])
    connection = sqlite3.connect(home / "aurora.db")
    wait_until(
        lambda: (
            connection.execute("SELECT max(request_id) FROM trace").fetchone()[0]
            == wire.request_id(BOOT, 20)
        )
    )
    # Old traces go after new ones came: the budget holds a moment later.
    within = "SELECT sum(bytes) <= 12000 FROM trace"
    wait_until(lambda: connection.execute(within).fetchone()[0] == 1)
    rows = connection.execute('SELECT uri, bytes, start, "end", output_start FROM trace').fetchall()
    assert 0 < len(rows) < 20
    named = sorted(home / "artifacts" / row[0] for row in rows)
    wait_until(lambda: sorted((home / "artifacts").rglob("*.safetensors")) == named)
    files = named
    assert sum(row[1] for row in rows) <= 12_000
    assert sum(path.stat().st_size for path in files) == sum(row[1] for row in rows)
    assert {row[2:] for row in rows} == {(2, 13, 4)}
    tensors = load_file(files[-1])
    assert tensors["tokens"].tolist() == list(range(14))
    assert tensors["aux"].shape == (11, 6)
    assert tensors["last"].shape == (11, 2)
    assert not list((home / "tmp").iterdir())


def test_traces_that_cannot_be_written_are_one_line_in_the_log_and_a_count(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    (home / "artifacts").mkdir(parents=True)
    (home / "artifacts" / "traces").write_text("in the way")
    sidecar = Sidecar(home, endpoint)
    engine = Engine(endpoint, BOOT)
    started += [sidecar, engine]
    engine.run()

    def traced(numbers: range) -> None:
        for number in numbers:
            serve(engine, number)
            engine.trace(wire.request_id(BOOT, number), 0, list(range(6)), 5, final=True)

    traced(range(1, 11))
    wait_until(lambda: drops(url_of(home)).get("trace") == 10)
    assert sidecar.text().count("a trace can't be written") == 1
    wait_until(lambda: count(url_of(home), "request", "status = 'finished'") == 10)
    (home / "artifacts" / "traces").unlink()
    traced(range(11, 13))
    wait_until(lambda: count(url_of(home), "trace") == 2)


def test_memory_stays_flat_over_many_requests(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    sidecar = Sidecar(home, endpoint, capture_bytes=200_000)
    engine = Engine(endpoint, BOOT)
    started += [sidecar, engine]
    engine.run()
    process = psutil.Process(sidecar.process.pid)

    def serve_many(numbers: range) -> int:
        for number in numbers:
            serve(engine, number)
            request_id = wire.request_id(BOOT, number)
            engine.trace(request_id, 0, list(range(64)), 64)
            engine.trace(request_id, 64, list(range(64, 90)), 25, final=True)
        last = numbers[-1]
        wait_until(lambda: count(url_of(home), "trace", f"request_id % 65536 = {last}") == 1, 60)
        return int(process.memory_info().rss)

    warm = serve_many(range(1, 401))
    grown = serve_many(range(401, 2001)) - warm
    print(f"memory: {warm >> 20} MiB, and {grown / 2**20:.1f} MiB more after 1600 requests")
    assert grown < 16 << 20  # SQLite's page cache grows with the file
    assert count(url_of(home), "request", "status = 'finished'") == 2000


def share_of_a_core(process: psutil.Process, seconds: float) -> float:
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / seconds


def test_an_idle_sidecar_costs_next_to_nothing_and_gives_way(
    tmp_path: Path, started: list[Sidecar | Engine]
) -> None:
    home, endpoint = tmp_path / "home", tmp_path / "e"
    sidecar = Sidecar(home, endpoint)
    engine = Engine(endpoint, BOOT)
    started += [sidecar, engine]
    engine.run()
    wait_until(lambda: count(url_of(home), "server") == 1)
    time.sleep(2)
    process = psutil.Process(sidecar.process.pid)
    used = min(share_of_a_core(process, 3.0) for _ in range(3))  # others only add to it
    print(f"idle sidecar: {100 * used:.2f}% of a core, {process.memory_info().rss >> 20} MiB")
    assert used < 0.03
    assert process.nice() >= 5


def test_sigint_and_sigterm_end_it_cleanly(tmp_path: Path, started: list[Sidecar | Engine]) -> None:
    sidecar = Sidecar(tmp_path / "home", tmp_path / "e")
    started.append(sidecar)
    sidecar.wait_ready()
    os.kill(sidecar.process.pid, signal.SIGINT)
    assert sidecar.process.wait(15) == 0
