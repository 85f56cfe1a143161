"""The store's clock: one time for all machines of a fleet, whatever their own clocks say.

Who is still there is decided by it. In SQLite it is the clock of the machine that holds the file.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from aurora_sgl.store.models import UtcDateTime


class StoreNow(FunctionElement[datetime]):
    """The present moment in a statement, or one that lies some seconds back."""

    type = UtcDateTime()
    inherit_cache = False  # the seconds are part of the text

    def __init__(self, seconds_ago: float = 0.0) -> None:
        super().__init__()
        self.seconds_ago = float(seconds_ago)


@compiles(StoreNow, "sqlite")
def _in_sqlite(element: StoreNow, compiler: SQLCompiler, **_: Any) -> str:
    """As ``UtcDateTime`` stores it: with six digits after the point."""
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', '{-element.seconds_ago:.3f} seconds') || '000')"


@compiles(StoreNow, "postgresql")
def _in_postgresql(element: StoreNow, compiler: SQLCompiler, **_: Any) -> str:
    """Not the beginning of the transaction, which may have waited."""
    return f"(clock_timestamp() - make_interval(secs => {element.seconds_ago:.3f}))"


def store_now(s: Session) -> datetime:
    """The present moment by the store's clock."""
    moment = s.scalar(select(StoreNow()))
    assert isinstance(moment, datetime)
    return moment
