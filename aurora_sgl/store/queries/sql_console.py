"""One statement that somebody typed, run so that it can only read, and only what it may.

It runs in a process of its own, see ``store.sql_child``, which the kernel ends when its time or its
memory is used up. PostgreSQL: with a login role of its own (``make_sql_roles``) that was granted
SELECT and nothing else.

Viewers see no tokens and no hashes of them: in SQLite the columns read as NULL, in PostgreSQL they
are not granted.
"""

from __future__ import annotations

import json
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from sqlalchemy import Engine, inspect, make_url
from sqlalchemy.engine import URL

from aurora_sgl import atomic
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import sql_child
from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.models import Base

SECONDS, ROWS = 5.0, 1000
#: Of an answer, and of the memory of the process that reads it.
ANSWER_BYTES, MEMORY_BYTES = 8 << 20, 256 << 20
STATEMENT_LENGTH = 20_000
#: Statements that run at once; others wait. With them ends what all together can take.
_SEATS = BoundedSemaphore(3)
VIEWS = (
    "v_accept_length_by_version",
    "v_accept_length_by_domain_hour",
    "v_deployment_history",
    "v_acceptance_event",
    "v_rejected_tokens",
)
TABLES = tuple(sorted(set(Base.metadata.tables) - {"store_key"}))
#: Tokens, and hashes by which two requests are known to have the same ones.
TOKEN_COLUMNS = {
    "acceptance_event": {"draft_tokens", "target_tokens"},
    "request": {"conversation_hash"},
    "trace": {"prompt_sha256", "head_sha256", "prefix_sha256", "prompt_key", "answer_key"},
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
    task = task_of(
        engine, statement, with_tokens=with_tokens, role_url=role_url, rows=rows, seconds=seconds
    )
    begun = time.monotonic()
    read = _read(task)
    return Answer(
        read.columns,
        [tuple(map(_value, row)) for row in read.rows],
        time.monotonic() - begun,
        read.cut,
    )


def task_of(
    engine: Engine, statement: str, *, with_tokens: bool, role_url: str, rows: int, seconds: float
) -> sql_child.Task:
    """Raises ``AuroraError``."""
    typed = statement.strip().rstrip(";").strip()
    if not typed:
        raise AuroraError("type a statement first, SELECT ... FROM ...")
    if len(typed) > STATEMENT_LENGTH:
        raise AuroraError(f"a statement may have {STATEMENT_LENGTH:,} characters at most")
    if not is_sqlite(engine) and not role_url:
        raise AuroraError(
            "on PostgreSQL this page logs in with a role of its own; make it once with: "
            "aurora-sgl dashboard sql-role"
        )
    hidden = {} if with_tokens else {name: sorted(of) for name, of in TOKEN_COLUMNS.items()}
    return sql_child.Task(
        statement=typed,
        path=(engine.url.database or "") if is_sqlite(engine) else "",
        url=_libpq_url(role_url),
        search_path="" if "search_path" in str(engine.url.query.get("options")) else "public",
        tables=[*TABLES, *VIEWS],
        hidden=hidden,
        rows=rows,
        bytes=ANSWER_BYTES,
        memory=MEMORY_BYTES,
        seconds=seconds,
    )


def _libpq_url(role_url: str) -> str:
    if not role_url:
        return ""
    url = make_url(role_url).set(drivername="postgresql")
    return url.render_as_string(hide_password=False)


def _read(task: sql_child.Task) -> sql_child.Read:
    """In a process of its own. Raises ``AuroraError``."""
    if not _SEATS.acquire(timeout=2 * task.seconds):
        raise AuroraError("others are asking the store just now; try again in a moment")
    try:
        done = subprocess.run(
            # Without site-packages, where PostgreSQL's driver lies, it starts in half the time.
            [sys.executable, "-I", *(["-S"] if task.path else []), sql_child.__file__],
            input=json.dumps(task._asdict()).encode(),
            capture_output=True,
            timeout=task.seconds + 60,  # of starting and of telling; it ends itself long before
        )
    except subprocess.TimeoutExpired:
        raise AuroraError(sql_child.stopped(task.seconds)) from None
    finally:
        _SEATS.release()
    if -done.returncode in (signal.SIGALRM, signal.SIGXCPU):
        raise AuroraError(sql_child.stopped(task.seconds))
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise AuroraError(
            f"the process that ran the statement ended without an answer (code {done.returncode}), "
            "most likely for want of memory; ask for less"
        ) from None
    if "error" in answer:
        raise AuroraError(answer["error"])
    return sql_child.Read(**answer)


def _value(value: Any) -> Any:
    """What ``sql_child`` wrote as JSON, as it was."""
    if not isinstance(value, dict):
        return value
    return datetime.fromisoformat(value["time"]) if "time" in value else value["json"]


#: Whoever logs in with such a role begins with these.
ROLE_SETTINGS = (
    "default_transaction_read_only = on",
    f"statement_timeout = {int(SECONDS * 1000)}",
    "lock_timeout = 1000",
    "idle_in_transaction_session_timeout = 10000",
)
#: Only a superuser may set these. Without the first a server's log has each statement's parse tree,
#: without the second a sort may take as much disk as it can write in the limit of time.
SUPERUSER_SETTINGS = ("log_min_messages = fatal", "temp_file_limit = '1GB'")


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

            names = "SELECT current_database(), quote_ident(current_schema())"
            database, schema = map(str, connection.exec_driver_sql(names).one())
            place = database if schema == "public" else f"{database}_{schema}"
            for role in ("viewer", "operator"):
                name = _role_name(place, role)
                password = secrets.token_hex(24)
                exists = connection.exec_driver_sql(
                    f"SELECT 1 FROM pg_roles WHERE rolname = '{name}'"
                ).scalar()
                verb = "ALTER" if exists else "CREATE"
                do(
                    f'{verb} ROLE "{name}" LOGIN NOINHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE '
                    f"CONNECTION LIMIT 8 PASSWORD '{password}'"
                )
                for setting in ROLE_SETTINGS:
                    do(f'ALTER ROLE "{name}" SET {setting}')
                do(f'ALTER ROLE "{name}" IN DATABASE "{database}" SET search_path = {schema}')
                for setting in SUPERUSER_SETTINGS:
                    with suppress(ProgrammingError), connection.begin_nested():
                        do(f'ALTER ROLE "{name}" SET {setting}')
                do(f'REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM "{name}"')
                do(f'GRANT USAGE ON SCHEMA {schema} TO "{name}"')
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
