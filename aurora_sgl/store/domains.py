"""Which names of domains a group's records may use on one day: at most so many, the rest is one.

Clients name domains as they like, and roll-ups, pages and metrics have a row or a line for each. So
a day of a group has the first names that came, each a lease that ends some days later, and what
comes after them counts as ``OTHER``. It is decided in the transaction that stores a request, under
a lock of the group and day, so that all servers of a group decide alike.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Connection, Engine, delete, select, update
from sqlalchemy.orm import Session

from aurora_sgl.clock import utc_now
from aurora_sgl.store.models import Lease
from aurora_sgl.store.upsert import insert_missing

OTHER = "other"
DEFAULT = "default"
#: Names that always may be used, and count for nothing.
ALWAYS = frozenset((OTHER, DEFAULT))
#: How long a name is kept: a spool may be read days late.
KEPT = timedelta(days=8)
_DAYS = 16  # of groups, whose names a process remembers
_PREFIX = "domain/"

Wanted = tuple[date, str]  # a day (UTC), a client's name


class _Remembered:
    """What one process knows of the names of a store: only what was committed."""

    def __init__(self) -> None:
        self._days: OrderedDict[tuple[int, date], frozenset[str]] = OrderedDict()
        self._beyond: set[tuple[int, date]] = set()  # those that have no room, which is stored
        self._lock = threading.Lock()

    def get(self, group_id: int, day: date) -> frozenset[str] | None:
        with self._lock:
            return self._days.get((group_id, day))

    def put(self, group_id: int, day: date, names: frozenset[str]) -> None:
        with self._lock:
            self._days[group_id, day] = names
            self._days.move_to_end((group_id, day))
            while len(self._days) > _DAYS:
                self._beyond.discard(self._days.popitem(last=False)[0])

    def is_beyond(self, group_id: int, day: date) -> bool:
        with self._lock:
            return (group_id, day) in self._beyond

    def beyond(self, group_id: int, days: Iterable[date]) -> None:
        with self._lock:
            self._beyond.update((group_id, day) for day in days)


_remembered: WeakKeyDictionary[Engine, _Remembered] = WeakKeyDictionary()


class DomainNames:
    """The names of one transaction of a group; ``committed`` when it was."""

    def __init__(self, connection: Connection, group_id: int, most: int) -> None:
        self._connection, self._group_id, self._most = connection, group_id, most
        self._memory = _remembered.setdefault(connection.engine, _Remembered())
        self._read: dict[date, frozenset[str]] = {}
        self._beyond: set[date] = set()

    def settle(self, wanted: Iterable[Wanted]) -> dict[Wanted, str]:
        """The name that each of these gets. In the order in which they came: the first win."""
        unknown: dict[date, dict[str, None]] = {}
        keys = list(dict.fromkeys(wanted))
        for day, name in keys:
            if name not in ALWAYS and name not in self._known(day) and not self._is_full(day):
                unknown.setdefault(day, {})[name] = None
        for day in sorted(unknown):  # one order, so that two servers never wait for each other
            self._admit(day, list(unknown[day]))
        settled = {
            (day, name): name if name in ALWAYS or name in self._known(day) else OTHER
            for day, name in keys
        }
        self._say({day for (day, name), own in settled.items() if own != name})
        return settled

    def committed(self) -> None:
        for day, names in self._read.items():
            self._memory.put(self._group_id, day, names)
        self._memory.beyond(self._group_id, self._beyond)

    def _known(self, day: date) -> frozenset[str]:
        return self._read.get(day) or self._memory.get(self._group_id, day) or frozenset()

    def _is_full(self, day: date) -> bool:
        return len(self._known(day)) >= self._most

    def _admit(self, day: date, names: list[str]) -> None:
        """Under the lock of the day: give these their names while there is room."""
        prefix = _prefix(self._group_id, day)
        self._insert([prefix])
        lease = select(Lease.name).where(Lease.name == prefix)
        self._connection.execute(lease.with_for_update())
        if self._memory.get(self._group_id, day) is None:
            self._forget_old()
        taken = _names(self._connection, self._group_id, day)
        room = max(0, self._most - len(taken))
        new = [name for name in names if name not in taken][:room]
        self._insert([prefix + name for name in new])
        self._read[day] = frozenset((*taken, *new))

    def _say(self, days: set[date]) -> None:
        """Store that more names came than there is room for, once."""
        for day in sorted(days):
            if not self._memory.is_beyond(self._group_id, day):
                row = update(Lease).where(Lease.name == _prefix(self._group_id, day))
                self._connection.execute(row.values(holder=str(self._most)))
                self._beyond.add(day)

    def _insert(self, names: list[str]) -> None:
        now = utc_now()
        common = {"holder": "", "token": 1, "acquired_at": now, "expires_at": now + KEPT}
        insert_missing(self._connection, Lease, [{"name": n, **common} for n in names], ["name"])

    def _forget_old(self) -> None:
        self._connection.execute(
            delete(Lease).where(_begins(_PREFIX), Lease.expires_at < utc_now())
        )


def day_of(moment: datetime) -> date:
    return moment.astimezone(UTC).date()


def names_of_days(connection: Connection) -> set[str]:
    """Of all groups and days."""
    return {name for _, name in _leases(connection)} - {""}


def forget_name(connection: Connection, name: str) -> None:
    """On no day has any group this name any more; a process that knows it goes on with it."""
    leases = [lease for lease, own in _leases(connection) if own == name]
    for lease in leases:
        connection.execute(delete(Lease).where(Lease.name == lease))


def _leases(connection: Connection) -> list[tuple[str, str]]:
    """The leases of names, and the names, which may have slashes in them."""
    leases = connection.scalars(select(Lease.name).where(_begins(_PREFIX))).all()
    return [(lease, lease.split("/", 3)[3]) for lease in leases]


def limit_reached(s: Session, group_id: int, day: date) -> int | None:
    """How many names a group had on a day, where that was all that there was room for and others
    came; ``None``: all names had room."""
    holder = s.scalar(select(Lease.holder).where(Lease.name == _prefix(group_id, day)))
    return int(holder) if holder else None


def _names(connection: Connection, group_id: int, day: date) -> set[str]:
    prefix = _prefix(group_id, day)
    rows = connection.scalars(select(Lease.name).where(_begins(prefix)))
    return {name.removeprefix(prefix) for name in rows} - {""}


def _begins(prefix: str) -> ColumnElement[bool]:
    return Lease.name.startswith(prefix, autoescape=True)


def _prefix(group_id: int, day: date) -> str:
    return f"{_PREFIX}{group_id}/{day.isoformat()}/"
