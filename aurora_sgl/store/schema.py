"""The schema's version: which one a database has, and how it gets to the newest.

Alembic is imported by what upgrades alone. Each process that starts looks at the version, and the
import, with that of all migrations, was a sixth of the time of a processor that it took to start.
"""

from __future__ import annotations

import time
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from aurora_sgl.errors import AuroraError
from aurora_sgl.store.connection import is_sqlite, reading
from aurora_sgl.store.faults import Kind, fault_of, in_words, with_advice
from aurora_sgl.store.options import SECONDS
from aurora_sgl.store.sqlite_file import warn_of_network

#: Key of the PostgreSQL advisory lock under which one process at a time upgrades.
_UPGRADE_LOCK = 0x4175726F7261
#: Seconds for which an upgrade waits for another one, or for tables in use.
WAIT_SECONDS = 60.0
_PAUSE_SECONDS = 0.2
#: Of the upgrade's transaction: how long a change queues for its table, and how long the locks of a
#: machine that vanished are kept.
_LIMITS = "SET LOCAL lock_timeout = 900; SET LOCAL idle_in_transaction_session_timeout = 60000"


def scripts_folder() -> Path:
    """Where the migration scripts lie: inside the installed package, or at the repository's top."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise AuroraError(f"the migration scripts are missing beside {package}; install again")


def current(engine: Engine) -> str | None:
    """The revision of the database; ``None`` for an empty one."""
    with reading(engine) as connection:
        return _revision(connection)


def head() -> str:
    """The revision that this code needs."""
    return revisions()[-1]


def revisions() -> list[str]:
    """All that this code knows, the oldest first: the names of their scripts begin with them."""
    scripts = (scripts_folder() / "versions").glob("[0-9]*_*.py")
    return sorted(path.name.partition("_")[0] for path in scripts)


def upgrade(engine: Engine, *, wait_seconds: float = WAIT_SECONDS) -> str:
    """Bring the database to :func:`head`, in one transaction; returns the revision.

    A database that is there already is only looked at. Processes that upgrade at once wait for
    each other, ``wait_seconds`` at most. A change that finds its table in use gives up after less
    than a second, since whoever comes later waits behind it, and is tried again. Raises
    ``AuroraError`` when the database is newer than this code, when it refuses the change, and when
    the time is over.
    """
    until = time.monotonic() + wait_seconds
    warn_of_network(engine)
    while True:
        try:
            revision = current(engine)
            if revision == head():
                return revision
            require_known(revision)
            return _upgrade(engine)
        except _Upgrading:
            if time.monotonic() > until:
                raise AuroraError(_who_upgrades(engine, wait_seconds)) from None
        except SQLAlchemyError as error:
            fault = fault_of(error)
            if fault is None or fault.kind is not Kind.BUSY:
                line = f"the store could not be upgraded: {with_advice(error)}"
                raise AuroraError(line) from error
            if time.monotonic() > until:
                raise AuroraError(
                    f"the store could not be upgraded for {wait_seconds:.0f} s: somebody, such as "
                    f"a backup, has a table of it in use ({in_words(error)}); try again later"
                ) from None
        time.sleep(_PAUSE_SECONDS)


class _Upgrading(Exception):
    """Another process upgrades the store now."""


def _upgrade(engine: Engine) -> str:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(scripts_folder()).replace("%", "%%"))
    # However long a migration takes.
    patient = engine.execution_options(**{SECONDS: None})
    with patient.begin() as connection:
        if not is_sqlite(engine):  # SQLite's BEGIN IMMEDIATE is the lock
            connection.execute(text(_LIMITS))
            lock = text("SELECT pg_try_advisory_xact_lock(:key)")
            if not connection.scalar(lock, {"key": _UPGRADE_LOCK}):
                raise _Upgrading
        revision = _revision(connection)
        if revision != head():
            require_known(revision)
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    return head()


def _who_upgrades(engine: Engine, seconds: float) -> str:
    with reading(engine) as connection:
        row = connection.execute(
            text(
                "SELECT a.pid, coalesce(host(a.client_addr), 'this machine') AS place, "
                "coalesce(a.application_name, '') AS program FROM pg_locks l "
                "JOIN pg_stat_activity a ON a.pid = l.pid WHERE l.locktype = 'advisory' "
                "AND l.granted AND l.database = (SELECT oid FROM pg_database "
                "WHERE datname = current_database()) "
                "AND (CAST(l.classid AS bigint) << 32) + CAST(l.objid AS bigint) = :key"
            ),
            {"key": _UPGRADE_LOCK},
        ).first()
    who = f" ({row.program or 'a session'} at {row.place}, backend {row.pid})" if row else ""
    end = f": SELECT pg_terminate_backend({row.pid})" if row else ""
    return (
        f"somebody else has been upgrading the store for {seconds:.0f} s and more{who}; wait for "
        f"it, or end it if it is gone{end}"
    )


def require_current(engine: Engine) -> None:
    """Raises ``AuroraError`` unless the database has the tables of this code."""
    revision = current(engine)
    if revision != head():
        require_known(revision)
        raise AuroraError(
            f"the store has schema {revision or 'none'}, this release needs {head()}; "
            "run: aurora-sgl db upgrade"
        )


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def require_known(revision: str | None) -> None:
    """Raises ``AuroraError`` for a schema of a release after this one."""
    if revision is not None and revision not in revisions():
        raise AuroraError(
            f"the store has schema {revision}, which this release does not know; "
            "use the release that made it, or a newer one"
        )
