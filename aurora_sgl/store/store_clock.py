"""The store's clock: one time for all machines of a fleet, whatever their own clocks say.

Who is still there is decided by it. In SQLite it is the clock of the machine that holds the file.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Dialect, Interval, String, TypeDecorator, literal, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

from aurora_sgl.store.models import UtcDateTime


class StoreNow(FunctionElement[datetime]):
    """The present moment in a statement, or one that lies some seconds back."""

    type = UtcDateTime()
    inherit_cache = True

    def __init__(self, seconds_ago: float = 0.0) -> None:
        super().__init__(literal(float(seconds_ago), _SecondsAgo()))


class _SecondsAgo(TypeDecorator[float]):
    """Seconds back, as each database adds them to a moment."""

    impl = Interval
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(String() if dialect.name == "sqlite" else Interval())

    def process_bind_param(self, value: float | None, dialect: Dialect) -> Any:
        seconds = float(value or 0.0)
        return f"{-seconds:.3f} seconds" if dialect.name == "sqlite" else timedelta(seconds=seconds)


@compiles(StoreNow, "sqlite")
def _in_sqlite(element: StoreNow, compiler: SQLCompiler, **_: Any) -> str:
    """As ``UtcDateTime`` stores it: with six digits after the point."""
    ago = compiler.process(element.clauses)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {ago}) || '000')"


@compiles(StoreNow, "postgresql")
def _in_postgresql(element: StoreNow, compiler: SQLCompiler, **_: Any) -> str:
    """Not the beginning of the transaction, which may have waited."""
    return f"(clock_timestamp() - {compiler.process(element.clauses)})"


def store_now(s: Session) -> datetime:
    """The present moment by the store's clock."""
    moment = s.scalar(select(StoreNow()))
    assert isinstance(moment, datetime)
    return moment
