"""The schema's version: which one a database has, and how it gets to the newest."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from aurora_sgl.errors import AuroraError
from aurora_sgl.store.connection import is_sqlite, reading

#: Key of the PostgreSQL advisory lock under which one process at a time upgrades.
_UPGRADE_LOCK = 0x4175726F7261


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
    revision = ScriptDirectory(str(scripts_folder())).get_current_head()
    assert revision is not None
    return revision


def upgrade(engine: Engine) -> str:
    """Bring the database to :func:`head`, in one transaction; returns the revision.

    Processes that do it at once wait for each other. Raises ``AuroraError`` when the database is
    newer than this code, or when it refuses the change.
    """
    config = Config()
    config.set_main_option("script_location", str(scripts_folder()).replace("%", "%%"))
    try:
        with engine.begin() as connection:
            if not is_sqlite(engine):  # SQLite's BEGIN IMMEDIATE is the lock
                connection.execute(
                    text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK}
                )
            revision = _revision(connection)
            if revision == head():
                return revision
            require_known(revision)
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise AuroraError(f"the store could not be upgraded: {cause}") from error
    return head()


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
    return MigrationContext.configure(connection).get_current_revision()


def require_known(revision: str | None) -> None:
    """Raises ``AuroraError`` for a schema of a release after this one."""
    revisions = {
        script.revision for script in ScriptDirectory(str(scripts_folder())).walk_revisions()
    }
    if revision is not None and revision not in revisions:
        raise AuroraError(
            f"the store has schema {revision}, which this release does not know; "
            "use the release that made it, or a newer one"
        )
