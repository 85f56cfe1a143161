"""Whose fault an error of the database is: the record's, or the store's, which somebody can mend.

An error of the data refuses one record; everything else means that the store is away and that
records wait. The two tables below are the only place that knows codes. What they don't name, and
a driver's error without a code, waits too.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import Any, NamedTuple

from sqlalchemy.exc import DBAPIError, DisconnectionError, TimeoutError

from aurora_sgl.errors import AuroraError


class Kind(Enum):
    """What to do about an error."""

    DATA = "refuse the record"
    BUSY = "try again on the same connection"
    AWAY = "try again on a new connection, until somebody has mended it"
    LOST_ROW = "make the row again that the record hangs on"


class Fault(NamedTuple):
    kind: Kind
    words: str  # for people: what is wrong


class LostRow(AuroraError):
    """A row that others hang on (a server's, a group's) is not in the store any more."""


class StoreBehind(AuroraError):
    """The store has less of a boot than it had: it failed over to a replica that was behind, or
    was restored."""

    def __init__(self, boot_id: int, taken: int) -> None:
        super().__init__(f"the store has forgotten what came after envelope {taken}")
        self.boot_id, self.taken = boot_id, taken


class BadRecord(AuroraError):
    """A record that no store would take."""


_VALUE = Fault(Kind.DATA, "a value does not fit its column")
_CHECK = Fault(Kind.DATA, "a rule of the table is broken")
_LOST = Fault(Kind.LOST_ROW, "a row that it belongs to is gone")
_SCHEMA = Fault(Kind.AWAY, "a table or column is missing or was changed")
_RIGHTS = Fault(Kind.AWAY, "rights are missing")
_READ_ONLY = Fault(Kind.AWAY, "the database is read-only")
_STANDBY = Fault(
    Kind.AWAY,
    "the database is read-only, as a standby is: AURORA_DATABASE_URL must name its primary, "
    "and a role that may write",
)
_FULL = Fault(Kind.AWAY, "the database has no room")
_DAMAGE = Fault(Kind.AWAY, "the database is damaged")
_FILE = Fault(Kind.AWAY, "the database's files can't be read or written")
_UNREACHABLE = Fault(Kind.AWAY, "the database can't be reached")
_LIMIT = Fault(Kind.AWAY, "a limit of the database is reached")
_BUSY = Fault(Kind.BUSY, "the database is busy")
_UNKNOWN = Fault(Kind.AWAY, "the database can't be used")

#: By SQLSTATE, or by its class (its first two characters) where no state of it differs.
POSTGRES = {
    "08": _UNREACHABLE,
    "22": _VALUE,
    "23": _CHECK,
    "23502": _SCHEMA,  # a column that we don't know of; ours are never left out
    "23503": _LOST,
    "25006": _STANDBY,
    "28": _RIGHTS,
    "3D": _UNREACHABLE,
    "3F": _SCHEMA,
    "40": _BUSY,
    "42": _SCHEMA,
    "42501": _RIGHTS,
    "53": _FULL,
    "53300": _UNREACHABLE,
    "54": _LIMIT,
    "54000": Fault(Kind.DATA, "a value is too long"),  # for an index, or for a row
    "55P03": _BUSY,
    "57": _UNREACHABLE,
    "57014": _BUSY,
    "58": _FILE,
    "XX001": _DAMAGE,
    "XX002": _DAMAGE,
}

#: By SQLite's extended code, or by the primary code (its low byte).
SQLITE = {
    1: _SCHEMA,  # ERROR: no such table or column
    3: _RIGHTS,  # PERM
    5: _BUSY,
    6: _BUSY,  # LOCKED
    8: _READ_ONLY,
    9: _BUSY,  # INTERRUPT
    10: _FILE,  # IOERR
    11: _DAMAGE,  # CORRUPT
    13: _FULL,
    14: _FILE,  # CANTOPEN
    17: _SCHEMA,
    18: Fault(Kind.DATA, "a value is too long"),  # TOOBIG
    20: _VALUE,  # MISMATCH
    23: _RIGHTS,  # AUTH
    26: _DAMAGE,  # NOTADB
    275: _CHECK,
    787: _LOST,  # CONSTRAINT_FOREIGNKEY
    1555: _CHECK,  # CONSTRAINT_PRIMARYKEY
    2067: _CHECK,  # CONSTRAINT_UNIQUE
    2579: _CHECK,  # CONSTRAINT_ROWID
    3091: _VALUE,  # CONSTRAINT_DATATYPE
}

#: How the rules begin that say which days lie where, see ``partitions``.
_OF_DAYS = "acceptance_event_p"

#: What Python raises for a value before a database sees it.
_PYTHON_DATA = (ValueError, OverflowError, TypeError, struct.error)


def fault_of(error: BaseException) -> Fault | None:
    """``None``: neither the record's nor the store's, but a defect of this program."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return _UNREACHABLE
    cause: Any = getattr(error, "orig", None) or error
    if isinstance(cause, LostRow):
        return _LOST
    if isinstance(cause, BadRecord):
        return _CHECK
    if _is_drivers(cause):
        return _of_driver(cause)
    if isinstance(cause, TimeoutError | DisconnectionError):  # of SQLAlchemy's pool
        return _BUSY
    return _VALUE if isinstance(cause, _PYTHON_DATA) else None


def is_away(error: BaseException) -> bool:
    """Whether trying the same again later can help: locked, full, restarting, unreachable, or
    something that somebody can mend in the database."""
    fault = fault_of(error)
    return fault is not None and fault.kind in (Kind.AWAY, Kind.BUSY)


def in_words(error: BaseException) -> str:
    """One line for people: what is wrong, and in brackets what the database said."""
    fault = fault_of(error)
    cause = str(getattr(error, "orig", None) or error).strip().splitlines() or [""]
    message = cause[0] or type(error).__name__
    return f"{fault.words} ({message})" if fault else message


def with_advice(error: BaseException) -> str:
    """:func:`in_words`, and what to do about rights that are missing, for who ran a command."""
    advice = "; AURORA_DATABASE_URL must name a role that may do this" if may_not(error) else ""
    return in_words(error) + advice


def may_not(error: BaseException) -> bool:
    """Whether PostgreSQL refused it because this role has no right to it."""
    return getattr(getattr(error, "orig", None), "sqlstate", "") == "42501"


def _is_drivers(cause: Any) -> bool:
    """By name, because a COPY raises the driver's own errors, not SQLAlchemy's."""
    names = {kind.__name__ for kind in type(cause).__mro__}
    return not names.isdisjoint({"DatabaseError", "InterfaceError"})


def _of_driver(cause: Any) -> Fault:
    if (code := getattr(cause, "sqlite_errorcode", None)) is not None:
        return SQLITE.get(code) or SQLITE.get(code & 0xFF) or _UNKNOWN
    state = getattr(cause, "sqlstate", None)
    if not state:
        names = {kind.__name__ for kind in type(cause).__mro__}
        is_value = "DataError" in names
        return _VALUE if is_value else _UNREACHABLE if "OperationalError" in names else _UNKNOWN
    if state == "23514" and (cause.diag.constraint_name or _OF_DAYS).startswith(_OF_DAYS):
        return _SCHEMA  # no partition for its day, or one that is just being made
    return POSTGRES.get(state) or POSTGRES.get(state[:2]) or _UNKNOWN
