"""A real sidecar whose store is broken and mended in many ways while the engine goes on."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, text

from aurora_sgl import wire
from aurora_sgl.sidecar.refused import FILE
from tests.support import store_samples as samples
from tests.support.sidecar_engine import Engine, Sidecar, wait_until

BOOT = 7171


class House:
    """A sidecar, an engine that says hello, and the store of one kind that they share."""

    def __init__(self, tmp_path: Path, url: str, owner: str) -> None:
        self.url = url  # what the sidecar is given
        # No connection stays open: a process that opens and closes a SQLite file beside SQLite
        # loses the locks that it has on it.
        self.admin = create_engine(owner, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        self.home, endpoint = tmp_path / "home", tmp_path / "e"
        self.sidecar = Sidecar(self.home, endpoint, database_url=url)
        self.engine = Engine(endpoint, BOOT)
        self.steps = 0
        self.engine.run()
        self.engine.send(samples.started(1, boot_id=BOOT))

    def send_steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.send(samples.chain_step(1, self.steps, 1, boot_id=BOOT))
            self.steps += 1

    def write(self, *statements: str) -> None:
        with self.admin.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def number(self, query: str) -> int:
        """-1 while the store can't say."""
        try:
            with self.admin.connect() as connection:
                return int(connection.scalar(text(query)) or 0)
        except Exception:
            return -1

    def all_stored(self) -> bool:
        return self.number("SELECT count(*) FROM acceptance_event") == self.steps

    def health(self) -> dict[str, Any]:
        code, body = self.sidecar.get("/health")
        found: dict[str, Any] = json.loads(body)
        assert (code == 200) == found["ready"]
        return found

    def breaks(self, broken: Callable[[], None], mended: Callable[[], None], words: str) -> None:
        """All of the traffic waits, /health says why, and then all is there."""
        broken()
        self.send_steps(100)

        def said() -> bool:
            found = self.health()
            return words in found["reason"] and found["oldest_unstored_seconds"] > 3

        wait_until(said, 40, f"a health endpoint that says {words!r}")
        self.send_steps(100)
        mended()
        wait_until(self.all_stored, 40, f"a whole store after {words!r}")
        wait_until(lambda: self.health()["ready"], 20, "a sidecar that is ready again")

    def close(self) -> None:
        self.engine.close()
        self.sidecar.process.kill()
        self.sidecar.process.wait()
        self.admin.dispose()


@pytest.fixture
def on_sqlite(tmp_path: Path, home: Path) -> Iterator[House]:
    url = f"sqlite:///{home / 'aurora.db'}"
    house = House(tmp_path, url, url)
    yield house
    house.close()


@pytest.fixture
def on_postgres(tmp_path: Path, postgres_database: str) -> Iterator[House]:
    """The sidecar's role is no superuser, so that rights can be taken from it."""
    admin = create_engine(postgres_database, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql("CREATE ROLE sidecar LOGIN")
        connection.exec_driver_sql("GRANT ALL ON SCHEMA public TO sidecar")
    url = re.sub("//postgres:", "//sidecar:", postgres_database)
    house = House(tmp_path, url, postgres_database)
    yield house
    house.close()
    with admin.connect() as connection:
        connection.exec_driver_sql("DROP OWNED BY sidecar")
        connection.exec_driver_sql("DROP ROLE sidecar")
    admin.dispose()


RENAME = "ALTER TABLE acceptance_event RENAME TO elsewhere"
BACK = "ALTER TABLE elsewhere RENAME TO acceptance_event"
DELETE_SERVER = (
    "DELETE FROM swap", "DELETE FROM drop_count", "DELETE FROM spool_watermark",
    "DELETE FROM request", "DELETE FROM server",
)  # fmt: skip


def deleted_server(house: House) -> None:
    house.write(*DELETE_SERVER)
    house.send_steps(50)
    wait_until(house.all_stored, 40, "a whole store after its server's row was deleted")
    wait_until(lambda: house.number(f"SELECT count(*) FROM server WHERE boot_id = {BOOT}") == 1)
    assert house.number("SELECT count(*) FROM request") == 1


def nothing_lost(house: House) -> None:
    assert house.number("SELECT coalesce(sum(count), 0) FROM drop_count") == 0
    assert not (house.home / "spool" / "0" / FILE).exists()
    assert house.number("SELECT sum(verify_steps) FROM acceptance_minute") == house.steps
    assert "the batcher failed" not in house.sidecar.text()


@pytest.mark.slow
def test_what_is_broken_and_mended_in_postgresql_costs_no_record(on_postgres: House) -> None:
    house = on_postgres
    house.send_steps(100)
    wait_until(house.all_stored, 60)

    def statements(*some: str) -> Callable[[], None]:
        return lambda: house.write(*some)

    name = str(house.admin.url.database)
    drop_others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE usename = 'sidecar' AND pid <> pg_backend_pid()"
    )
    house.breaks(statements(RENAME), statements(BACK), "missing or was changed")
    house.breaks(
        statements("REVOKE INSERT ON acceptance_event FROM sidecar"),
        statements("GRANT INSERT ON acceptance_event TO sidecar"),
        "rights are missing",
    )
    house.breaks(
        statements(f"ALTER DATABASE {name} SET default_transaction_read_only = on", drop_others),
        statements("SET default_transaction_read_only = off",
                   f"ALTER DATABASE {name} RESET default_transaction_read_only"),
        "read-only",
    )  # fmt: skip
    deleted_server(house)
    nothing_lost(house)


class Under:
    """Writes into a database file under everybody who has it open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = (0, b"")

    def write(self, offset: int, data: bytes) -> None:
        with closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
            log = self._path.with_name(self._path.name + "-wal")
            while True:  # until nobody wrote between the two
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                connection.execute("BEGIN IMMEDIATE")
                if not log.stat().st_size:
                    break
                connection.execute("ROLLBACK")
            self._before = (offset, self._put(offset, data))
            connection.execute("ROLLBACK")

    def mend(self) -> None:
        self._put(*self._before)

    def _put(self, offset: int, data: bytes) -> bytes:
        with self._path.open("r+b") as file:
            file.seek(offset)
            before = file.read(len(data))
            file.seek(offset)
            file.write(data)
        return before


@pytest.mark.slow
def test_what_is_broken_and_mended_in_sqlite_costs_no_record(on_sqlite: House) -> None:
    house = on_sqlite
    path = house.home / "aurora.db"
    house.send_steps(100)
    wait_until(house.all_stored, 60)
    house.breaks(lambda: house.write(RENAME), lambda: house.write(BACK), "missing or was changed")

    under = Under(path)
    # Byte 18 is the version of the format that one must know to write; 3 is not known yet.
    house.breaks(lambda: under.write(18, b"\x03"), under.mend, "read-only")
    page = house.number("SELECT rootpage FROM sqlite_master WHERE name = 'acceptance_event'")
    size = house.number("SELECT page_size FROM pragma_page_size")
    place = (page - 1) * size
    house.breaks(lambda: under.write(place, b"\x99" * size), under.mend, "damaged")
    deleted_server(house)
    nothing_lost(house)


@pytest.mark.slow
def test_a_boot_that_was_never_identified_does_not_hold_up_the_next(
    tmp_path: Path, postgres_database: str
) -> None:
    """A server with a wrong database URL and a drafter that can't be read is started again."""
    url = postgres_database
    home, endpoint = tmp_path / "home", tmp_path / "e"
    wrong = Sidecar(home, endpoint, database_url="postgresql+psycopg://nobody@127.0.0.1:1/x")
    first = Engine(endpoint, BOOT, drafter_path=str(tmp_path / "nowhere"))
    first.run()
    first.send(samples.started(1, boot_id=BOOT))
    for step in range(30):
        first.send(samples.chain_step(1, step, 1, boot_id=BOOT))
    wrong.wait_ready()
    wait_until(lambda: (endpoint / "health.json").exists())

    def reason() -> str:
        return str(json.loads(wrong.get("/health")[1])["reason"])

    wait_until(lambda: "can't be reached" in reason(), 40, "a reason in words")
    first.close()
    wrong.stop()
    sidecar = Sidecar(home, endpoint, database_url=url)
    second = Engine(endpoint, BOOT + 1)
    try:
        second.run()
        second.send(samples.started(1, boot_id=BOOT + 1))
        for step in range(20):
            second.send(samples.chain_step(1, step, 1, boot_id=BOOT + 1))
        begun = time.monotonic()
        engine = create_engine(url)

        def stored() -> list[tuple[int, int]]:
            try:
                with engine.connect() as connection:
                    found = connection.execute(
                        text("SELECT request_id, count(*) FROM acceptance_event GROUP BY 1")
                    )
                    return sorted((one, number) for one, number in found)
            except Exception:
                return []  # no tables yet

        both = [(wire.request_id(BOOT, 1), 30), (wire.request_id(BOOT + 1, 1), 20)]
        # Of a loaded machine's two minutes most go into starting Python and making the tables.
        wait_until(lambda: stored() == both, 120, "the records of both starts")
        print(f"both starts stored after {time.monotonic() - begun:.1f} s")
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM drop_count")) == 0
        engine.dispose()
        wait_until(lambda: sidecar.get("/health")[0] == 200, 20)
    finally:
        second.close()
        sidecar.process.kill()
        sidecar.process.wait()
