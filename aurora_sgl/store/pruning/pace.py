"""Small transactions with rests between them, so that nobody who writes ever waits for retention.

SQLite has one write lock: a transaction holds it for some tens of milliseconds, and twice as long
nobody of retention does. In PostgreSQL a statement that would wait for somebody gives up soon, so
that no queue forms behind it, and is tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from aurora_sgl.store.connection import is_sqlite
from aurora_sgl.store.faults import Kind, fault_of, in_words

#: Seconds that a transaction should take, and rows of one to begin with, at least and at most.
TARGET_SECONDS = 0.03
FIRST_ROWS, LEAST_ROWS, MOST_ROWS = 500, 50, 5_000
#: A rest is so many times as long as the transaction before it.
REST = 2.0
#: In PostgreSQL: milliseconds after which a statement that waits for a lock gives up. Whoever comes
#: behind it waits as long, so it is well below a second.
LOCK_MS = 300
#: Tries of a transaction that somebody was in the way of, and seconds between them.
TRIES, PAUSE_SECONDS = 5, 0.5

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The process stops, or another one prunes now: the rest is left to the next round."""


class PrunePace:
    """Runs the transactions of one round. ``carry_on`` is asked between them, and may renew a
    lease; where it says no the round ends with :class:`Interrupted`."""

    def __init__(
        self,
        carry_on: Callable[[], bool] = lambda: True,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        stop: threading.Event | None = None,
    ) -> None:
        self._carry_on, self._monotonic = carry_on, monotonic
        self._stop = stop or threading.Event()
        self.rows = FIRST_ROWS
        self.longest = 0.0  # seconds of a transaction, for those who measure

    def all_of(self, engine: Engine, work: Callable[[Connection, int], int]) -> int:
        """Call ``work(connection, at most so many rows)`` until it says that it took none; how
        many it took in all. Raises what the database raises, and :class:`Interrupted`."""
        total = 0
        while count := self.once(engine, work):
            total += count
        return total

    def once(
        self, engine: Engine, work: Callable[[Connection, int], int], tries: int = TRIES
    ) -> int:
        """One transaction, and the rest after it."""
        for left in reversed(range(tries)):
            try:
                count, seconds = self._transaction(engine, work)
            except DBAPIError as error:
                fault = fault_of(error)
                if not left or fault is None or fault.kind is not Kind.BUSY:
                    raise
                log.debug("retention waits: %s", in_words(error))
                self.rest(PAUSE_SECONDS)
                continue
            self._learn(count, seconds)
            self.rest(REST * seconds)
            return count
        raise AssertionError

    def _transaction(
        self, engine: Engine, work: Callable[[Connection, int], int]
    ) -> tuple[int, float]:
        with engine.begin() as connection:  # SQLite: its lock is held from here on
            begun = self._monotonic()
            if not is_sqlite(engine):
                connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_MS}"))
            count = work(connection, self.rows)
        return count, self._monotonic() - begun

    def _learn(self, count: int, seconds: float) -> None:
        self.longest = max(self.longest, seconds)
        if seconds > TARGET_SECONDS:
            self.rows = max(LEAST_ROWS, self.rows // 2)
        elif seconds < TARGET_SECONDS / 2 and count >= self.rows:
            self.rows = min(MOST_ROWS, self.rows * 2)

    def rest(self, seconds: float) -> None:
        if self._stop.wait(seconds) or not self._carry_on():
            raise Interrupted
