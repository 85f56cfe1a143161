"""Accounts of the dashboard, in a SQLite file of their own: nobody who may ask the store sees them.

Passwords are argon2id hashes; of session and set-up tokens only hashes are kept too. An account
without a password is one that logs in through OpenID Connect under that name.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.private import OWNER, denied, make_folder
from aurora_sgl.store import throttle

VIEWER, OPERATOR = "viewer", "operator"
ROLES = (VIEWER, OPERATOR)
SESSION_SECONDS = 12 * 3600.0
SETUP_SECONDS = 24 * 3600.0
SHORTEST_PASSWORD, LONGEST_PASSWORD = 10, 1024

TABLES = """
CREATE TABLE IF NOT EXISTS account (
    name TEXT PRIMARY KEY, role TEXT NOT NULL CHECK (role IN ('viewer', 'operator')),
    password_hash TEXT NOT NULL, created_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS session (
    token_hash TEXT PRIMARY KEY, name TEXT NOT NULL, expires_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS setup (token_hash TEXT PRIMARY KEY, expires_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS ended_login (login_hash TEXT PRIMARY KEY);
"""


@dataclass(frozen=True)
class Account:
    name: str
    role: str  # viewer | operator
    has_password: bool


class Accounts:
    """The accounts in one file, made with mode 0600 when it is missing.

    Raises ``AuroraError`` when it can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hasher = PasswordHasher()
        try:
            make_folder(path.parent)
            with suppress(FileExistsError):
                # Not opened when it is there: closing it would end SQLite's locks of this process.
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, OWNER.file))
            with self._transaction() as db:
                for statement in (TABLES + throttle.TABLE).split(";"):
                    db.execute(statement)
        except (OSError, sqlite3.Error) as error:
            why = denied(error) if isinstance(error, OSError) else error
            raise AuroraError(
                f"the accounts in {path} can't be opened ({why}); "
                "set AURORA_HOME to a folder that you can write"
            ) from None

    # -- accounts ---------------------------------------------------------------------------

    def all(self) -> list[Account]:
        with self._transaction(write=False) as db:
            rows = db.execute("SELECT name, role, password_hash FROM account ORDER BY name")
            return [Account(row[0], row[1], bool(row[2])) for row in rows]

    def get(self, name: str) -> Account | None:
        with self._transaction(write=False) as db:
            row = db.execute(
                "SELECT name, role, password_hash FROM account WHERE name = ?", [_folded(name)]
            ).fetchone()
        return Account(row[0], row[1], bool(row[2])) if row else None

    def add(self, name: str, role: str, password: str | None) -> Account:
        """Make an account, or change role and password of the one that is there; its sessions
        end. ``password`` None: it logs in through OpenID Connect.

        Raises ``AuroraError`` for a bad name, role or password.
        """
        name, hashed = self._checked(name, role, password)
        with self._transaction() as db:
            self._put(db, name, role, hashed)
        return Account(name, role, bool(hashed))

    def remove(self, name: str) -> None:
        """Raises ``AuroraError`` when there is none."""
        with self._transaction() as db:
            if not db.execute("DELETE FROM account WHERE name = ?", [_folded(name)]).rowcount:
                raise AuroraError(f"there is no account {name!r}")
            db.execute("DELETE FROM session WHERE name = ?", [_folded(name)])

    def _checked(self, name: str, role: str, password: str | None) -> tuple[str, str]:
        name = _folded(name)
        if not name or len(name) > 100 or not name.isprintable():
            raise AuroraError("an account needs a name of 1 to 100 printable characters")
        if role not in ROLES:
            raise AuroraError(f"there is no role {role!r}; there is: {', '.join(ROLES)}")
        if password is None:
            return name, ""
        if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
            raise AuroraError(f"a password needs at least {SHORTEST_PASSWORD} characters")
        return name, self._hasher.hash(password)

    @staticmethod
    def _put(db: sqlite3.Connection, name: str, role: str, hashed: str) -> None:
        db.execute(
            "INSERT INTO account VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
            "role = excluded.role, password_hash = excluded.password_hash",
            [name, role, hashed, time.time()],
        )
        db.execute("DELETE FROM session WHERE name = ?", [name])

    # -- the first operator -----------------------------------------------------------------

    def offer_setup(self) -> str | None:
        """A token that makes the first operator, once; an older one is void. ``None``: there are
        accounts already."""
        if self.all():
            return None
        token = secrets.token_urlsafe(24)
        with self._transaction() as db:
            db.execute("DELETE FROM setup")
            until = time.time() + SETUP_SECONDS
            db.execute("INSERT INTO setup VALUES (?, ?)", [_hash(token), until])
        return token

    def setup_is_open(self, token: str) -> bool:
        """Not once somebody has an account, however he came to it."""
        with self._transaction(write=False) as db:
            taken = db.execute("SELECT 1 FROM account LIMIT 1").fetchone()
            return not taken and _open_setup(db, token)

    def set_up(self, token: str, name: str, password: str) -> Account:
        """The first operator. Raises ``Refused`` when the token is used up, void or old."""
        name, hashed = self._checked(name, OPERATOR, password)
        with self._transaction() as db:
            taken = db.execute("SELECT 1 FROM account LIMIT 1").fetchone()
            if taken or not _open_setup(db, token):
                raise Refused("this link was used, or is too old; start the dashboard again")
            db.execute("DELETE FROM setup")
            self._put(db, name, OPERATOR, hashed)
        return Account(name, OPERATOR, True)

    # -- logging in -------------------------------------------------------------------------

    def log_in(self, name: str, password: str, address: str = "") -> Account:
        """The account, when name and password fit.

        Raises ``Refused`` when they don't (never saying which of the two), and without looking
        at the password while this name has to wait at this address, see store.throttle.
        """
        keys = throttle.keys_of(_folded(name), address)
        with self._transaction() as db:
            wait = throttle.wait(db, keys)
            row = db.execute(
                "SELECT name, role, password_hash FROM account WHERE name = ?", [_folded(name)]
            ).fetchone()
            if wait <= 0:
                # Counted before the password is looked at, so that many tries at once don't
                # all slip through while the first one is hashed.
                throttle.count(db, keys)
        if wait > 0:
            raise Refused(f"too many failed logins; try again in {max(1, round(wait))} s")
        password_hash = row[2] if row and row[2] else self._nobody
        if not self._verifies(password_hash, password[:LONGEST_PASSWORD]) or not (row and row[2]):
            raise Refused("the name or the password is wrong")
        with self._transaction() as db:
            throttle.forgive(db, keys)
        return Account(row[0], row[1], True)

    @property
    def _nobody(self) -> str:
        """A hash for names that don't exist, so that they take as long as others."""
        if not hasattr(self, "_nobody_hash"):
            self._nobody_hash = self._hasher.hash(secrets.token_hex(8))
        return self._nobody_hash

    def _verifies(self, hashed: str, password: str) -> bool:
        try:
            return self._hasher.verify(hashed, password)
        except (VerificationError, InvalidHashError):
            return False

    # -- sessions ---------------------------------------------------------------------------

    def open_session(self, name: str) -> str:
        """A token that stands for this account until it expires or the account changes."""
        token = secrets.token_urlsafe(32)
        with self._transaction() as db:
            db.execute("DELETE FROM session WHERE expires_at < ?", [time.time()])
            db.execute(
                "INSERT INTO session VALUES (?, ?, ?)",
                [_hash(token), _folded(name), time.time() + SESSION_SECONDS],
            )
        return token

    def of_session(self, token: str) -> Account | None:
        """Who is logged in with this token, with the role that he has now."""
        with self._transaction(write=False) as db:
            row = db.execute(
                "SELECT a.name, a.role, a.password_hash FROM session s JOIN account a "
                "ON a.name = s.name WHERE s.token_hash = ? AND s.expires_at > ?",
                [_hash(token), time.time()],
            ).fetchone()
        return Account(row[0], row[1], bool(row[2])) if row else None

    def close_session(self, token: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM session WHERE token_hash = ?", [_hash(token)])

    # -- logins through OpenID Connect ----------------------------------------------------------

    def end_login(self, login: str) -> None:
        """For good: the cookie of a login outlives it, and so does a page that stays open."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO ended_login VALUES (?)", [_hash(login)])

    def has_ended(self, login: str) -> bool:
        with self._transaction(write=False) as db:
            query = "SELECT 1 FROM ended_login WHERE login_hash = ?"
            return db.execute(query, [_hash(login)]).fetchone() is not None

    @contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=10, isolation_level=None)
        try:
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield db
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        finally:
            db.close()


def _folded(name: str) -> str:
    return name.strip().casefold()


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _open_setup(db: sqlite3.Connection, token: str) -> bool:
    query = "SELECT 1 FROM setup WHERE token_hash = ? AND expires_at > ?"
    return db.execute(query, [_hash(token), time.time()]).fetchone() is not None
