"""Engines for PostgreSQL as people run it: behind a pooler, in a schema, over a network.

Nothing is asked at the start of a session that a pooler refuses, and nothing is left behind in one
that it gives to somebody else: no startup parameter of ours, no prepared statement, no lock or
setting that outlives its transaction. What the URL says wins over what is said here.

A peer that is gone is noticed by the kernel (keepalives, ``tcp_user_timeout``). One that takes
everything and answers nothing (a hung database, a proxy before a dead one) is noticed here: each
wait for an answer has an end, and the connection is closed then.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL

from aurora_sgl.store.options import SECONDS

T = TypeVar("T")

#: What libpq is told. A peer that is gone is noticed after some eleven seconds.
DEFAULTS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
}
#: The database ends a statement itself; this much later it is taken for gone.
GRACE_SECONDS = 3.0
#: The same for what belongs to no transaction: a look whether the connection is alive, a rollback.
ASIDE_SECONDS = 10.0
#: Seconds that the database waits for the next statement of a transaction before it gives back
#: its locks; the machine that held them may be gone.
IDLE_SECONDS = 300.0


class NoAnswer(psycopg.OperationalError):
    """The database took a statement and did not answer."""


class ImpatientConnection(psycopg.Connection[Any]):
    """Closes itself when an answer takes longer than ``seconds``; None: it waits."""

    seconds: float | None = ASIDE_SECONDS

    def wait(self, gen: PQGen[T], *rest: Any, **named: Any) -> T:
        if self.seconds is None:
            return super().wait(gen, *rest, **named)
        try:
            return super().wait(_within(gen, self.seconds), *rest, **named)
        except NoAnswer:
            self.pgconn.finish()
            raise


def _within(gen: PQGen[T], seconds: float) -> Generator[Any, Any, T]:
    """The same generator, ended when nothing came for so long. psycopg comes by ten times a second,
    with a state that is zero while the socket has nothing for us."""
    try:
        wanted = next(gen)
        until = time.monotonic() + seconds
        while True:
            ready = yield wanted
            if ready:
                until = time.monotonic() + seconds
            elif time.monotonic() > until:
                raise NoAnswer(f"no answer from the database for {seconds:.0f} s")
            wanted = gen.send(ready)
    except StopIteration as end:
        answer: T = end.value
        return answer


def make_engine(url: URL, seconds: float | None) -> Engine:
    """``seconds``: that one statement may take, unless the execution option says otherwise."""
    given = set(url.query)
    arguments: dict[str, Any] = {k: v for k, v in DEFAULTS.items() if k not in given}
    arguments["fallback_application_name"] = f"aurora-sgl {socket.gethostname()}:{os.getpid()}"
    # A pooler gives the next transaction another connection, which knows no statement of ours.
    arguments["prepare_threshold"] = None
    engine = create_engine(url, pool_pre_ping=True, connect_args=arguments)
    engine.update_execution_options(**{SECONDS: seconds})

    @event.listens_for(engine, "do_connect")
    def connect(_: Any, __: Any, positional: Any, named: Any) -> ImpatientConnection:
        return ImpatientConnection.connect(*positional, **named)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        limit: float | None = connection.get_execution_options().get(SECONDS)
        driver: Any = connection.connection.driver_connection
        driver.seconds = None if limit is None else limit + GRACE_SECONDS
        connection.exec_driver_sql(_settings(limit))

    @event.listens_for(engine, "reset")
    def reset(driver: Any, _: Any, __: Any) -> None:
        driver.seconds = ASIDE_SECONDS

    return engine


def _settings(seconds: float | None) -> str:
    """Those of one transaction: they end with it, so that a pooler's next client has none."""
    settings = {"timezone": "UTC"}
    if seconds is not None:
        settings |= {
            "statement_timeout": f"{round(1000 * seconds)}",
            "idle_in_transaction_session_timeout": f"{round(1000 * IDLE_SECONDS)}",
        }
    calls = (f"set_config('{name}', '{value}', true)" for name, value in settings.items())
    return f"SELECT {', '.join(calls)}"
