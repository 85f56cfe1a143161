"""The process in which one statement of the SQL page runs.

A script: ``queries.sql_console`` starts it by its path, with nothing of ours imported, so that it
is there in some hundredths of a second. A task comes as JSON on its input, the answer or one line
of refusal goes as JSON to its output. Whatever the statement does, the limits lie outside its
reach: the kernel ends this process when its time or its memory is used up, also inside of one
function of SQLite that never comes back; the dashboard loses nothing.

SQLite: the file opened read-only, and an authorizer that allows SELECT from the named tables and
nothing else. PostgreSQL: the statement is parsed by the server first, without being run, and the
server's own parse tree says what it is. Only a SELECT from the named tables whose functions
PostgreSQL knows to be without side effects is run, once, in a read-only transaction.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

#: Bytes of the largest value that a statement may make in SQLite.
VALUE_BYTES = 4_000_000
#: Functions of SQLite that reach beyond the database, or say what is not asked.
FUNCTIONS_REFUSED = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}
#: Volatile functions of PostgreSQL that only tell a number or a time.
HARMLESS = ["random", "clock_timestamp", "gen_random_uuid"]
#: Seconds that a connection may take, and those between our limit of time and the kernel's.
CONNECT_SECONDS, GRACE = 5, 1.0
MEGABYTE = 1 << 20

REFUSED = "this page only reads, and only the public tables and views; they are listed beside it"


class RefusedStatement(Exception):
    """One line of why not."""


class Task(NamedTuple):
    """``path``: of the SQLite file; empty for PostgreSQL at ``url``. ``hidden``: columns that read
    as NULL, by table; in PostgreSQL they are not granted."""

    statement: str
    path: str
    url: str
    search_path: str  # empty: as the URL says
    tables: list[str]
    hidden: dict[str, list[str]]
    rows: int
    bytes: int
    memory: int
    seconds: float


class Read(NamedTuple):
    columns: list[str]
    rows: list[list[Any]]
    cut: bool  # there were more rows than fit into the limits


def main() -> None:
    task = Task(**json.load(sys.stdin))
    try:
        if not task.path:
            import psycopg  # noqa: F401  before memory is counted

        limit_time(task.seconds + (0 if task.path else CONNECT_SECONDS))
        limit_memory(task.memory)
        if task.path:  # SQLite then says itself that there is no more; it holds for the process
            sqlite3.connect(":memory:").execute(f"PRAGMA hard_heap_limit = {task.memory}")
        answer: dict[str, Any] = (read_sqlite if task.path else read_postgres)(task)._asdict()
    except RefusedStatement as refused:
        answer = {"error": str(refused)}
    except MemoryError:
        answer = {"error": f"stopped: it took more than {task.memory // MEGABYTE} MB of memory"}
    json.dump(answer, sys.stdout)


def limit_time(seconds: float) -> None:
    """A signal that nobody catches."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
    cpu = math.ceil(time.process_time() + seconds + GRACE) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_memory(count: int) -> None:
    """To so many bytes more than there are now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        pages = 0
    count += pages * resource.getpagesize()
    with contextlib.suppress(ValueError, OSError):  # not every system can
        resource.setrlimit(resource.RLIMIT_AS, (count, count))


def taken(task: Task, columns: list[str], rows: Iterable[tuple[Any, ...]]) -> Read:
    """The first rows within the limits."""
    kept: list[list[Any]] = []
    size = 0
    for row in rows:
        size += sum(map(sys.getsizeof, row))
        if size > task.bytes and not kept:
            raise RefusedStatement(
                f"a row of the answer is larger than {task.bytes // MEGABYTE} MB; ask for less"
            )
        if size > task.bytes or len(kept) >= task.rows:
            return Read(columns, kept, True)
        kept.append([_plain(value) for value in row])
    return Read(columns, kept, False)


def _plain(value: Any) -> Any:
    """What JSON takes: numbers are numbers, whatever the database calls them."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes | memoryview):
        return value.hex()
    if isinstance(value, Decimal):
        return _number(value)
    if isinstance(value, datetime):
        return {"time": value.isoformat()}
    if isinstance(value, dict | list):
        return {"json": json.loads(json.dumps(value, default=str))}
    return str(value)


def _number(value: Decimal) -> float | int | str:
    if not value.is_finite():
        return float(value)
    if value.adjusted() > 300:
        return str(value)
    return int(value) if value == value.to_integral_value() else float(value)


# -- SQLite ---------------------------------------------------------------------------------


def read_sqlite(task: Task) -> Read:
    """Raises ``RefusedStatement``."""
    until = time.monotonic() + task.seconds
    try:
        with closing(
            sqlite3.connect(f"file:{_quoted(task.path)}?mode=ro", uri=True, timeout=2)
        ) as db:
            _prepare(db, task)
            db.set_progress_handler(lambda: int(time.monotonic() > until), 10_000)
            cursor = db.execute(task.statement)
            columns = [column[0] for column in cursor.description or ()]
            return taken(task, columns, cursor)
    except (sqlite3.Error, ValueError) as error:
        raise RefusedStatement(_sqlite_line(str(error), task.seconds)) from None


def _prepare(db: sqlite3.Connection, task: Task) -> None:
    db.execute("PRAGMA query_only = ON")
    db.execute("PRAGMA temp_store = MEMORY")
    # Built here: while the authorizer watches, SQLite could not declare their columns.
    db.execute("SELECT 1 FROM json_each('[]'), json_tree('[]')")
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES)
    db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    db.text_factory = lambda text: text.decode(errors="replace")
    db.set_authorizer(_authorizer(set(task.tables), task.hidden))


def _authorizer(readable: set[str], hidden: dict[str, list[str]]) -> Callable[..., int]:
    def decide(
        action: int, one: str | None, two: str | None, database: str | None, _: str | None
    ) -> int:
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION:
            is_refused = (two or "").lower() in FUNCTIONS_REFUSED
            return sqlite3.SQLITE_DENY if is_refused else sqlite3.SQLITE_OK
        if action != sqlite3.SQLITE_READ:
            return sqlite3.SQLITE_DENY
        table, column = (one or "").lower(), (two or "").lower()
        if column in hidden.get(table, ()):
            return sqlite3.SQLITE_IGNORE  # reads as NULL
        is_readable = table in readable or table in ("json_each", "json_tree")
        # A common table expression or subquery has no database; a table of it always has.
        return sqlite3.SQLITE_OK if is_readable or not database else sqlite3.SQLITE_DENY

    return decide


def _sqlite_line(message: str, seconds: float) -> str:
    if message == "interrupted":
        return stopped(seconds)
    if any(word in message for word in ("authoriz", "prohibited", "readonly")):
        return f"refused ({message}): {REFUSED}"
    if "one statement" in message:
        return "one statement at a time, please"
    return message


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def stopped(seconds: float) -> str:
    return f"stopped after {seconds:.0f} s; ask for less, or add a WHERE on a time"


# -- PostgreSQL -----------------------------------------------------------------------------


def read_postgres(task: Task) -> Read:
    """Raises ``RefusedStatement``."""
    import psycopg

    try:
        with closing(psycopg.connect(task.url, connect_timeout=CONNECT_SECONDS)) as connection:
            connection.read_only = True
            for name, value in {
                "statement_timeout": int(task.seconds * 1000),
                "lock_timeout": 1000,
                "timezone": "UTC",
                **({"search_path": task.search_path} if task.search_path else {}),
            }.items():  # local: they hold behind a pooler of connections too
                connection.execute(f"SET LOCAL {name} = '{value}'")
            columns = _checked(connection, task)
            with connection.cursor() as cursor:
                # stream() takes one statement, and one row of it at a time.
                return taken(task, columns, cursor.stream(task.statement.encode()))
    except (psycopg.Error, ValueError) as error:
        raise RefusedStatement(_postgres_line(error, task.seconds)) from None


def _checked(connection: Any, task: Task) -> list[str]:
    """The columns of the statement, which is parsed and not run. Raises ``RefusedStatement``."""
    trees: list[str] = []

    def keep(notice: Any) -> None:
        if str(notice.message_primary).startswith("parse tree"):
            trees.append(notice.message_detail or "")

    for setting in ("client_min_messages = log", "debug_pretty_print = off"):
        connection.execute(f"SET LOCAL {setting}")
    connection.execute("SET LOCAL debug_print_parse = on")
    connection.add_notice_handler(keep)
    columns = _parsed(connection, task.statement)
    connection.remove_notice_handler(keep)
    for setting in ("debug_print_parse = off", "client_min_messages = warning"):
        connection.execute(f"SET LOCAL {setting}")
    _judge(connection, task, "\n".join(trees))
    return columns


def _parsed(connection: Any, statement: str) -> list[str]:
    from psycopg.errors import error_from_result
    from psycopg.pq import ExecStatus

    for result in (
        connection.pgconn.prepare(b"", statement.encode()),
        connection.pgconn.describe_prepared(b""),
    ):
        if result.status != ExecStatus.COMMAND_OK:
            raise error_from_result(result, connection.info.encoding)
    return [result.fname(i).decode(errors="replace") for i in range(result.nfields)]


def _judge(connection: Any, task: Task, tree: str) -> None:
    """Names in a tree are written with their blanks escaped, so that none of them looks like one of
    these fields. A server that shows no tree has its statements refused."""
    if set(_fields("commandType", tree)) != {1}:  # of the statement and of all that is in it
        raise RefusedStatement(f"refused (it is not a SELECT): {REFUSED}")
    functions = sorted(set(_fields("funcid|opfuncid|aggfnoid|winfnoid", tree)) - {0})
    row = connection.execute(
        "SELECT proname FROM pg_proc WHERE oid = ANY(%s::oid[]) AND (pronamespace <> 11 OR "
        "(provolatile = 'v' AND proname <> ALL(%s))) LIMIT 1",
        (functions, HARMLESS),
    ).fetchone()
    if row:
        raise RefusedStatement(f"refused (the function {row[0]} may do more than read): {REFUSED}")
    row = connection.execute(
        "SELECT oid::regclass::text FROM pg_class WHERE oid = ANY(%s::oid[]) AND NOT "
        "(relname = ANY(%s) AND relnamespace = to_regnamespace(quote_ident(current_schema()))) "
        "LIMIT 1",
        (sorted(set(_fields("relid", tree)) - {0}), task.tables),
    ).fetchone()
    if row:
        raise RefusedStatement(f"refused (permission denied for {row[0]}): {REFUSED}")


def _fields(names: str, tree: str) -> list[int]:
    return [int(number) for number in re.findall(rf":(?:{names})\s+(\d+)", tree)]


def _postgres_line(error: Exception, seconds: float) -> str:
    state = getattr(error, "sqlstate", None) or ""
    message = " ".join(str(error).strip().splitlines()[:1]) or type(error).__name__
    if state == "57014":
        return stopped(seconds)
    if state in ("42501", "25006"):
        return f"refused ({message}): {REFUSED}"
    if "multiple commands" in message:
        return "one statement at a time, please"
    return message


if __name__ == "__main__":
    main()
