"""All rows into one file and back: SQLite by its online backup, PostgreSQL by its own tools.

PostgreSQL is restored in one transaction that first drops our tables, so that a restore that
fails leaves the store as it was. Only tables and views of ours are touched, whatever else lies in
the schema.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, create_engine, inspect, select, text

from aurora_sgl.errors import AuroraError
from aurora_sgl.store.connection import is_sqlite, reading
from aurora_sgl.store.models import Base, DrafterVersion, ErasedRequest, Erasure, StoreKey, Trace
from aurora_sgl.store.partitions import PREFIX
from aurora_sgl.store.queries.sql_console import VIEWS
from aurora_sgl.store.schema import current, require_known, upgrade
from aurora_sgl.store.upsert import insert_missing

SQLITE_FILE, POSTGRES_FILE = "store.db", "store.dump"
#: Where Debian and Red Hat keep the tools of each release.
_FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin")
_OURS = {*Base.metadata.tables, *VIEWS, "alembic_version"}


class NamedFile(NamedTuple):
    """A file, or with ``version_id`` a folder of weights, that a row names."""

    uri: str
    sha256: str  # of a trace's bytes, or of a drafter's tensors; "": not known
    version_id: int  # 0: a trace


@dataclass(frozen=True)
class StoreDump:
    """What a backup's manifest says of its rows."""

    database: str  # sqlite | postgresql
    schema: str  # of PostgreSQL, where the tables were
    revision: str
    file: str


def dump(engine: Engine, folder: Path) -> tuple[StoreDump, list[NamedFile]]:
    """Write all rows, as they are at one moment, into a file of a folder; and the files that
    these rows name."""
    revision = current(engine) or ""
    if is_sqlite(engine):
        files = _dump_sqlite(engine, folder / SQLITE_FILE)
        return StoreDump("sqlite", "", revision, SQLITE_FILE), files
    schema, files = _dump_postgres(engine, folder / POSTGRES_FILE)
    return StoreDump("postgresql", schema, revision, POSTGRES_FILE), files


def load(engine: Engine, dumped: StoreDump, folder: Path, *, force: bool) -> None:
    """Put rows in the place of all that the store has, and bring them to the newest schema. Rules
    of purges that the store had stay.

    Raises ``AuroraError``, and changes nothing, for another database or a newer schema, and without
    ``force`` for a store that has rows.
    """
    check(engine, dumped, force=force)
    rules = _rules(engine)
    if is_sqlite(engine):
        _load_sqlite(engine, folder / dumped.file)
    else:
        _load_postgres(engine, dumped, folder / dumped.file)
    upgrade(engine)
    with engine.begin() as connection:
        for model, rows in rules.items():
            (key,) = model.__table__.primary_key
            insert_missing(connection, model, rows, [key.name])
        if not is_sqlite(connection):  # numbers were given, the next one comes after them
            connection.execute(
                text(
                    "SELECT setval(pg_get_serial_sequence('erasure', 'id'), "
                    "greatest((SELECT max(id) FROM erasure), 1))"
                )
            )


def check(engine: Engine, dumped: StoreDump, *, force: bool) -> None:
    """Whether :func:`load` can be. Raises ``AuroraError`` in one line when it can't."""
    here = "sqlite" if is_sqlite(engine) else "postgresql"
    if dumped.database != here:
        raise AuroraError(
            f"the backup is one of {dumped.database}, the store runs on {here}; "
            "set AURORA_DATABASE_URL to a database of that kind"
        )
    require_known(dumped.revision)
    if not is_sqlite(engine):
        with reading(engine) as connection:
            schema = connection.scalar(text("SELECT current_schema()"))
        if schema != dumped.schema:
            raise AuroraError(
                f"the backup's tables lie in schema {dumped.schema}, the store's in {schema}; "
                "set search_path in AURORA_DATABASE_URL"
            )
        _require_owner(engine)
        _tool("psql", engine)
        _tool("pg_restore", engine)
    if not force and (table := _first_with_rows(engine)):
        raise AuroraError(
            f"the store is not empty (table {table} has rows); restore into another one, or add "
            "--force to lose what it has"
        )


#: The owner of our tables when this role is not it, the role when there are none and it may make
#: none.
_WHOSE = """SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = to_regclass('request')
        AND NOT pg_has_role(relowner, 'USAGE')
    UNION ALL SELECT '' WHERE to_regclass('request') IS NULL
        AND NOT has_schema_privilege(current_schema(), 'CREATE')"""


def _require_owner(engine: Engine) -> None:
    with reading(engine) as connection:
        owner = connection.scalar(text(_WHOSE))
    if owner is not None:
        raise AuroraError(
            "a restore makes the tables of the store anew, which this role may not; "
            f"AURORA_DATABASE_URL must name {f'their owner, {owner}' if owner else 'one that may'}"
        )


def _first_with_rows(engine: Engine) -> str:
    with reading(engine) as connection:
        present = set(inspect(connection).get_table_names())
        for table in Base.metadata.sorted_tables:
            if table.name in present and connection.execute(select(table).limit(1)).first():
                return table.name
    return ""


def _rules(engine: Engine) -> dict[type[Base], list[dict[str, Any]]]:
    """What was purged in the store as it is, which an older backup knows nothing of, and the key
    by which the rules name conversations, for a backup that has none."""
    with reading(engine) as connection:
        present = set(inspect(connection).get_table_names())
        return {
            model: [dict(row) for row in connection.execute(select(model.__table__)).mappings()]
            for model in (Erasure, ErasedRequest, StoreKey)
            if model.__tablename__ in present
        }


def _named_files(connection: Connection) -> list[NamedFile]:
    t, v = Trace, DrafterVersion
    traces = connection.execute(select(t.uri, t.sha256).order_by(t.request_id))
    weights = connection.execute(
        select(v.weights_uri, v.weights_sha256, v.id).where(v.pruned_at.is_(None)).order_by(v.id)
    )
    return [*(NamedFile(*row, 0) for row in traces), *(NamedFile(*row) for row in weights)]


def _dump_sqlite(engine: Engine, path: Path) -> list[NamedFile]:
    raw = engine.raw_connection()
    copy = sqlite3.connect(path)
    try:
        source: Any = raw.driver_connection
        source.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
    finally:
        copy.close()
        raw.close()
    here = create_engine(f"sqlite:///{path}")
    with here.connect() as connection:
        files = _named_files(connection)
    here.dispose()
    return files


def _load_sqlite(engine: Engine, path: Path) -> None:
    """One transaction: whoever reads meanwhile sees the old rows or the new ones."""
    raw = engine.raw_connection()
    source = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        problem = source.execute("PRAGMA quick_check").fetchone()[0]
        if problem != "ok":
            raise AuroraError(f"{path} is damaged: {problem}")
        target: Any = raw.driver_connection
        source.backup(target)
        target.execute("PRAGMA journal_mode = WAL")
    finally:
        source.close()
        raw.close()
    engine.dispose()


def _dump_postgres(engine: Engine, path: Path) -> tuple[str, list[NamedFile]]:
    tool = _tool("pg_dump", engine)
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        snapshot = connection.scalar(text("SELECT pg_export_snapshot()"))
        schema = str(connection.scalar(text("SELECT current_schema()")))
        others = _others(connection, schema)
        exclude = [f'--exclude-table="{schema}"."{name}"' for name in others]
        _run(
            engine,
            [
                str(tool), "--format=custom", f"--snapshot={snapshot}", f'--schema="{schema}"',
                *exclude, "--no-owner", "--no-privileges", "--no-comments", f"--file={path}",
            ],
            "the backup",
        )  # fmt: skip
        return schema, _named_files(connection)


def _others(connection: Connection, schema: str) -> list[str]:
    """Tables and views of the schema that are not ours."""
    there = inspect(connection)
    names = {*there.get_table_names(schema), *there.get_view_names(schema)}
    return sorted(name for name in names - _OURS if not _is_partition(name))


def _is_partition(name: str) -> bool:
    return name.startswith(PREFIX) or name == "acceptance_event_default"


def _load_postgres(engine: Engine, dumped: StoreDump, path: Path) -> None:
    psql, restore = _tool("psql", engine), _tool("pg_restore", engine)
    with tempfile.TemporaryDirectory() as scratch:
        listing, script = Path(scratch, "list"), Path(scratch, "restore.sql")
        listed = _run(engine, [str(restore), "--list", str(path)], "the backup", database=False)
        keep = [line for line in listed.splitlines() if not re.match(r"\d+; \d+ \d+ SCHEMA ", line)]
        listing.write_text("\n".join(keep) + "\n")
        _run(
            engine,
            [str(restore), f"--use-list={listing}", "--no-owner", "--no-privileges",
             f"--file={script}", str(path)],
            "the backup",
            database=False,
        )  # fmt: skip
        drops = Path(scratch, "drop.sql")
        drops.write_text(_drops(dumped.schema))
        _run(
            engine,
            [str(psql), "--no-psqlrc", "--quiet", "--single-transaction",
             "--set=ON_ERROR_STOP=1", f"--file={drops}", f"--file={script}"],
            "the restore, which changed nothing,",
        )  # fmt: skip
    engine.dispose()


def _drops(schema: str) -> str:
    """Our tables, views and the triggers' function; 30 s for whoever uses them to let go."""
    lines = ["SET client_min_messages = warning;", "SET lock_timeout = '30s';"]
    lines += [f'DROP VIEW IF EXISTS "{schema}"."{name}" CASCADE;' for name in VIEWS]
    tables = sorted(_OURS - set(VIEWS))
    lines += [f'DROP TABLE IF EXISTS "{schema}"."{name}" CASCADE;' for name in tables]
    lines.append(f"""
        DO $$ DECLARE f regprocedure; BEGIN
            FOR f IN SELECT p.oid FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                WHERE n.nspname = '{schema}' AND p.proname LIKE 'aurora\\_%' LOOP
                EXECUTE 'DROP FUNCTION ' || f || ' CASCADE';
            END LOOP;
        END $$;""")
    return "\n".join(lines) + "\n"


def _tool(name: str, engine: Engine) -> Path:
    """A client program of PostgreSQL that is not older than the server. Raises ``AuroraError``."""
    with reading(engine) as connection:
        major = int(connection.scalar(text("SHOW server_version_num"))) // 10_000
    there = [shutil.which(name, path=folder) for folder in os.get_exec_path()]
    for pattern in _FOLDERS:
        there += sorted(map(str, Path("/").glob(f"{pattern.lstrip('/')}/{name}")), reverse=True)
    for path in filter(None, there):
        if _major_of(path) >= major:
            return Path(path)
    raise AuroraError(
        f"{name} of PostgreSQL {major} or newer is needed and not on the PATH; "
        f"install postgresql-client-{major}"
    )


def _major_of(tool: str) -> int:
    try:
        answer = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return 0
    number = re.search(r"\) (\d+)", answer.stdout)
    return int(number[1]) if number else 0


def _connection_info(engine: Engine) -> dict[str, Any]:
    """What libpq is told of the database; options of the driver alone are left out."""
    from psycopg.pq import Conninfo

    _, named = engine.dialect.create_connect_args(engine.url)
    libpqs = {option.keyword.decode() for option in Conninfo.get_defaults()}
    return {name: value for name, value in named.items() if name in libpqs}


def _run(engine: Engine, command: list[str], what: str, *, database: bool = True) -> str:
    """What a tool printed. The password goes by the environment, which other users can't read."""
    environment = dict(os.environ)
    if database:
        from psycopg.conninfo import make_conninfo

        where = _connection_info(engine)
        if password := where.pop("password", None):
            environment["PGPASSWORD"] = str(password)
        command = [command[0], f"--dbname={make_conninfo(**where)}", *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or [done.stderr]
        advice = "; AURORA_DATABASE_URL must name a role that may do this"
        raise AuroraError(
            f"{what} failed in {Path(command[0]).name}: {lines[0].strip()[:300]}"
            f"{advice if 'permission denied' in lines[0] else ''}"
        )
    return done.stdout
