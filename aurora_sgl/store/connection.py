"""Engines and sessions: one URL, SQLite or PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from aurora_sgl.config import get_settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.private import OWNER, denied, make_folder
from aurora_sgl.store import sqlite_file
from aurora_sgl.store.options import READ_ONLY

#: Seconds that a writer waits for another one in SQLite.
BUSY_SECONDS = 30
#: The role, when it lacks a right that every writer needs; NULL without the table.
_ONLY_READS = """SELECT current_user WHERE NOT (
    has_table_privilege(to_regclass('request'), 'INSERT')
    AND has_table_privilege(to_regclass('request'), 'UPDATE'))"""
_ELSEWHERE = "set AURORA_HOME or AURORA_DATABASE_URL to a place that you can write"


def connect(url: str | None = None, *, seconds: float | None = None) -> Engine:
    """An engine for the store at ``url`` (default: the settings' store), tried once.

    ``seconds``: that one statement may take in PostgreSQL, for processes that can do it again;
    None: as long as it wants. Raises ``AuroraError`` with one line, without the password, when the
    URL is not understood or the database can't be reached.
    """
    parsed = parse_url(url or get_settings().store_url)
    is_file = parsed.get_backend_name() == "sqlite"
    engine = _sqlite(parsed) if is_file else _postgres(parsed, seconds)
    try:
        with reading(engine) as connection:
            connection.execute(text("SELECT count(*) FROM sqlite_master" if is_sqlite(engine)
                                    else "SELECT 1"))  # fmt: skip
    except SQLAlchemyError as error:
        engine.dispose()
        raise AuroraError(unreachable(parsed, error)) from None
    return engine


def require_writable(raw: str) -> None:
    """Raises ``AuroraError`` for a store in which this user or role may not write: who waits for
    it would wait for ever. One that can't be reached now, or has no tables yet, passes."""
    url = parse_url(raw)
    if url.get_backend_name() == "sqlite":
        if why := sqlite_file.read_only(url.database):
            shown = url.render_as_string(hide_password=True)
            raise AuroraError(f"the store {shown} can't be used: {why}; {_ELSEWHERE}")
        return
    try:
        engine = connect(raw, seconds=get_settings().database_seconds)
    except AuroraError:
        return
    try:
        with reading(engine) as connection:
            only_reads = connection.scalar(text(_ONLY_READS))
    except SQLAlchemyError:
        return
    finally:
        engine.dispose()
    if only_reads:
        raise AuroraError(
            f"the role {only_reads!r} may not write in the store; AURORA_DATABASE_URL must name "
            "one that may"
        )


def is_sqlite(bind: Engine | Connection) -> bool:
    return bind.dialect.name == "sqlite"


@contextmanager
def session(engine: Engine, *, write: bool = True) -> Iterator[Session]:
    """A session in one transaction: committed at the end, rolled back on an error.

    In SQLite a writing session takes the write lock at its first statement, so that what it read
    stays true until it commits; keep it short. ``write=False`` takes no lock.
    """
    options = {} if write else {READ_ONLY: True}
    bind = engine.execution_options(**options)
    with Session(bind, expire_on_commit=False) as active, active.begin():
        yield active


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection in a transaction that only reads."""
    with engine.execution_options(**{READ_ONLY: True}).connect() as connection:
        yield connection


def unreachable(url: URL, error: Exception) -> str:
    """One line that says which store, why, and what to do; never the password."""
    cause = str(getattr(error, "orig", None) or error).strip().splitlines() or ["no reason given"]
    line = " ".join(cause[-1].split())
    if url.password:
        line = line.replace(str(url.password), "***")
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite" and (why := sqlite_file.read_only(url.database)):
        return f"the store {shown} can't be used: {why}; {_ELSEWHERE}"
    return (
        f"the store {shown} can't be reached ({line}); "
        "check AURORA_DATABASE_URL and that the database is running"
    )


def parse_url(raw: str) -> URL:
    """Raises ``AuroraError``, without the password, for what the store can't run on."""
    try:
        url = make_url(raw)
    except ArgumentError:
        raise AuroraError(
            "AURORA_DATABASE_URL is not a database URL; use sqlite:///path/to/file.db or "
            "postgresql://user:password@host/database"
        ) from None
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise AuroraError(
            f"AURORA_DATABASE_URL names {url.get_backend_name()!r}; "
            "the store runs on sqlite or postgresql"
        )
    return url


def _sqlite(url: URL) -> Engine:
    if url.database and url.database != ":memory:" and not url.database.startswith("file:"):
        folder = Path(url.database).parent
        try:
            make_folder(folder)
        except OSError as error:
            raise AuroraError(
                f"the folder {folder} of the store can't be made ({denied(error)}); {_ELSEWHERE}"
            ) from None
        _make_file(Path(url.database))
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, see begin()
        if not connection.execute("PRAGMA page_count").fetchone()[0]:  # later it takes a lock
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA journal_size_limit={sqlite_file.WAL_BYTES}")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")
        connection.execute("PRAGMA cache_size=-65536")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that reads first and writes later fails at once when another
        # process wrote in between; an immediate one waits its turn.
        only_reads = connection.get_execution_options().get(READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")

    return engine


def _make_file(path: Path) -> None:
    """An empty database that is its owner's only; SQLite makes its other files with that mode.

    One that is there is not opened: closing it would end the locks of this process' connections.
    What stands in the way is said by SQLite.
    """
    with suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, OWNER.file))


def _postgres(url: URL, seconds: float | None) -> Engine:
    try:
        from aurora_sgl.store.postgres import make_engine

        return make_engine(url, seconds)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise AuroraError(f"the driver of {url.drivername} is missing ({error})") from None


__all__ = [
    "Session",
    "connect",
    "is_sqlite",
    "reading",
    "session",
    "unreachable",
]
