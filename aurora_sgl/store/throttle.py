"""How fast one may guess passwords, counted in the accounts' file.

By name and address together, and more loosely by address; never by the name alone, since whoever
knows a name could then keep its owner out. Failures fade with time, so that a slow guesser reaches
neither limit: one wrong login every few minutes keeps nobody out.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network

#: Seconds after which one failure is forgotten. Guesses of one name from one address settle at one
#: in two minutes, some 700 a day, against passwords of at least ten characters.
FADE_SECONDS = 120.0

TABLE = """
CREATE TABLE IF NOT EXISTS failed_login (
    key TEXT PRIMARY KEY, level REAL NOT NULL, at REAL NOT NULL);
DROP TABLE IF EXISTS failure
"""


@dataclass(frozen=True)
class Limit:
    """Failures up to ``free`` cost nothing; each one more doubles the wait, up to the longest."""

    free: int
    longest: float  # seconds


PAIR = Limit(3, 300.0)
#: One address may be many people's (an office, a proxy that is not trusted): they share this one.
ADDRESS = Limit(30, 60.0)

Keys = tuple[tuple[str, Limit], tuple[str, Limit]]


def keys_of(name: str, address: str) -> Keys:
    """What a try counts under. Hashes: a mistyped name may be a password."""
    place = _place(address)
    return (_key("pair", name, place), PAIR), (_key("address", place), ADDRESS)


def wait(db: sqlite3.Connection, keys: Keys) -> float:
    """Seconds until another try is looked at; 0 or less: now."""
    now = time.time()
    return max(_until(db, key, limit) - now for key, limit in keys)


def count(db: sqlite3.Connection, keys: Keys) -> None:
    """One more failed try."""
    now = time.time()
    db.execute("DELETE FROM failed_login WHERE ? - at > level * ? OR at > ?",
               [now, FADE_SECONDS, now])  # fmt: skip
    for key, _ in keys:
        level, since = _row(db, key) or (0.0, now)
        faded = max(0.0, level - (now - since) / FADE_SECONDS)
        db.execute("INSERT OR REPLACE INTO failed_login VALUES (?, ?, ?)", [key, faded + 1, now])


def forgive(db: sqlite3.Connection, keys: Keys) -> None:
    """After a login that fits: its name begins anew at this address. The address gets back this
    try alone, so that nobody with an account clears what he guessed for others."""
    (pair, _), (address, _) = keys
    db.execute("DELETE FROM failed_login WHERE key = ?", [pair])
    db.execute("UPDATE failed_login SET level = max(0, level - 1) WHERE key = ?", [address])


def _until(db: sqlite3.Connection, key: str, limit: Limit) -> float:
    row = _row(db, key)
    if row is None:
        return 0.0
    level, since = row
    beyond = round(level) - limit.free
    if beyond <= 0 or since > time.time():  # the clock was set back: nothing is known any more
        return 0.0
    return since + min(limit.longest, 2.0 ** min(beyond, 12))


def _row(db: sqlite3.Connection, key: str) -> tuple[float, float] | None:
    row = db.execute("SELECT level, at FROM failed_login WHERE key = ?", [key]).fetchone()
    return (float(row[0]), float(row[1])) if row else None


def _place(address: str) -> str:
    """Where somebody is: of IPv6 the network, in which one machine has any number of addresses."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if not isinstance(ip, IPv6Address):
        return str(ip)
    return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()
