"""One statement that somebody typed, run so that it can only read, and only what it may.

SQLite: a connection of its own that opens the file read-only, an authorizer that allows SELECT
from the public tables and views and nothing else, a limit on the size of a value, and a progress
handler that ends what takes too long. PostgreSQL: a login role of its own (``make_sql_roles``)
that was granted SELECT and nothing else, a read-only transaction, ``statement_timeout``, and the
extended protocol, which takes one statement at a time; a row is read at a time, so an answer of a
million rows costs no more than what is shown of it.

Viewers see no tokens: in SQLite the columns read as NULL, in PostgreSQL they are not granted.
"""

from __future__ import annotations

import json
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, inspect, make_url
from sqlalchemy.engine import URL

from aurora_sgl import atomic
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.models import Base

SECONDS, ROWS = 5.0, 1000
#: Bytes of the largest value that a statement may make.
VALUE_BYTES = 4_000_000
VIEWS = (
    "v_accept_length_by_version",
    "v_accept_length_by_domain_hour",
    "v_deployment_history",
    "v_acceptance_event",
    "v_rejected_tokens",
)
TABLES = tuple(sorted(Base.metadata.tables))
#: Tokens, and hashes of so few of them that they could be guessed.
TOKEN_COLUMNS = {
    "acceptance_event": {"draft_tokens", "target_tokens"},
    "trace": {"prompt_sha256", "head_sha256"},
    "erasure": {"salt", "key_hash"},
    "v_acceptance_event": {"draft_tokens", "target_tokens"},
    "v_rejected_tokens": {"draft_token", "target_token"},
}
#: Views that show tokens; in PostgreSQL viewers may not read them.
TOKEN_VIEWS = ("v_acceptance_event", "v_rejected_tokens")


def columns() -> dict[str, list[str]]:
    """Names of the columns, by table."""
    return {name: [c.name for c in Base.metadata.tables[name].columns] for name in TABLES}


@dataclass(frozen=True)
class Answer:
    """``cut``: there were more rows than these."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    seconds: float
    cut: bool


def run_sql(
    engine: Engine,
    statement: str,
    *,
    with_tokens: bool,
    role_url: str = "",
    rows: int = ROWS,
    seconds: float = SECONDS,
) -> Answer:
    """Run one typed statement. ``role_url``: of the SQL role, for PostgreSQL.

    Raises ``AuroraError`` with one line: what the database said, that it took too long, or that
    it may not be read.
    """
    typed = statement.strip().rstrip(";").strip()
    if not typed:
        raise AuroraError("type a statement first, SELECT ... FROM ...")
    begun = time.monotonic()
    if is_sqlite(engine):
        columns, read = _sqlite(engine, typed, with_tokens, rows + 1, begun + seconds, seconds)
    elif not role_url:
        raise AuroraError(
            "on PostgreSQL this page logs in with a role of its own; make it once with: "
            "aurora-sgl dashboard sql-role"
        )
    else:
        columns, read = _postgres(role_url, typed, rows + 1, seconds)
    return Answer(columns, read[:rows], time.monotonic() - begun, len(read) > rows)


# -- SQLite ---------------------------------------------------------------------------------

Found = tuple[list[str], list[tuple[Any, ...]]]
#: Functions that reach beyond the database, or say what is not asked.
FUNCTIONS_REFUSED = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}


def _sqlite(
    engine: Engine, typed: str, with_tokens: bool, rows: int, until: float, seconds: float
) -> Found:
    path = engine.url.database
    assert path is not None
    with closing(sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True, timeout=2)) as db:
        db.execute("PRAGMA query_only = ON")
        # Built here: while the authorizer watches, SQLite could not declare their columns.
        db.execute("SELECT 1 FROM json_each('[]'), json_tree('[]')")
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES)
        db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        db.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000)
        db.set_authorizer(_authorizer(with_tokens))
        db.set_progress_handler(lambda: int(time.monotonic() > until), 10_000)
        try:
            cursor = db.execute(typed)
            columns = [column[0] for column in cursor.description or ()]
            return columns, [_readable(row) for row in cursor.fetchmany(rows)]
        except sqlite3.Error as error:
            raise AuroraError(_sqlite_line(str(error), seconds)) from None


def _authorizer(with_tokens: bool) -> Callable[..., int]:
    readable = {*TABLES, *VIEWS}

    def decide(
        action: int, one: str | None, two: str | None, database: str | None, _: str | None
    ) -> int:
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION:
            refused = (two or "").lower() in FUNCTIONS_REFUSED
            return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK
        if action != sqlite3.SQLITE_READ:
            return sqlite3.SQLITE_DENY
        table, column = (one or "").lower(), (two or "").lower()
        if not with_tokens and column in TOKEN_COLUMNS.get(table, ()):
            return sqlite3.SQLITE_IGNORE  # reads as NULL
        is_readable = table in readable or table in ("json_each", "json_tree")
        # A common table expression or subquery has no database; a table of it always has.
        return sqlite3.SQLITE_OK if is_readable or not database else sqlite3.SQLITE_DENY

    return decide


def _sqlite_line(message: str, seconds: float) -> str:
    if message == "interrupted":
        return f"stopped after {seconds:.0f} s; ask for less, or add a WHERE on a time"
    if any(word in message for word in ("authoriz", "prohibited", "readonly")):
        return (
            f"refused ({message}): this page only reads, and only the public tables and views; "
            "they are listed beside it"
        )
    if "one statement" in message:
        return "one statement at a time, please"
    return message


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


# -- PostgreSQL -----------------------------------------------------------------------------


def _postgres(role_url: str, typed: str, rows: int, seconds: float) -> Found:
    import psycopg

    url = make_url(role_url).set(drivername="postgresql")
    options = (
        f"-c default_transaction_read_only=on -c statement_timeout={int(seconds * 1000)} "
        "-c timezone=UTC -c lock_timeout=1000 -c search_path=public"
    )
    try:
        with closing(
            psycopg.connect(
                url.render_as_string(hide_password=False),
                options=options,
                connect_timeout=5,
                autocommit=False,
            )
        ) as connection:
            connection.read_only = True
            read: list[tuple[Any, ...]] = []
            with connection.cursor() as cursor:
                # stream() uses the extended protocol: one statement, one row at a time.
                for row in cursor.stream(typed):
                    read.append(_readable(row))
                    if len(read) >= rows:
                        connection.cancel()
                        break
                if not read:  # a stream without rows does not say its columns
                    cursor.execute(typed, prepare=True)
                columns = [column.name for column in cursor.description or ()]
            return columns, read
    except psycopg.Error as error:
        raise AuroraError(_postgres_line(error, seconds)) from None


def _postgres_line(error: Exception, seconds: float) -> str:
    state = getattr(error, "sqlstate", None) or ""
    message = " ".join(str(error).strip().splitlines()[:1]) or type(error).__name__
    if state == "57014":
        return f"stopped after {seconds:.0f} s; ask for less, or add a WHERE on a time"
    if state in ("42501", "25006"):
        return (
            f"refused ({message}): this page only reads, and only the public tables and views; "
            "they are listed beside it"
        )
    if "multiple commands" in message:
        return "one statement at a time, please"
    if "didn't produce" in message or "no result" in message:
        return "refused: this page only reads; the statement returns no rows"
    return message


def make_sql_roles(engine: Engine) -> dict[str, str]:
    """Make (or renew) the two login roles of the SQL page in PostgreSQL, and their URLs with new
    passwords, by role of the dashboard (viewer, operator).

    Raises ``AuroraError`` in SQLite, where there is nothing to make, and when the store's own
    role may not make roles.
    """
    if is_sqlite(engine):
        raise AuroraError("SQLite needs no roles; the SQL page works as it is")
    from sqlalchemy.exc import ProgrammingError

    present = {*inspect(engine).get_table_names(), *inspect(engine).get_view_names()}
    tables = [name for name in (*TABLES, *VIEWS) if name in present]
    urls: dict[str, str] = {}
    try:
        with engine.begin() as connection:

            def do(statement: str) -> None:
                connection.exec_driver_sql(statement)

            database = str(connection.exec_driver_sql("SELECT current_database()").scalar())
            for role in ("viewer", "operator"):
                name = _role_name(database, role)
                password = secrets.token_hex(24)
                exists = connection.exec_driver_sql(
                    f"SELECT 1 FROM pg_roles WHERE rolname = '{name}'"
                ).scalar()
                verb = "ALTER" if exists else "CREATE"
                do(
                    f'{verb} ROLE "{name}" LOGIN NOINHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE '
                    f"CONNECTION LIMIT 8 PASSWORD '{password}'"
                )
                do(f'ALTER ROLE "{name}" SET default_transaction_read_only = on')
                do(f'REVOKE ALL ON ALL TABLES IN SCHEMA public FROM "{name}"')
                do(f'GRANT USAGE ON SCHEMA public TO "{name}"')
                for table in tables:
                    what = _granted(table, role)
                    if what:
                        do(f'GRANT {what} ON "{table}" TO "{name}"')
                urls[role] = _role_url(engine.url, name, password)
    except ProgrammingError as error:
        line = str(error.orig).strip().splitlines()[0]
        raise AuroraError(
            f"the store's role may not make the roles of the SQL page ({line}); "
            "let an administrator run: aurora-sgl dashboard sql-role"
        ) from None
    return urls


def keep_roles(path: Path, urls: Mapping[str, str]) -> None:
    """Write the URLs where only this user reads them."""
    atomic.replace_file(path, json.dumps(dict(urls)).encode(), mode=0o600)


def kept_role(path: Path, role: str) -> str:
    """The URL of the SQL role for viewer or operator; empty when none was made."""
    try:
        return str(json.loads(path.read_text()).get(role, ""))
    except (OSError, ValueError):
        return ""


def _granted(table: str, role: str) -> str:
    if role == "operator":
        return "SELECT"
    if table in TOKEN_VIEWS:
        return ""
    hidden = TOKEN_COLUMNS.get(table)
    if not hidden:
        return "SELECT"
    columns = [c.name for c in Base.metadata.tables[table].columns if c.name not in hidden]
    return "SELECT (" + ", ".join(f'"{column}"' for column in columns) + ")"


def _role_name(database: str, role: str) -> str:
    return f"aurora_sql_{role}_{re.sub(r'[^a-z0-9_]', '_', database.lower())}"[:63]


def _role_url(url: URL, name: str, password: str) -> str:
    changed = url.set(username=name, password=password)
    return changed.render_as_string(hide_password=False)


def _readable(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.hex() if isinstance(value, bytes | memoryview) else value for value in row)
