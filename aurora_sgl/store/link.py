"""The connection of a process that lives long to a store that may be away at any time."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from aurora_sgl.config import get_settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.connection import connect
from aurora_sgl.store.connection import session as open_session
from aurora_sgl.store.durable import commit_to_disk
from aurora_sgl.store.faults import Kind, fault_of, in_words, is_away
from aurora_sgl.store.schema import upgrade

#: Seconds between two tries to do work whose store is away.
PAUSE_SECONDS = 1.0
#: Seconds for which one try waits for somebody else's upgrade.
UPGRADE_SECONDS = 5.0

T = TypeVar("T")

log = logging.getLogger(__name__)


class StoreAway(Exception):
    """The store can't be used now; try again later."""


class StoreLink:
    """Connects, migrates and reconnects. Safe to share between threads."""

    def __init__(self, url: str, meanwhile: str = "", *, durable: bool = False) -> None:
        """``meanwhile``: what happens while the store is away, for the log. ``durable``: what was
        committed outlives a power cut."""
        self._url = url
        self._meanwhile = f", {meanwhile}" if meanwhile else ""
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._file: tuple[Path, int] | None = None  # SQLite: path and inode
        self._complained: dict[int, str] = {}  # by thread: one may fail while another does well
        self._durable = durable
        self.connects = 0  # grows with each new engine: what was cached of the store is old
        #: Grows with each new connection, also those that the engine makes by itself: the database
        #: behind it may be another one, to which this one failed over.
        self.connections = 0
        self.last_ok = 0.0  # time.monotonic() of the last success; 0: never

    def engine(self) -> Engine:
        """Raises :class:`StoreAway`."""
        with self._lock:
            if self._engine is not None and self._file is not None and not self._same_file():
                self._engine.dispose()
                self._engine = None
            if self._engine is None:
                self._engine = self._connect()
            return self._engine

    def _same_file(self) -> bool:
        assert self._file is not None
        path, inode = self._file
        try:
            return path.stat().st_ino == inode
        except OSError:
            return False

    def _connect(self) -> Engine:
        if self._file is not None and not self._file[0].exists():
            # Connecting would make an empty database where the old one was.
            self._complain(f"the database file {self._file[0]} is gone")
        engine = None
        try:
            engine = connect(self._url, seconds=get_settings().database_seconds)
            upgrade(engine, wait_seconds=UPGRADE_SECONDS)
        except (AuroraError, SQLAlchemyError, OSError) as error:
            if engine is not None:
                engine.dispose()
            self._complain(in_words(error.__cause__ or error))
        if engine.dialect.name == "sqlite" and engine.url.database:
            path = Path(engine.url.database)
            self._file = (path, path.stat().st_ino)
        if self._durable:
            commit_to_disk(engine)
        event.listen(engine, "connect", self._connected)
        self._connected()
        self.connects += 1
        return engine

    def _connected(self, *_: Any) -> None:
        self.connections += 1

    def _complain(self, why: str) -> NoReturn:
        line = why.splitlines()[0]
        if line != self._complained.get(threading.get_ident()):
            log.warning("the store is away%s: %s", self._meanwhile, line)
            self._complained[threading.get_ident()] = line
        raise StoreAway(line)

    def _ok(self) -> None:
        self.last_ok = time.monotonic()
        if self._complained.pop(threading.get_ident(), ""):
            log.info("the store is back")

    def away(self, error: Exception) -> NoReturn:
        """Raises :class:`StoreAway` with what is wrong in words. What somebody has to mend shows
        on a new connection only (rights, read-only, another file), so the next try makes one."""
        fault = fault_of(error)
        if fault is None or fault.kind is not Kind.BUSY:
            with self._lock:
                if self._engine is not None:
                    self._engine.dispose()
                    self._engine = None
        self._complain(in_words(error))

    @contextlib.contextmanager
    def guard(self) -> Iterator[Engine]:
        """An engine; errors of the store become :class:`StoreAway`, those of the data (see
        ``store.faults``) and of the program pass through."""
        with self._guarded(lambda: True) as engine:
            yield engine

    @contextlib.contextmanager
    def _guarded(self, was_asked: Callable[[], bool]) -> Iterator[Engine]:
        engine = self.engine()
        try:
            yield engine
        except Exception as error:
            if not is_away(error):
                raise
            self.away(error)
        else:
            if was_asked():
                self._ok()

    @contextlib.contextmanager
    def session(self, *, write: bool = True) -> Iterator[Session]:
        """A session in one transaction. Raises :class:`StoreAway`. One in which nothing was asked
        is no sign that the store is there."""
        begun: list[Any] = []
        with (
            self._guarded(lambda: bool(begun)) as engine,
            open_session(engine, write=write) as session,
        ):
            event.listen(session, "after_begin", lambda *_: begun.append(True))
            yield session

    def close(self) -> None:
        with self._lock:
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None


def patiently(work: Callable[[], T], seconds: float) -> T:
    """What ``work`` returns, done again from its start while the store is away, so long at most.

    For work that changes nothing, or the same, when it is repeated. Raises what it raised last.
    """
    deadline = time.monotonic() + seconds
    complained = False
    while True:
        try:
            return work()
        except Exception as error:
            if not is_away(error) or time.monotonic() + PAUSE_SECONDS > deadline:
                raise
            if not complained:
                log.warning("the store is away, waiting: %s", in_words(error))
            complained = True
            time.sleep(PAUSE_SECONDS)
