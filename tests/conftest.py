"""Shared pieces of the tests: a store on each database that the project supports."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text

sys.path.insert(0, str(Path(__file__).parent))  # for the samples beside the tests

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real PostgreSQL of our own, started from the package pgserver; gone after the tests.

    Not under pytest's own temporary folder: run as root, the server is another user, and each
    pytest that starts closes that folder to others.
    """
    folder = Path(tempfile.mkdtemp(prefix="aurora-test-pg-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pgserver's platformdirs warns about XDG_RUNTIME_DIR
            server = _start_postgres(folder / "data")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        server.cleanup()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_postgres(folder: Path) -> Any:
    """pgserver 0.1.4 gives pg_ctl ten seconds, too few for a busy machine; the server comes up
    all the same, and a second look finds it."""
    import pgserver
    from pgserver.postgres_server import PostgresServer

    for _ in range(6):
        try:
            return pgserver.get_server(folder, cleanup_mode="delete")
        except (subprocess.SubprocessError, AssertionError):
            PostgresServer._instances.pop(folder.resolve(), None)
            time.sleep(5)
    raise RuntimeError(f"PostgreSQL did not start in {folder}; see its file named log")


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """The URL of an empty database of the test's own."""
    name = f"test_{next(_numbers)}"
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield postgres_url.replace("/postgres?", f"/{name}?")
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'aurora.db'}"
    return str(request.getfixturevalue("postgres_database"))


@pytest.fixture
def engine(empty_store_url: str) -> Iterator[Engine]:
    """An engine of a store at the newest schema, on each database in turn."""
    from aurora_sgl import store

    engine = store.connect(empty_store_url)
    store.upgrade(engine)
    yield engine
    engine.dispose()
