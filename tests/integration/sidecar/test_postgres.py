"""The sidecar keeps what it took while PostgreSQL is stopped in the middle of the traffic."""

from __future__ import annotations

import time
from pathlib import Path

from sqlalchemy import create_engine, text

from aurora_sgl import store
from tests.support import store_samples as samples
from tests.support.sidecar_engine import Engine, Sidecar, wait_until

BOOT = 6161


def query(url: str, statement: str) -> int:
    engine = store.connect(url)
    try:
        with store.reading(engine) as connection:
            return int(connection.scalar(text(statement)) or 0)
    except Exception:
        return -1  # no tables yet
    finally:
        engine.dispose()


def test_a_database_that_stops_and_comes_back_misses_nothing(
    tmp_path: Path, postgres_url: str
) -> None:
    from pgserver._commands import pg_ctl
    from pgserver.postgres_server import PostgresServer

    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        folder = str(connection.scalar(text("SHOW data_directory")))
        connection.execute(text("CREATE DATABASE stopped"))
    admin.dispose()
    postgres_database = postgres_url.replace("/postgres?", "/stopped?")
    home, endpoint = tmp_path / "home", tmp_path / "e"
    sidecar = Sidecar(home, endpoint, database_url=postgres_database)
    engine = Engine(endpoint, BOOT)
    try:
        engine.run()
        engine.send(samples.started(1, boot_id=BOOT))
        for step in range(200):
            engine.send(samples.chain_step(1, step, 1, boot_id=BOOT))
        events = "SELECT count(*) FROM acceptance_event"
        wait_until(lambda: query(postgres_database, events) == 200, 40)
        owner = Path(folder).owner()
        pg_ctl(["-w", "-m", "immediate", "stop"], pgdata=Path(folder), user=owner, timeout=60)
        try:
            for step in range(200, 1200):
                engine.send(samples.chain_step(1, step, 1, boot_id=BOOT))
            wait_until(lambda: "the store is away" in sidecar.text())
            time.sleep(2)
            assert sidecar.process.poll() is None
        finally:
            PostgresServer._instances[Path(folder)].ensure_postgres_running()
        wait_until(lambda: query(postgres_database, events) == 1200, 40)
        wait_until(lambda: "the store is back" in sidecar.text())
        assert query(postgres_database, "SELECT count(*) FROM drop_count") == 0
        assert query(postgres_database, "SELECT verify_steps FROM request") == 1200
    finally:
        engine.close()
        sidecar.process.kill()
        sidecar.process.wait()
